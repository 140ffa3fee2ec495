"""Prints what the devices of a cell send each other; `devices.in_child` starts it.

    python -m benchmarks.scaling.child '{"devices": 2, "placement": "fsdp", ...}'

XLA_FLAGS in the environment say how many devices it has.
"""

import json
import sys

from benchmarks.scaling.devices import measure

if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
