"""Pre-training two small Llamas on two texts: loss against tokens, time and optimizer state.

Each method is tuned on each model, on Python's standard library and a part of the train set; the
rates found are those of all its other runs of that model. Of one seed all methods see the same
batches from the same initial weights. Sweeps over the rank and over T, of LORENZA and of GaLore.
"""

from benchmarks.pretraining.plan import cells
from benchmarks.pretraining.report import again, report
from benchmarks.pretraining.training import run

__all__ = ["again", "cells", "report", "run"]
