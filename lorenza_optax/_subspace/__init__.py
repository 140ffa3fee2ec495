"""The subspace of a matrix: how it is chosen, and when anew."""
