"""One choice of LORENZA's changed at a time: what each is worth, and which default it led to.

Each variant is the tuned run of another experiment with one change: pre-training the smaller Llama
on Python's standard library, and fine-tuning on SST-2 and STS-B, on a CPU with 256 examples. Seeds
and data are those of the unchanged runs, so differences are paired. The learning rates stay as they
were tuned for the unchanged method, which favours it.
"""

from benchmarks.ablations.plan import cells
from benchmarks.ablations.report import again, report
from benchmarks.ablations.training import run

__all__ = ["again", "cells", "report", "run"]
