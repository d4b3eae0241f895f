"""Argument checks for public functions.

Each raises TypeError or ValueError with one line that names the argument, its value and what is allowed."""

import math
from typing import Any

import torch

MAX_NUMEL = 2**40  # entries of a weight: 4 TB in float32, more than any machine has


def describe_value(value: Any) -> str:
    """A value in an error message: one line of at most 60 characters; of a tensor, shape and dtype."""
    if isinstance(value, torch.Tensor):
        return f"a tensor {tuple(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def _require(is_type: bool, is_allowed: bool, name: str, value: Any, expected: str) -> None:
    if not is_type or not is_allowed:
        error = ValueError if is_type else TypeError
        raise error(f"{name} is {describe_value(value)}: expected {expected}")


def require_positive_int(name: str, value: Any) -> int:
    """An int of at least 1 (no bool). Raises TypeError for another type, ValueError for a smaller number."""
    is_int = type(value) is int
    _require(is_int, is_int and value >= 1, name, value, "an integer of at least 1")
    return value


def require_sizes(**sizes: int) -> None:
    """Positive ints whose product is at most MAX_NUMEL. Raises TypeError or ValueError."""
    for name, value in sizes.items():
        require_positive_int(name, value)
    if math.prod(sizes.values()) > MAX_NUMEL:
        described = " and ".join(f"{name} {describe_value(value)}" for name, value in sizes.items())
        raise ValueError(f"a weight of {described} is larger than any memory")


def require_nonnegative(name: str, value: Any, positive: bool = False) -> float:
    """A finite number ≥ 0, > 0 if `positive`. Raises TypeError for no number, ValueError for other ones."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    is_allowed = is_number and 0 <= value < math.inf and (value > 0 or not positive)
    sign = "positive" if positive else "non-negative"
    _require(is_number, is_allowed, name, value, f"a finite {sign} number")
    return value


def require_bool(name: str, value: Any) -> None:
    """True or False. Raises TypeError for anything else."""
    _require(isinstance(value, bool), True, name, value, "True or False")


def require_float_tensor(name: str, value: Any, dimensions: int | None = None) -> torch.Tensor:
    """A non-empty floating-point tensor. Raises TypeError for another type, ValueError for another shape."""
    _require(isinstance(value, torch.Tensor), True, name, value, "a tensor")
    _require(value.is_floating_point(), True, name, value, "a floating-point dtype")
    _require(True, dimensions in (None, value.ndim), name, value, f"{dimensions} dimensions")
    _require(True, value.numel() > 0, name, value, "at least one entry")
    return value


def require_shape(name: str, value: Any, alternative: str = "") -> tuple[int, int]:
    """Two positive integers; `alternative` ends the message. Raises TypeError or ValueError."""
    is_list, expected = isinstance(value, tuple | list), f"(rows, columns), such as (2, 1){alternative}"
    _require(is_list, is_list and len(value) == 2, name, value, expected)
    rows, columns = value
    return require_positive_int(f"{name}'s rows", rows), require_positive_int(f"{name}'s columns", columns)


def require_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """One of the allowed strings. Raises ValueError for anything else."""
    if not isinstance(value, str) or value not in allowed:
        choices = ", ".join(map(repr, allowed))
        raise ValueError(f"{name} {describe_value(value)} is unknown: allowed are {choices}")
