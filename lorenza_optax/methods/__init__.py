"""The methods of the family: each a choice on every axis, in a file of its own."""

from lorenza_optax.methods._galore import galore, scale_by_galore
from lorenza_optax.methods._gradnormlorp import gradnormlorp, scale_by_gradnormlorp
from lorenza_optax.methods._owlore import owlore, scale_by_owlore
from lorenza_optax.methods._sam import asam, sam

__all__ = [
    "asam",
    "galore",
    "gradnormlorp",
    "owlore",
    "sam",
    "scale_by_galore",
    "scale_by_gradnormlorp",
    "scale_by_owlore",
]
