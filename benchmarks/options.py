"""What the command lines have in common."""

import argparse
import os
import pathlib

from benchmarks import experiments


def parser_of(module, documentation, **settings):
    """For `python -m benchmarks.<module>`; it is described by the first line of its docstring."""
    return argparse.ArgumentParser(
        prog=f"python -m benchmarks.{module}",
        description=documentation.partition("\n")[0],
        **settings,
    )


def for_cells(module, documentation):
    """The parser of a command that runs cells, with what it needs to know for that."""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = parser_of(module, documentation, formatter_class=formatter)
    add = parser.add_argument
    add("--size", choices=experiments.SIZES, default="cpu", help="full is for a GPU")
    add("--data-dir", metavar="FOLDER",
        help=f"where the data are (default: the environment's {experiments.DATA_DIR})")  # fmt: skip
    add("--out", type=pathlib.Path, default=experiments.RESULTS, help="holds NAME/")
    return parser


def set_folders(arguments):
    """In the environment, where the experiments look for them."""
    if arguments.data_dir:
        os.environ[experiments.DATA_DIR] = arguments.data_dir
    os.environ[experiments.RESULTS_DIR] = str(arguments.out)
