"""Flags for every test, set before jax starts."""

import os

os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",  # meshes
        # Tests compile hundreds of small programs and run each a few times: without LLVM's
        # optimizations they compile about ten times faster.
        "--xla_backend_optimization_level=0",
    ]
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
