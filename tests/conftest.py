"""Flags for every test, set before jax starts."""

import os
from importlib import metadata

# The older emitters compile 2.5 times as fast. XLA stops at a flag that it does not know, and
# this one is sure to be known to the version that it was measured with.
older_emitters = metadata.version("jaxlib").startswith("0.10.")

os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",  # meshes
        # Tests compile hundreds of small programs and run each a few times: without LLVM's
        # optimizations they compile about ten times faster.
        "--xla_backend_optimization_level=0",
        "--xla_cpu_use_fusion_emitters=false" * older_emitters,
    ]
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
