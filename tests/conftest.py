"""Flags for every test, set before jax starts."""

import os
from importlib import metadata

import pytest

# The older emitters compile 2.5 times as fast, and whole programs a tenth faster than parts. XLA
# stops at a flag that it does not know, and these are sure to be known to the version that they
# were measured with.
QUICK = ("--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1")

os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",  # meshes
        # Tests compile hundreds of small programs and run each a few times: without LLVM's
        # optimizations they compile about ten times faster.
        "--xla_backend_optimization_level=0",
        *(QUICK if metadata.version("jaxlib").startswith("0.10.") else ()),
    ]
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")


@pytest.fixture
def compile_quickly(tmp_path_factory):
    """For tests whose time is nearly all compilation: optimize little, and each program once."""
    changed = {
        "jax_compilation_cache_dir": str(tmp_path_factory.getbasetemp() / "xla"),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_disable_most_optimizations": True,
    }
    import jax  # not before the flags above are set

    before = {name: jax.config.values[name] for name in changed}
    for name, value in changed.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
