"""Which leaves are projected, how each is viewed as a matrix, and at which rank."""
