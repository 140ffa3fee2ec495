"""Training a few layers of a model at a time."""
