"""Kronecker products as layers (eq. 1 of the paper), on torch alone.

nearest.py finds the factors of a weight matrix, layers.py computes with them, autograd.py is the hand-written
backward pass of the two products that GPT-2 and Llama need, checks.py the argument checks of all public
functions."""

from kn.kronecker.layers import KroneckerEmbedding, KroneckerHead, KroneckerLinear, kronecker_apply
from kn.kronecker.nearest import kronecker_sum, nearest_kronecker

__all__ = ["KroneckerEmbedding", "KroneckerHead", "KroneckerLinear", "kronecker_apply", "kronecker_sum",
           "nearest_kronecker"]
