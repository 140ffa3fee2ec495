"""How flat the minima are that fine-tuning and pre-training end in: curvature and worst rise.

A cell takes the hyperparameters of a final run of `finetuning` or `pretraining` from its record,
trains the model anew, since no weights are stored, sees whether it is the same, and measures the
loss about it on some of its training examples and on as many held-out ones, the same for all
methods of one seed.
"""

from benchmarks.flatness.models import run
from benchmarks.flatness.plan import cells
from benchmarks.flatness.report import again, report

__all__ = ["again", "cells", "report", "run"]
