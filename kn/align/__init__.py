"""The aligned start: exact symmetries of a teacher and least squares, so that a compressed model needs no healing."""
