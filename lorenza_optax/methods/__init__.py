"""The methods of the family: each a choice on every axis, in a file of its own."""

from lorenza_optax.methods._cosmos import cosmos, scale_by_cosmos
from lorenza_optax.methods._galore import galore, scale_by_galore
from lorenza_optax.methods._gum import gum, scale_by_gum
from lorenza_optax.methods._lotus import lotus, scale_by_lotus
from lorenza_optax.methods._sam import asam, sam

__all__ = [
    "asam",
    "cosmos",
    "galore",
    "gum",
    "lotus",
    "sam",
    "scale_by_cosmos",
    "scale_by_galore",
    "scale_by_gum",
    "scale_by_lotus",
]
