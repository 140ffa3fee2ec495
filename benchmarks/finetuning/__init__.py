"""Fine-tuning MiniLM-L6 on four tasks of GLUE: does a method generalize better?

Each method is tuned on a draw of n examples and scored on others of the train set, its best half of
trials on a second draw too; at the best of these it is then trained on other draws, one for each
seed, and scored on the development set. Of one seed all methods see the same examples in the same
order from the same head. With all examples (the full size) three rates round that choice are tried,
and draws differ in order and head alone.
"""

from benchmarks.finetuning.plan import cells
from benchmarks.finetuning.report import again, report
from benchmarks.finetuning.training import run

__all__ = ["again", "cells", "report", "run"]
