"""The methods of the family: each a choice on every axis, in a file of its own."""

from lorenza_optax.methods._sam import asam, sam

__all__ = ["asam", "sam"]
