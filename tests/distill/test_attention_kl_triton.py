"""The Triton kernels of eq. 3 against naive float64 loops, on a GPU or in Triton's interpreter.

TRITON_INTERPRET must be set before Triton is imported and would stay for all other tests: the interpreter has
a process of its own, test_in_the_interpreter runs this file again there. What needs neither is at the end.
"""

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from test_attention_kl import MASKS, inputs, naive

attention = import_module("kn.distill.attention_kl")  # kn.distill.attention_kl is the function
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
HAS_TRITON = importlib.util.find_spec("triton") is not None
on_a_device = pytest.mark.skipif(
    not HAS_TRITON or not (INTERPRETED or torch.cuda.is_available()),
    reason="needs Triton and a GPU, or its interpreter",
)
in_this_process = pytest.mark.skipif(INTERPRETED or not HAS_TRITON, reason="needs Triton, not interpreted")

# Of the largest value (gradients: of the norm), against float64 loops over the same rounded inputs:
FLOAT32 = 1e-5  # some 50 float32 roundings (6e-8) of scores near 1 and of log-sum-exps near 5 that cancel
# gradients only: the slopes are rounded to bfloat16 (2^-9) before their product, the result once more
BFLOAT16 = 2**-7
FLOAT16 = 2**-10  # likewise, 2^-12 each
# gradients, scores near 1000: each is off by 6e-5, so are its exponential and what several of them add up to
LARGE = 1e-3
GRADIENT = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}


@pytest.fixture
def kernels(monkeypatch):
    """attention_kl takes the kernels, whatever the device."""
    from kn.distill import attention_kl_triton as kernels

    monkeypatch.setattr(
        attention,
        "triton_backend",
        lambda *given: kernels if kernels.supports(*given) else pytest.fail("the kernels do not take these"),
    )
    if INTERPRETED:
        multiply_bfloat16(monkeypatch)
    return kernels


def multiply_bfloat16(monkeypatch):
    """The interpreter keeps bfloat16 as its 16 bits and tl.dot multiplies them as whole numbers; here as
    float32, which is exact, and what a GPU does.
    """
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    plain = InterpreterBuilder.create_dot

    def wide(x):
        return (
            TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
            if x.dtype.scalar == tl.bfloat16
            else x
        )

    monkeypatch.setattr(
        InterpreterBuilder, "create_dot", lambda self, a, b, *rest: plain(self, wide(a), wide(b), *rest)
    )


def set_block_size(monkeypatch, kernels, block):
    monkeypatch.setattr(kernels, "block_size", lambda *_: block)


