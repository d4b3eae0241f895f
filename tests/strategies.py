"""Hypothesis strategies of the property tests: odd values of every type, tensors, refusable calls."""

import math

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

ALLOWED = (ValueError, TypeError)
USUAL = settings(
    derandomize=True, max_examples=120, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)

odd_text = st.one_of(
    st.text(max_size=8),
    st.sampled_from([
        "", "odd", "even", "all", "svd", "aligned", "sqrt", "unit_b", "tied", "dense", "0,2:", "::0", "-1",
        "9" * 30, "²", "a\nb", "\ud800",
    ]),
)
odd = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 9), st.sampled_from([10**9, 10**30, -(10**30)]),
    st.floats(allow_nan=True, allow_infinity=True, width=32), odd_text, st.binary(max_size=3),
    st.lists(st.integers(-1, 5), max_size=3), st.tuples(st.integers(-1, 5), st.integers(-1, 5)),
    st.dictionaries(st.text(max_size=3), st.integers(-1, 3), max_size=2), st.builds(object),
    st.complex_numbers(max_magnitude=9),
)


@st.composite
def tensors(draw, dimensions=None, sizes=st.integers(0, 5)):
    """A small tensor of any type, some of it not finite, huge or tiny."""
    shape = draw(st.lists(sizes, min_size=dimensions or 0, max_size=dimensions or 4))
    dtype = draw(
        st.sampled_from([
            torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool,
            torch.complex64,
        ])
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    made = torch.randn(shape, generator=generator, dtype=torch.float64) * draw(
        st.sampled_from([1.0, 0.0, 1e-200, 1e200, 1e-320, 1e308, 1e5])
    )
    if made.numel() and draw(st.integers(0, 4)) == 0:
        made.view(-1)[0] = draw(st.sampled_from([math.nan, math.inf, -math.inf]))
    return made.to(dtype)


anything = st.one_of(odd, tensors())


def mostly(valid, other=odd):
    """Three valid values for one of any kind: with several arguments some calls must get through."""
    return st.sampled_from([valid, valid, valid, other]).flatmap(lambda strategy: strategy)


class Attempts:
    """Calls a function; counts how many calls were made and how many were refused in one allowed line."""

    def __init__(self):
        self.made = self.refused = 0

    def __call__(self, call):
        """The result, or None where the call ended in one allowed line; any other error is the test's."""
        self.made += 1
        try:
            return call()
        except ALLOWED as error:
            self.refused += 1
            message = str(error)
            assert message.strip() and "\n" not in message and len(message) < 600, repr(message)
            return None
