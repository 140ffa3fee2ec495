"""What the training programs' command lines have in common: options, and how a run is stopped."""

import pathlib
import shlex
import signal
import sys

import optimizers
import reporting
import run_record
import training


def add_common(parser, out, checkpoint_every, eval_every):
    add, positive = parser.add_argument, run_record.positive
    add("--optimizer", nargs="+", default=["lorenza", "adamw"], metavar="NAME",
        help=f"one or more of {', '.join(optimizers.OPTIMIZERS)}")  # fmt: skip
    add("--lr", "--learning-rate", type=float, metavar="LR",
        help="peak learning rate of every optimizer (default: each its own)")  # fmt: skip
    add("--rho", type=float, default=0.05, help="radius of the sharpness-aware perturbation")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights")
    add("--seed", type=int, default=0)
    add("--out", type=pathlib.Path, default=pathlib.Path(out), help="run folder")
    add("--checkpoint-every", type=positive, default=checkpoint_every,
        help="steps between checkpoints")  # fmt: skip
    add("--eval-every", type=positive, default=eval_every, help="steps between validations")
    add("--resume", action="store_true", help="go on from the latest checkpoints in --out")


def check_common(parser, arguments):
    names = [name for item in arguments.optimizer for name in item.split(",") if name]
    unknown = [name for name in names if name not in optimizers.OPTIMIZERS]
    if unknown or not names:
        parser.error(
            f"--optimizer: {', '.join(unknown) or 'nothing'} is not known; "
            f"choose from {', '.join(optimizers.OPTIMIZERS)}"
        )
    arguments.optimizer = list(dict.fromkeys(names))
    if arguments.seed < 0:
        parser.error("--seed: must not be negative")


def run(parse_arguments, program, argv=None):
    """Calls program(arguments, display). Returns the exit status: 0, or 130 if interrupted."""
    argv = sys.argv[1:] if argv is None else list(argv)
    arguments = parse_arguments(argv)
    display = reporting.Display()
    # Until training installs its own handling, a request to stop is an exception.
    earlier = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        program(arguments, display)
    except training.Interrupted as stopped:
        again = argv if "--resume" in argv else [*argv, "--resume"]
        display.note(
            f"Interrupted; saved after step {stopped.step}. Go on with\n"
            f"  python {shlex.quote(sys.argv[0])} {shlex.join(again)}"
        )
        return 130
    except KeyboardInterrupt:
        display.stop()
        display.note("Interrupted. Saved checkpoints, if there are any, go on with --resume.")
        return 130
    finally:
        display.stop()
        signal.signal(signal.SIGTERM, earlier)
    return 0
