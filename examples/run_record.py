"""What a run was asked for: numbers among its options, and `run.json`, which a resume must match.

No JAX here: the launcher of several processes keeps a record too, and has none.
"""

import argparse
import json
from typing import NamedTuple

# What a resumed run may change; everything else would change its result.
FREE_ON_RESUME = {"optimizer", "out", "resume", "checkpoint_every", "eval_every"}


class Data(NamedTuple):
    """What a run was started with beside its arguments."""

    kind: str
    description: str
    fingerprint: str


def positive(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def recorded(arguments):
    return json.loads(json.dumps(vars(arguments), default=str))


def read(out):
    """The record of the run in a folder; empty if there is none."""
    record = out / "run.json"
    return json.loads(record.read_text()) if record.exists() else {}


def write(arguments, **fingerprints):
    """Records a run in its folder; of several processes, let one do it."""
    write_json(arguments.out / "run.json", {"arguments": recorded(arguments), **fingerprints})


def write_json(path, content):
    path.write_text(json.dumps(content, indent=2) + "\n")


def check(arguments, free=FREE_ON_RESUME):
    """Refuses a run folder that cannot be used; changes nothing."""
    out, record = arguments.out, read(arguments.out)
    if out.exists() and not out.is_dir():
        raise SystemExit(f"--out {out}: this is a file. Give a folder.")
    if not arguments.resume:
        if out.exists() and any(out.iterdir()) and not record:
            raise SystemExit(
                f"--out {out}: the folder is not empty, and what is in it is not a run of this "
                "program. Give a new folder."
            )
        return
    if not record:
        raise SystemExit(
            f"--resume: there is no run in {out}. Start one without --resume, or name its "
            "folder with --out."
        )
    earlier = record["arguments"]
    differing = [
        f"--{name.replace('_', '-')} {earlier.get(name)} (now {value})"
        for name, value in recorded(arguments).items()
        if name not in free and earlier.get(name) != value
    ]
    if differing:
        raise SystemExit(
            f"--resume: the run in {out} was started with {', '.join(differing)}. Resume it "
            "with the same arguments, or start a new run in another folder with --out."
        )


def check_data(out, data):
    """Refuses to resume a run with other data."""
    if read(out)[data.kind] != data.fingerprint:
        raise SystemExit(
            f"--resume: the {data.kind} ({data.description}) is not what the run in {out} was "
            "started with. Restore it, or start a new run in another folder with --out."
        )
