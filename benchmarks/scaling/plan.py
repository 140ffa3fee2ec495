"""The cells of scaling: the points of each axis, and the optimizers that are measured there."""

from typing import NamedTuple

from benchmarks.programs import Shape
from benchmarks.scaling.devices import PLACEMENTS
from benchmarks.scaling.steps import PROBES

GROWERS = ("adamw", "rho=0", "zo, q=1")
RACERS = ("adamw", "sam", "galore", "rho=0", "zo, q=1", "zo, q=4", "subspace", "momentum")
SENDERS = ("adamw", "sam", "galore", "rho=0", "zo, q=1", "subspace")


class Size(NamedTuple):
    """The points of each axis; the shape gives what does not grow."""

    races: tuple
    unrolled: tuple  # layers, to compile
    unrolled_counted: tuple
    unrolled_timed: tuple  # those that compile in a minute
    scanned: tuple
    layers_of: Shape
    widths: tuple
    ranks: tuple
    probes: tuple
    wide: Shape  # for width, rank and probes
    devices: tuple
    sharded: Shape  # its batch is the strong one
    batch_per_device: int  # the weak one
    rounds: int
    refresh_rounds: int
    svd_width: int  # up to which Optax's GaLore is timed: its exact SVDs are not waited for beyond


SIZES = {
    "cpu": Size(
        races=(Shape(128, 2, 4, 64, 16), Shape(256, 2, 4, 128, 32), Shape(512, 2, 4, 128, 64)),
        unrolled=(4, 12, 32, 96),
        unrolled_counted=(4, 12, 32),
        unrolled_timed=(2, 4, 8),
        scanned=(4, 12, 32, 96),
        layers_of=Shape(64, 0, 2, 32, 8),
        widths=(128, 256, 512, 1024),
        ranks=(8, 32, 128, 256),
        probes=(1, 2, 4, 8, 16),
        wide=Shape(512, 2, 2, 128, 32),
        devices=(2, 4, 8),
        sharded=Shape(256, 1, 16, 32, 32),
        batch_per_device=2,
        rounds=15,
        refresh_rounds=4,
        svd_width=1024,
    ),
    "full": Size(
        races=(Shape(1024, 4, 16, 512, 128), Shape(2048, 4, 16, 512, 256)),
        unrolled=(4, 12, 32, 96),
        unrolled_counted=(4, 12, 32, 96),
        unrolled_timed=(4, 8, 16, 32),
        scanned=(4, 12, 32, 96),
        layers_of=Shape(1024, 0, 8, 256, 128),
        widths=(512, 1024, 2048, 4096),
        ranks=(32, 128, 512, 1024),
        probes=(1, 2, 4, 8, 16),
        wide=Shape(2048, 2, 8, 512, 128),
        devices=(2, 4, 8),
        sharded=Shape(1024, 2, 16, 128, 128),
        batch_per_device=2,
        rounds=30,
        refresh_rounds=2,
        svd_width=1024,
    ),
}


def cells(size):
    """In the order of what they are worth for their time; what is timed comes last."""
    plan, made = SIZES[size], []
    for axis, point, shape, names in _counted(plan):
        made.append(_cell(size, "flops", axis, point, shape, names=names))
    # Cells of the same batch serve as strong and as weak.
    split = [(n, plan.sharded.batch) for n in plan.devices]
    split += [(n, n * plan.batch_per_device) for n in plan.devices]
    for placement in PLACEMENTS:
        for devices, batch in dict.fromkeys(split):
            settings = {"devices": devices, "placement": placement, "names": SENDERS}
            shape, point = plan.sharded._replace(batch=batch), f"{devices}-batch{batch}"
            made.append(_cell(size, "devices", placement, point, shape, **settings))
    for axis, point, shape, names in _compiled(plan):
        for name in names:
            made.append(_cell(size, "compile", axis, point, shape, optimizer=name))
    rounds = {"rounds": plan.rounds, "refresh_rounds": plan.refresh_rounds}
    for axis, point, shape, names in _timed(plan):
        made.append(_cell(size, "time", axis, point, shape, names=names, **rounds))
    return made


# Points of the axes: (axis, point, shape, names of the optimizers).


def _counted(plan):
    return [
        *(("race", shape.width, shape, RACERS) for shape in plan.races),
        *_unrolled(plan, plan.unrolled_counted),
        *((*row, SENDERS) for row in _widths(plan)),
        *((*row, GROWERS) for row in _ranks(plan)),
        _probes(plan),
    ]


def _compiled(plan):
    """Along axes where little grows, the ends will do."""
    widths, ranks, scanned = _widths(plan), _ranks(plan), _scanned(plan)
    return [
        *_unrolled(plan, plan.unrolled[:-1]),
        *(scanned[0], scanned[-1]),
        *((*row, GROWERS) for row in (widths[0], widths[-1])),
        *((*row, GROWERS[1:]) for row in (ranks[0], ranks[-1])),
        *(("probes", n, plan.wide, (PROBES[n],)) for n in (plan.probes[0], plan.probes[-1])),
        *_unrolled(plan, plan.unrolled[-1:]),
    ]


def _timed(plan):
    def racers(shape):
        return tuple(n for n in RACERS if n != "galore" or shape.width <= plan.svd_width)

    return [
        *(("race", shape.width, shape, racers(shape)) for shape in plan.races),
        *_unrolled(plan, plan.unrolled_timed),
        *_scanned(plan),
        *((*row, GROWERS) for row in _widths(plan)),
        *((*row, GROWERS) for row in _ranks(plan)),
        _probes(plan),
    ]


def _unrolled(plan, counts):
    return [("unrolled", n, plan.layers_of._replace(layers=n), GROWERS) for n in counts]


def _scanned(plan):
    shape = plan.layers_of._replace(scanned=True)
    return [("scanned", n, shape._replace(layers=n), GROWERS) for n in plan.scanned]


def _widths(plan):
    return [("width", n, plan.wide._replace(width=n)) for n in plan.widths]


def _ranks(plan):
    return [("rank", n, plan.wide._replace(rank=n)) for n in plan.ranks]


def _probes(plan):
    """All in one cell."""
    return "probes", "all", plan.wide, ("adamw", *(PROBES[n] for n in plan.probes))


def _cell(size, kind, axis, point, shape, **settings):
    name, group = f"{size}-{kind}-{axis}-{point}", f"{size}-{kind}"
    names = settings.get("names", (settings.get("optimizer"),))
    if kind == "compile":
        name += "-" + names[0].replace(", ", "-").replace("=", "")
        group += f"-{names[0]}"
    elif kind == "time":
        group += f"-{axis}"
    # In layers: of a program the rest takes as long to make as three.
    layers = 3 + (1 if shape.scanned else shape.layers)
    return {
        "id": name,
        "kind": kind,
        "axis": axis,
        "point": point,
        "shape": list(shape),
        **{k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()},
        "seed": 0,
        "group": group,
        "work": len(names) * layers,
    }
