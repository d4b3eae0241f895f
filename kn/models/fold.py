"""Exact narrow inference: fold() runs compressed sublayers at 1/f of their width; nothing is approximated.

A sublayer can be narrow where factors B (f, 1) of rank 1 lead into it and, for an MLP, B (1, f) lead out of
it. gpt2.py and llama.py hold the formulas, one FoldablePart for each kind of sublayer."""

import torch
from torch import Tensor, nn

from kn.models.config import FactorShapes

# Rows of an elementwise function that a CPU computes at a time, its buffers in the cache. 768→3072→768, 1,024
# rows, 2 threads, float32, speed-up over the dense MLP: 1.60 all at once, 1.92 with 128, 1.97 with 256 rows.
ROWS = 256


class FoldablePart:
    """A sublayer of a block that fold() can make narrow: `paths` are the modules it replaces.

    It needs rank 1, B (f, 1) in the `outputs` modules and (1, f) in the `inputs`; f must divide the heads of
    the `attention` module. Subclasses define two static methods, in a block's own paths:
      install(block, f)             put uninitialised narrow modules into a dense block, in place
      folded_state_dict(block, f)   the narrow modules' parameters from a compressed block, in its dtype"""

    paths: tuple[str, ...]
    outputs: tuple[str, ...]
    inputs: tuple[str, ...] = ()
    attention: str | None = None

    @classmethod
    def common_factor(cls, block: nn.Module, shapes: FactorShapes) -> int:
        """The f by which the sublayer becomes narrower. Raises ValueError if it cannot."""
        for path in (*cls.outputs, *cls.inputs):
            if path not in shapes:
                raise ValueError(f"fold needs a compressed {path}, this one is dense")
            b_shape, rank = shapes[path]
            if rank > 1:
                problem = f"fold needs rank 1, this model has rank {rank}: a sum of {rank} products"
                raise ValueError(f"{problem} is not narrower than the dense layer at factor {max(b_shape)}")
        factor = shapes[cls.outputs[0]][0][0]
        needed = dict.fromkeys(cls.outputs, (factor, 1)) | dict.fromkeys(cls.inputs, (1, factor))
        for path, (m2, n2) in needed.items():
            if shapes[path][0] != (m2, n2):
                found = "x".join(map(str, shapes[path][0]))
                raise ValueError(f"fold needs B {m2}x{n2} in {path}, this model has {found}")
        if cls.attention and (head_dim := block.get_submodule(cls.attention).head_dim) % factor:
            raise ValueError(f"fold needs heads that factor {factor} divides, they are {head_dim} wide")
        return factor


def apply_in_row_chunks(function, *inputs: Tensor) -> Tensor:
    """function(*inputs, out), all of one shape, ROWS rows at a time in inference on a CPU."""
    first = inputs[0]
    at_once = first.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling()
    if at_once or first.numel() <= ROWS * first.shape[-1]:
        return function(*inputs)
    result = torch.empty_like(first, memory_format=torch.contiguous_format)
    for chunk in zip(*(t.flatten(0, -2).split(ROWS) for t in (*inputs, result)), strict=True):
        function(*chunk)
    return result


def foldable(blocks: nn.ModuleList, shapes: FactorShapes, parts: tuple) -> list[tuple[int, type, int]]:
    """(layer, part, factor) of every sublayer that can be narrow. Raises ValueError if none can, and why."""
    found, reasons = [], []
    for index in sorted({int(name.partition(".")[0]) for name in shapes}):
        in_block = {n.partition(".")[2]: shape for n, shape in shapes.items() if n.startswith(f"{index}.")}
        for part in parts:
            try:
                found.append((index, part, part.common_factor(blocks[index], in_block)))
            except ValueError as reason:
                reasons.append(reason)
    if not shapes:
        raise ValueError("fold needs compressed layers, this model has none")
    if not found:  # whoever left a matrix dense knows it: any other reason says more
        raise min(reasons, key=lambda reason: "this one is dense" in str(reason))
    return found
