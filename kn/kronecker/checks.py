"""What the public functions are given, checked with one sentence for each refusal: the name, the value, what is allowed."""

from __future__ import annotations

import math

import torch

MAX_NUMEL = 2**40  # entries of a weight; nobody has the memory


def describe_value(value: object) -> str:
    """A value in a message: on one line, at most 60 characters."""
    if isinstance(value, torch.Tensor):
        return f"a tensor {tuple(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def require_positive_int(name: str, value: object, least: int = 1) -> int:
    """A whole number of at least `least`; TypeError or ValueError for anything else."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} is {describe_value(value)}: a whole number of at least {least} wanted")
    if value < least:
        raise ValueError(f"{name} is {describe_value(value)}: a whole number of at least {least} wanted")
    return value


def require_nonnegative(name: str, value: object, positive: bool = False) -> float:
    """A finite number that is not negative; TypeError or ValueError for anything else."""
    word = "positive" if positive else "not negative"
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name} is {describe_value(value)}: a finite number that is {word} wanted")
    if not 0 <= value < math.inf or positive and not value:
        raise ValueError(f"{name} is {describe_value(value)}: a finite number that is {word} wanted")
    return value


def require_float_tensor(name: str, value: object, dimensions: int | None = None) -> torch.Tensor:
    """A tensor of real floating-point numbers that holds something; TypeError or ValueError for anything else."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} is {describe_value(value)}: a tensor wanted")
    if not value.is_floating_point():
        raise TypeError(f"{name} is {describe_value(value)}: floating-point numbers wanted")
    if dimensions is not None and value.ndim != dimensions:
        raise ValueError(f"{name} is {describe_value(value)}: {dimensions} dimensions wanted")
    if not value.numel():
        raise ValueError(f"{name} is {describe_value(value)}: it is empty")
    return value


def require_shape(name: str, value: object) -> tuple[int, int]:
    """Two whole numbers of at least 1; TypeError or ValueError for anything else."""
    if not isinstance(value, tuple | list | torch.Size):
        raise TypeError(f"{name} is {describe_value(value)}: (rows, columns) wanted, such as (2, 1)")
    if len(value) != 2:
        raise ValueError(f"{name} is {describe_value(value)}: (rows, columns) wanted, such as (2, 1): two dimensions")
    return require_positive_int(f"{name}'s rows", value[0]), require_positive_int(f"{name}'s columns", value[1])


def require_choice(name: str, value: object, allowed: tuple) -> None:
    """One of some words; ValueError for anything else."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} {describe_value(value)} is unknown: allowed are {', '.join(map(repr, allowed))}")
