"""What the report is made of: results by what they are of, and names."""

NAMES = {
    "adamw": "AdamW",
    "sam": "SAM",
    "galore": "GaLore (Optax)",
    "rho=0": "LORENZA, ρ = 0",
    "zo": "LORENZA, zo",
    "zo, q=1": "LORENZA, zo",
    "zo, q=4": "LORENZA, zo, q = 4",
    "subspace": "LORENZA, subspace",
    "momentum": "LORENZA, momentum",
}
PLACES = {"replicated": "replicated", "fsdp": "fully sharded (FSDP)"}  # of parameters


def name_of(optimizer):
    return NAMES.get(optimizer, optimizer)


class Found:
    """Results by what they are of."""

    def __init__(self, cells, records):
        self.cells = {cell["id"]: cell for cell in cells}
        kinds = {"flops": {}, "compile": {}, "time": {}, "devices": {}}
        for cell in cells:
            if cell["id"] not in records:
                continue
            result, axis, point = records[cell["id"]]["result"], cell["axis"], cell["point"]
            kind = kinds[cell["kind"]]
            if cell["kind"] == "devices":
                kind[axis, cell["shape"][2], cell["devices"]] = result
            elif cell["kind"] == "compile":
                kind.setdefault(axis, {}).setdefault(cell["optimizer"], {})[point] = result
            elif cell["kind"] == "flops":
                kind[axis, point] = result, cell["shape"]
            else:
                optimizers = {n: undisturbed(one, cell) for n, one in result["optimizers"].items()}
                kind[axis, point] = optimizers, cell["shape"]
        self.flops, self.programs = kinds["flops"], kinds["compile"]
        self.times, self.devices = kinds["time"], kinds["devices"]

    def points(self, kind, axis):
        """{point: {name: result}}; that of all numbers of probes is taken apart into theirs."""
        at = {point: found for (a, point), (found, _) in kind.items() if a == axis}
        if axis == "probes" and at:
            (all_of_them,) = at.values()
            counts = {int(n.rpartition("=")[2]): n for n in all_of_them if n != "adamw"}
            return {
                count: {"adamw": all_of_them["adamw"], "zo": all_of_them[name]}
                for count, name in counts.items()
            }
        return at

    def strong_and_weak(self, placement):
        """({devices: result} of one batch for all, {devices: result} of one for each)."""
        here = {(b, n): found for (p, b, n), found in self.devices.items() if p == placement}
        if not here:
            return {}, {}
        largest = max(b for b, _ in here)
        share = min(b // n for b, n in here)
        strong = {n: found for (b, n), found in here.items() if b == largest}
        weak = {n: found for (b, n), found in here.items() if b == n * share}
        return dict(sorted(strong.items())), dict(sorted(weak.items()))


def undisturbed(result, cell):
    """Without the steps of rounds in which others refresh: what runs after a refresh is slower."""
    seconds = result["seconds"]
    return {**result, "seconds": seconds[: len(seconds) - cell["refresh_rounds"]]}


def making(program):
    """CPU seconds to trace and compile it."""
    return program["trace_seconds"] + program["compile_seconds"]
