"""Intermediate-layer distillation (eq. 2-5) and the Trainer that uses it."""
