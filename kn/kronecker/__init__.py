"""Kronecker products as layers (eq. 1 of the paper), on torch alone."""
