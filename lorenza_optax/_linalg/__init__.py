"""Decompositions of a matrix and of stacks of them, without trees or optimizers."""
