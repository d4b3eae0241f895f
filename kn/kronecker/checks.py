"""Argument checks for public functions.

Each raises TypeError or ValueError with one line that names the argument, its value and what is allowed.
"""

from __future__ import annotations

import math

import torch

MAX_NUMEL = 2**40  # entries of a weight: 4 TB in float32, more than any machine has


def describe_value(value: object) -> str:
    """A value in an error message: one line of at most 60 characters; of a tensor, shape and dtype."""
    if isinstance(value, torch.Tensor):
        return f"a tensor {tuple(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def require_positive_int(name: str, value: object) -> int:
    """An int of at least 1 (no bool). Raises TypeError for another type, ValueError for a smaller number."""
    message = f"{name} is {describe_value(value)}: expected an integer of at least 1"
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(message)
    if value < 1:
        raise ValueError(message)
    return value


def require_nonnegative(name: str, value: object, positive: bool = False) -> float:
    """A finite number ≥ 0, > 0 if `positive`. Raises TypeError for no number, ValueError for other ones."""
    sign = "positive" if positive else "non-negative"
    message = f"{name} is {describe_value(value)}: expected a finite {sign} number"
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(message)
    if not 0 <= value < math.inf or positive and not value:
        raise ValueError(message)
    return value


def require_bool(name: str, value: object) -> None:
    """True or False. Raises TypeError for anything else."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} is {describe_value(value)}: expected True or False")


def require_float_tensor(name: str, value: object, dimensions: int | None = None) -> torch.Tensor:
    """A non-empty floating-point tensor. Raises TypeError for another type, ValueError for another shape."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} is {describe_value(value)}: expected a tensor")
    if not value.is_floating_point():
        raise TypeError(f"{name} is {describe_value(value)}: expected a floating-point dtype")
    if dimensions is not None and value.ndim != dimensions:
        raise ValueError(f"{name} is {describe_value(value)}: expected {dimensions} dimensions")
    if not value.numel():
        raise ValueError(f"{name} is {describe_value(value)}: it is empty")
    return value


def require_shape(name: str, value: object, alternative: str = "") -> tuple[int, int]:
    """Two positive integers; `alternative` ends the message. Raises TypeError or ValueError."""
    message = f"{name} is {describe_value(value)}: expected (rows, columns), such as (2, 1){alternative}"
    if not isinstance(value, tuple | list):
        raise TypeError(message)
    if len(value) != 2:
        raise ValueError(message)
    rows, columns = value
    return require_positive_int(f"{name}'s rows", rows), require_positive_int(f"{name}'s columns", columns)


def require_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """One of the allowed strings. Raises ValueError for anything else."""
    if not isinstance(value, str) or value not in allowed:
        choices = ", ".join(map(repr, allowed))
        raise ValueError(f"{name} {describe_value(value)} is unknown: allowed are {choices}")