def compare(given, mask, direction, tolerance=None, scales=(0.5, 0.4)):
    """Rows and gradients of the kernels against the loops, with a weight of its own for each row."""
    dtype = given[0].dtype
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in given]
    wanted = naive(*exact, *scales, mask, direction)
    largest = float(wanted.detach().abs().max())
    placed = [x.detach().to(DEVICE).requires_grad_(x.requires_grad) for x in given]
    found = attention.attention_kl(
        *placed, *scales, None if mask is None else mask.to(DEVICE), direction, "none"
    )
    assert found.dtype == torch.float32 and found.shape == wanted.shape
    assert (found.cpu() - wanted).abs().max() <= FLOAT32 * max(1, largest)
    if mask is not None:
        assert (found.cpu()[~mask.bool()[:, None].expand(found.shape)] == 0).all()
    weights = torch.randn(wanted.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    slopes = torch.autograd.grad((found * weights.to(DEVICE).float()).sum(), placed[:2])
    for a, b in zip(slopes, torch.autograd.grad((wanted * weights).sum(), exact[:2]), strict=True):
        assert a.dtype == dtype and torch.isfinite(a).all()
        assert (a.cpu() - b).norm() <= (tolerance or GRADIENT[dtype]) * max(b.norm(), 1e-3)


@on_a_device
@pytest.mark.parametrize("direction", attention.DIRECTIONS)
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_masks_and_reductions(kernels, mask, direction):
    mask, given = MASKS[mask], inputs(e_s=16, e_t=32, dtype=torch.float32)
    compare(given, mask, direction)
    placed = [x.detach().to(DEVICE).requires_grad_(x.requires_grad) for x in given]
    rows = naive(*(x.double() for x in given), 0.5, 0.4, mask, direction)
    count = rows.shape[1] * (14 if mask is None else int(mask.sum()))
    for reduction, wanted in (("sum", rows.sum()), ("mean", rows.sum() / count)):
        found = attention.attention_kl(
            *placed, 0.5, 0.4, None if mask is None else mask.to(DEVICE), direction, reduction
        )
        assert abs(found.cpu() - wanted) <= FLOAT32 * wanted
        for a, b in zip(
            torch.autograd.grad(found, placed[:2]),
            torch.autograd.grad(wanted, given[:2], retain_graph=True),
            strict=True,
        ):
            assert (a.cpu() - b).norm() <= FLOAT32 * b.norm()


@on_a_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("length", "block"), [(1, 64), (33, 32), (65, 16)], ids=str)
@pytest.mark.parametrize("direction", attention.DIRECTIONS)
def test_lengths_blocks_and_types(kernels, monkeypatch, length, block, dtype, direction):
    """Odd lengths, one block and five; the last sequence is padded on the left, has a hole and padding on the
    right.
    """
    set_block_size(monkeypatch, kernels, block)
    mask = torch.ones(2, length, dtype=torch.int64)
    if length > 1:
        mask[1, : length // 3] = mask[1, length // 2] = mask[1, -2:] = 0  # its first blocks are wholly masked
    compare(inputs(2, 1, length, 32, 64, dtype=dtype), mask, direction)


@on_a_device
@pytest.mark.parametrize("sizes", [(16, 128), (64, 32)], ids=str)
def test_head_sizes_and_half_precision_with_small_weights(kernels, sizes):
    """float16, where a slope times a weight of 2^-22 is 0 but the gradient of k, multiplied by a large q, is
    not.
    """
    given = inputs(1, 2, 7, *sizes, dtype=torch.float16)
    compare(given, None, "student_teacher", scales=(0.2, 0.1))
    q_s, k_s, q_t, k_t = (x.detach().to(DEVICE) for x in given)
    k_s = (k_s / 256).requires_grad_()
    rows = attention.attention_kl(256 * q_s, k_s, q_t, k_t, reduction="none")
    one, small = (
        torch.autograd.grad(rows.sum() * weight, k_s, retain_graph=True)[0].float()
        for weight in (2**-6, 2**-22)
    )
    # what is left of float16's digits near its smallest numbers
    assert (small * 2**16 - one).norm() <= 2**-6 * one.norm()


@on_a_device
@pytest.mark.parametrize("direction", attention.DIRECTIONS)
def test_scores_of_a_thousand(kernels, monkeypatch, direction):
    """e^1000 is no float32: without the running maximum, or without rescaling by it, sums and expectation
    overflow or vanish. The maximum grows from block to block.
    """
    set_block_size(monkeypatch, kernels, 16)
    q_s, k_s, q_t, k_t = (x.detach() for x in inputs(1, 1, 65, 16, 16, dtype=torch.float32))
    growth = torch.linspace(0.05, 1, 65)[:, None]
    aim = torch.nn.functional.normalize(torch.ones(16), dim=0)
    given = [
        (q_s + 32 * aim).requires_grad_(),
        (k_s + 32 * growth * aim).requires_grad_(),
        q_t + 30 * aim,
        k_t + 32 * growth.flip(0) * aim,
    ]
    assert (given[0] @ given[1].transpose(-1, -2)).max() > 1000
    compare(given, None, direction, tolerance=LARGE, scales=(1.0, 1.0))


@on_a_device
def test_a_query_does_not_see_later_keys(kernels):
    """Exactly: what comes later changes no bit of an earlier row, nor does what a padded key holds."""
    given = [x.detach().to(DEVICE) for x in inputs(1, 1, 33, 16, 16, dtype=torch.float32)]
    mask = torch.ones(1, 33, device=DEVICE)
    mask[0, 3] = 0
    rows = attention.attention_kl(*given, attention_mask=mask, reduction="none")
    for x in given:
        x[:, :, 20:] += 7
        x[:, :, 3] = 5
    again = attention.attention_kl(*given, attention_mask=mask, reduction="none")
    assert torch.equal(rows[..., :20], again[..., :20]) and not torch.equal(rows[..., 20:], again[..., 20:])


@on_a_device
def test_views_as_a_model_gives_them(kernels):
    """q and k cut out of one c_attn output: strides that are not contiguous, and the same for heads that lie
    apart.
    """
    g = torch.Generator().manual_seed(3)
    output = torch.randn(2, 9, 3 * 2 * 32, generator=g).to(DEVICE).requires_grad_()
    teacher = torch.randn(2, 9, 3 * 2 * 64, generator=g).to(DEVICE)
    q, k, _ = output.unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
    q_t, k_t, _ = teacher.unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
    loss = attention.attention_kl(q, k, q_t, k_t)
    wanted = naive(
        *(x.double().cpu() for x in (q, k, q_t, k_t)), 32**-0.5, 64**-0.5, None, "student_teacher"
    ).mean()
    assert abs(loss.cpu() - wanted) <= FLOAT32 * wanted
    for a, b in zip(
        torch.autograd.grad(loss, output, retain_graph=True), torch.autograd.grad(wanted, output), strict=True
    ):
        assert (a - b).norm() <= FLOAT32 * b.norm()
    # a head's numbers apart
    turned = [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in (q, k, q_t, k_t)]
    assert torch.equal(attention.attention_kl(*turned), loss)


@on_a_device
def test_only_where_asked(kernels):
    q_s, k_s, q_t, k_t = (x.detach().to(DEVICE) for x in inputs(1, 1, 7, 16, 16, dtype=torch.float32))
    q_t.requires_grad_()
    loss = attention.attention_kl(q_s.requires_grad_(), k_s, q_t, k_t)
    loss.backward()
    assert q_s.grad is not None and k_s.grad is None and q_t.grad is None
    with torch.no_grad():
        assert not attention.attention_kl(q_s, k_s, q_t, k_t).requires_grad


@pytest.mark.skipif(INTERPRETED or not HAS_TRITON, reason="is what starts the interpreter")
def test_in_the_interpreter():
    """All of the above, on a CPU."""
    path = os.pathsep.join([str(Path(attention.__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    variables = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
    command = [sys.executable, "-m", "pytest", "-x", "--tb=short", __file__]
    result = subprocess.run(command, capture_output=True, text=True, env=variables, cwd=ROOT, timeout=300)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-1000:]
    assert int(re.search(r"(\d+) passed", result.stdout)[1]) >= 25, result.stdout[-500:]


def compiled(kernel, architecture, dtype, sizes, masked, first, block):
    """(bytes of shared memory, bytes of spilled registers) of a kernel compiled for an NVIDIA architecture;
    needs no GPU.
    """
    import triton.backends.nvidia
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    name = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    constants = dict(
        zip(
            ("A", "B", "S", "T", "MASK", "STUDENT_FIRST", "BLOCK"),
            (*sizes, *sizes, masked, first, block),
            strict=True,
        )
    ) | ({} if masked else {"valid": None})
    kinds = {
        "valid": "*u8",
        "heads": "i32",
        "length": "i32",
        "scale_a": "fp32",
        "scale_b": "fp32",
        "scale_s": "fp32",
        "scale_t": "fp32",
        "strides": (("i32",) * 3,) * 4,
    }
    tensors = dict.fromkeys(("q_a", "k_a", "q_b", "k_b", "q_s", "k_s", "q_t", "k_t", "dq", "dk"), f"*{name}")
    signature = {
        n: "constexpr" if n in constants else (kinds | tensors).get(n, "*fp32") for n in kernel.arg_names
    }
    aligned = [(index,) for index, kind in enumerate(signature.values()) if kind[0] == "*"] + [
        (kernel.arg_names.index("strides"), x, axis) for x in range(4) for axis in range(3)
    ]
    source = ASTSource(
        kernel,
        signature,
        {n: value for n, value in constants.items() if n in signature},
        dict.fromkeys(aligned, [["tt.divisibility", 16]]),
    )
    made = compile(source, target=GPUTarget("cuda", architecture, 32))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
        usage = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return made.metadata.shared, int(re.search(r"STACK:(\d+)", usage)[1])


@in_this_process
@pytest.mark.parametrize(
    ("architecture", "dtype", "sizes", "masked"),
    [
        (80, torch.bfloat16, (32, 64), False),
        (90, torch.bfloat16, (64, 64), True),
        (90, torch.float16, (64, 32), True),
        (86, torch.bfloat16, (128, 128), True),
        (86, torch.float32, (128, 128), True),
        (80, torch.float32, (32, 64), True),
    ],
    ids=str,
)
def test_they_compile_and_fit(tmp_path, monkeypatch, architecture, dtype, sizes, masked):
    """For real hardware, which need not be there: within sm_86's shared memory, with hardly a spilled
    register.
    """
    from kn.distill import attention_kl_triton as kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    block = kernels.block_size(*(torch.zeros(1, size, dtype=dtype) for size in sizes))
    for kernel in (kernels._forward, kernels._backward_q, kernels._backward_k):
        shared, spilled = compiled(kernel, architecture, dtype, sizes, masked, True, block)
        assert shared <= 99 * 1024 and spilled <= 16, kernel.__name__


@in_this_process
def test_what_the_kernels_take():
    from kn.distill.attention_kl_triton import supports

    def given(e_s=32, e_t=64, t=3, dtype=torch.bfloat16, k_dtype=None):
        return [
            torch.zeros(1, 1, t, e, dtype=d)
            for e, d in ((e_s, dtype), (e_s, k_dtype or dtype), (e_t, dtype), (e_t, dtype))
        ]

    assert supports(*given())
    assert supports(*given(16, 128, dtype=torch.float16))
    assert supports(*given(dtype=torch.float32))
    assert not supports(*given(e_s=48)) and not supports(*given(e_t=256)) and not supports(*given(t=0))
    assert not supports(*given(dtype=torch.float64)) and not supports(*given(k_dtype=torch.float32))


def test_on_a_cpu_and_without_triton_the_chunked_form_is_taken(monkeypatch):
    assert attention.triton_backend(*inputs(dtype=torch.float32)) is None
    monkeypatch.setitem(sys.modules, "triton", None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, "kn.distill.attention_kl_triton", raising=False)
    monkeypatch.delattr("kn.distill.attention_kl_triton", raising=False)
    attention._import_kernels.cache_clear()
    try:
        assert attention._import_kernels() is None
    finally:
        attention._import_kernels.cache_clear()
