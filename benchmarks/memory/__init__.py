"""What training takes at the shapes of Llamas of 60M to 7B: counted, and of the compiled step.

Weights, gradients and optimizer state are counted from shapes, to the byte. The whole step, with
weights and state donated and updates applied, is compiled from shapes alone, and XLA says what it
holds besides. Cells with steps also run: what they allocate is compared with the count, and a GPU
tells the peak of its allocator.
"""

from benchmarks.memory.findings import again
from benchmarks.memory.plan import cells
from benchmarks.memory.report import report
from benchmarks.memory.steps import run

__all__ = ["again", "cells", "report", "run"]
