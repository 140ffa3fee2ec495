"""What this machine is, and whether a model fits into it."""

import os
import pathlib
import platform
from importlib import metadata
from typing import NamedTuple

import jax
import jax.numpy as jnp

import llama
import optimizers
import reporting


class Need(NamedTuple):
    """Bytes of a training step."""

    weights: int
    gradients: int
    optimizer_state: int
    perturbed_weights: int
    activations: int


def needed_bytes(model, settings, names, batch_size, seq_len):
    """The largest need of the named optimizers, from shapes: nothing is allocated.

    Weights, gradients and optimizer state are exact; the activations that backpropagation
    keeps are an estimate.
    """
    _, params = llama.abstract(model)
    weights = _tree_bytes(params)
    activations = _activation_bytes(model, batch_size, seq_len)

    def need(name):
        entry = optimizers.OPTIMIZERS[name]
        tx = entry.build(optimizers.learning_rate_schedule(1.0, 10), settings)
        state = _tree_bytes(jax.eval_shape(tx.init, params))
        return Need(weights, weights, state, weights if entry.perturbs else 0, activations)

    return max((need(name) for name in names), key=sum)


def _tree_bytes(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _activation_bytes(model, batch_size, seq_len):
    width, wide = model.hidden_size, model.intermediate_size
    itemsize = jnp.dtype(model.dtype).itemsize
    # Kept for each token of a layer, fitted to XLA's own account of compiled AdamW steps (tiny,
    # float32): 16 x 128 tokens 214 MB, estimated 214; 8 x 512 tokens 768 MB, estimated 780.
    per_token = itemsize * (13 * width + 4 * wide) + 14 * model.num_heads * seq_len
    # Logits, their exponentials and their gradient, in float32.
    head = 3 * 4 * model.vocab_size
    return batch_size * seq_len * (model.num_layers * per_token + head)


def shortage(need, available):
    """What is lacking, as a sentence; None where it fits, or where that cannot be told."""
    if available is None or sum(need) <= available:
        return None
    parts = ", ".join(
        f"{field.replace('_', ' ')} {reporting.size(value)}"
        for field, value in zip(need._fields, need, strict=True)
        if value
    )
    return (
        f"needs about {reporting.size(sum(need))} ({parts}), and {reporting.size(available)} are "
        "available."
    )


def available_bytes():
    """Free memory of the device that JAX computes on; None where it cannot be told."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        if "bytes_limit" not in stats:
            return None
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    limits = [_meminfo_available(), _container_available()]
    known = [limit for limit in limits if limit is not None]
    if known:
        return min(known)
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def _meminfo_available():
    try:
        lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    kilobytes = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(kilobytes[0]) * 1024 if kilobytes else None


def _container_available():
    """What is left under a container's limit (cgroup v2), which /proc/meminfo does not know."""
    group = pathlib.Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
        # The page cache counts as used, and is given back on demand.
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return int(limit) - used + int(stat.get("file", 0)) if limit != "max" else None
    except (OSError, ValueError):
        return None


def describe():
    device = jax.devices()[0]
    return {
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "python": platform.python_version(),
        "backend": device.platform,
        "device_kind": device.device_kind,
        "device_count": jax.device_count(),
    }


def versions():
    found = {}
    for package in ("lorenza-optax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None  # run from a source tree
    return found
