"""A step compiled for a GPU that is not there: what XLA plans to hold on it.

It takes a process of its own, child.py, that knows CUDA's compiler and sees no GPU:

    pip install -e '.[bench,deviceless]'

Nothing can be tried out without a GPU, so XLA chooses kernels by rule (autotuning is off), and
nothing runs. The AdamW step of 7B was compiled on an H100, too, and run: what the allocator gave
out was 0.4 % more than is planned here.
"""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

from benchmarks import experiments

H100 = "NVIDIA H100 80GB HBM3"
# What XLA asks of a device, with the figures of its own description of the H100 (SXM), but for the
# memory: more than it has, so that no step is made to fit by computing things twice.
DEVICE = f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 150000000000
  shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: 9 }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 12 minor: 9 patch: 0 }}
device_description_str: "{H100}"
"""


def compiler():
    """The folder of CUDA's compiler, if all is there that compiling for a GPU takes."""
    try:
        found = importlib.util.find_spec("nvidia.cuda_nvcc")
        plugin = importlib.util.find_spec("jax_plugins.xla_cuda12")
    except ModuleNotFoundError:
        return None
    return pathlib.Path(found.submodule_search_locations[0]) if found and plugin else None


def in_child(cell):
    """The result of `steps.measured` in a process that compiles for the cell's target."""
    folder = compiler()
    if folder is None:
        raise RuntimeError(
            "Compiling for a GPU takes its compiler: pip install -e '.[bench,deviceless]'"
        )
    flags = (
        os.environ.get("XLA_FLAGS", ""),
        "--xla_gpu_autotune_level=0",
        f"--xla_gpu_cuda_data_dir={folder}",
    )
    changed = {
        "XLA_FLAGS": " ".join(flags).strip(),
        "PATH": os.pathsep.join([str(folder / "bin"), os.environ.get("PATH", "")]),
        "JAX_PLATFORMS": "",
        "CUDA_VISIBLE_DEVICES": "-1",
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",  # of libraries that only running needs
    }
    child = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory.child", json.dumps(cell)],
        cwd=experiments.ROOT.parent,
        env=os.environ | changed,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(child.stdout.splitlines()[-1])


def sharding():
    """Of arrays on one such GPU."""
    import jax
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(
        H100, platform="cuda", target_config=DEVICE, topology="1x1x1"
    )
    mesh = topologies.make_mesh(topology, (1,), ("device",))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
