"""What a step of LORENZA costs beside AdamW's, GaLore's and SAM's: time, memory, bytes sent.

    python benchmarks/step_cost.py              # some minutes on two cores
    python benchmarks/step_cost.py --quick      # tiny sizes: does it run?

All optimizers run in one process, in turns, the whole step compiled with donated state. The
sections: A the ascents, B a step without perturbation, C a scanned stack of layers, D eight
simulated devices, data parallel; and E, always, the check that what is timed is right. Writes
benchmarks/results/step_cost.json and .png; a partial run writes only where --out says.
"""

import argparse
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
import time
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT.parent / "examples"))

import jax  # noqa: E402
import matplotlib  # noqa: E402
import numpy as np  # noqa: E402
import rich.console  # noqa: E402
import rich.table  # noqa: E402

matplotlib.use("Agg")  # files only, no window

from matplotlib import pyplot  # noqa: E402

import lorenza_optax  # noqa: E402
import machine  # noqa: E402
import programs  # noqa: E402
import step_check  # noqa: E402
from programs import Shape  # noqa: E402
