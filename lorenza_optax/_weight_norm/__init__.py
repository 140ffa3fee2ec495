"""Training a matrix as magnitudes and directions."""
