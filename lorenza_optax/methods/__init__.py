"""The methods of the family: each a choice on every axis, in a file of its own."""

from lorenza_optax.methods._galore import galore, scale_by_galore
from lorenza_optax.methods._lozo import lozo, scale_by_lozo
from lorenza_optax.methods._lozo_m import lozo_m, scale_by_lozo_m
from lorenza_optax.methods._mezo import mezo, scale_by_mezo
from lorenza_optax.methods._sam import asam, sam
from lorenza_optax.methods._subzero import scale_by_subzero, subzero
from lorenza_optax.methods._zo_muon import scale_by_zo_muon, zo_muon

__all__ = [
    "asam",
    "galore",
    "lozo",
    "lozo_m",
    "mezo",
    "sam",
    "scale_by_galore",
    "scale_by_lozo",
    "scale_by_lozo_m",
    "scale_by_mezo",
    "scale_by_subzero",
    "scale_by_zo_muon",
    "subzero",
    "zo_muon",
]
