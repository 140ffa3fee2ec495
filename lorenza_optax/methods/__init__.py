"""The methods of the family: each a choice on every axis, in a file of its own."""

from lorenza_optax.methods._apollo import apollo, scale_by_apollo
from lorenza_optax.methods._cosmos import cosmos, scale_by_cosmos
from lorenza_optax.methods._fira import fira, scale_by_fira
from lorenza_optax.methods._flora import flora, scale_by_flora
from lorenza_optax.methods._galore import galore, scale_by_galore
from lorenza_optax.methods._gradnormlorp import (
    WeightNormalizedState,
    gradnormlorp,
    scale_by_gradnormlorp,
)
from lorenza_optax.methods._gum import gum, scale_by_gum
from lorenza_optax.methods._lotus import lotus, scale_by_lotus
from lorenza_optax.methods._lozo import lozo, scale_by_lozo
from lorenza_optax.methods._lozo_m import lozo_m, scale_by_lozo_m
from lorenza_optax.methods._mezo import mezo, scale_by_mezo
from lorenza_optax.methods._owlore import LayerwiseState, owlore, scale_by_owlore
from lorenza_optax.methods._projfactor import projfactor, scale_by_projfactor
from lorenza_optax.methods._sam import asam, sam
from lorenza_optax.methods._subzero import scale_by_subzero, subzero
from lorenza_optax.methods._vlorp import scale_by_vlorp, vlorp
from lorenza_optax.methods._zo_muon import scale_by_zo_muon, zo_muon

__all__ = [
    "LayerwiseState",
    "WeightNormalizedState",
    "apollo",
    "asam",
    "cosmos",
    "fira",
    "flora",
    "galore",
    "gradnormlorp",
    "gum",
    "lotus",
    "lozo",
    "lozo_m",
    "mezo",
    "owlore",
    "projfactor",
    "sam",
    "scale_by_apollo",
    "scale_by_cosmos",
    "scale_by_fira",
    "scale_by_flora",
    "scale_by_galore",
    "scale_by_gradnormlorp",
    "scale_by_gum",
    "scale_by_lotus",
    "scale_by_lozo",
    "scale_by_lozo_m",
    "scale_by_mezo",
    "scale_by_owlore",
    "scale_by_projfactor",
    "scale_by_subzero",
    "scale_by_vlorp",
    "scale_by_zo_muon",
    "subzero",
    "vlorp",
    "zo_muon",
]
