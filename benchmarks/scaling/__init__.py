"""Speed and scale: how time, work, programs and messages grow with the model and the devices.

Four kinds of cells. "flops" counts those of a step of several optimizers, and "devices" what
devices send each other in one: both come out the same each time. "compile" is the size of one
optimizer's program and the CPU seconds to make it, "time" a race of several in one process.
"""

from benchmarks.scaling.findings import again
from benchmarks.scaling.plan import cells
from benchmarks.scaling.report import report
from benchmarks.scaling.steps import run

__all__ = ["again", "cells", "report", "run"]
