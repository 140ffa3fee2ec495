"""Prints what XLA plans for a cell's step on a GPU; `deviceless.in_child` starts it.

    python -m benchmarks.memory.child '{"target": "NVIDIA H100 80GB HBM3", ...}'

The environment says where CUDA's compiler is.
"""

import json
import sys

from benchmarks.memory.steps import measured

if __name__ == "__main__":
    print(json.dumps(measured(json.loads(sys.argv[1]))))
