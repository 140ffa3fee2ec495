"""Sharpness-aware training around any optimizer: a chain stage, and the gradient taken outside."""
