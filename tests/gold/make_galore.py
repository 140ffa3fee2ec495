"""Gold values of GaLore: what galore-torch, its authors' package, makes of a small problem.

    pip install torch && pip install --no-deps galore-torch
    python -m tests.gold.make_galore

writes galore_torch.json beside this file. Nothing here but `main` needs PyTorch, so that tests can
import the problem: START, the weights; batch(t), the data of update t; gradients(params, t).

The singular vectors of an SVD are open in sign, galore-torch takes LAPACK's signs as they come, and
moments that cross a refresh depend on them. The file therefore holds each refresh's projectors, and
the problem is one where no sign turns (P_new^T P_old has a positive diagonal), so that an
implementation that aligns signs gives the same values as one that does not; `main` checks it.
"""

import importlib.metadata
import itertools
import json
import pathlib
import sys
import types

import numpy as np

PATH = pathlib.Path(__file__).with_name("galore_torch.json")
SETTINGS = {
    "rank": 3,
    "update_proj_gap": 4,
    "scale": 0.25,
    "learning_rate": 0.01,
    "b1": 0.9,
    "b2": 0.999,
    "weight_decay": 0.0,
    "steps": 9,
}
# galore-torch's default, and one so small that it does not matter where eps is added.
EPSILONS = (1e-6, 1e-12)
SEED, SAMPLES = 10, 160
_SHAPES = {"wide": (8, 14), "tall": (15, 6), "bias": (14,)}
_RNG = np.random.default_rng(SEED)
START = {name: 0.3 * _RNG.standard_normal(shape) for name, shape in _SHAPES.items()}
_TRUTH = {name: 0.3 * _RNG.standard_normal(shape) for name, shape in _SHAPES.items()}


def batch(t):
    """Inputs and targets of both layers at update t: x (160, m), y (160, n), float64."""
    rng, data = np.random.default_rng((SEED, t)), {}
    for name in ("wide", "tall"):
        m = _SHAPES[name][0]
        # Columns of different size, so that singular values are well apart.
        x = rng.standard_normal((SAMPLES, m)) * np.geomspace(2.0, 0.1, m)
        data[name] = x, np.tanh(x @ _TRUTH[name] + (_TRUTH["bias"] if name == "wide" else 0.0))
    return data


def loss(params, t):
    """mean (tanh(x W + b) - y)^2 of "wide" and "bias", plus mean (tanh(x W) - y)^2 of "tall"."""
    return sum(np.mean(_errors(params, t)[name][1] ** 2) for name in ("wide", "tall"))


def gradients(params, t):
    """The gradient of `loss`, by hand."""
    result = {}
    for name, (x, error, output) in _errors(params, t).items():
        back = 2 * error * (1 - output**2) / error.size
        result[name] = x.T @ back
        if name == "wide":
            result["bias"] = back.sum(axis=0)
    return result


def _errors(params, t):
    result = {}
    for name, (x, y) in batch(t).items():
        output = np.tanh(x @ params[name] + (params["bias"] if name == "wide" else 0.0))
        result[name] = x, output - y, output
    return result


def _import_galore():
    """galore_torch, without the two packages that it imports and that nothing here runs."""
    for name, attribute in {
        "transformers.utils.versions": "require_version",
        "bitsandbytes.optim.optimizer": "Optimizer2State",
    }.items():
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            module = types.ModuleType(".".join(parts[:end]))
            sys.modules[module.__name__] = module
        setattr(sys.modules[name], attribute, type(attribute, (), {"__init__": lambda *_: None}))
    import galore_torch

    return galore_torch


def _run(eps):
    import torch

    weights = {k: torch.nn.Parameter(torch.from_numpy(x.copy())) for k, x in START.items()}
    matrices = {
        "params": [weights["wide"], weights["tall"]],
        "rank": SETTINGS["rank"],
        "update_proj_gap": SETTINGS["update_proj_gap"],
        "scale": SETTINGS["scale"],
        "proj_type": "std",
    }
    optimizer = _import_galore().GaLoreAdamW(
        [matrices, {"params": [weights["bias"]]}],
        lr=SETTINGS["learning_rate"],
        betas=(SETTINGS["b1"], SETTINGS["b2"]),
        eps=eps,
        weight_decay=SETTINGS["weight_decay"],
        no_deprecation_warning=True,
    )
    params, projectors = {k: [] for k in weights}, {"wide": [], "tall": []}
    for t in range(SETTINGS["steps"]):
        now = {k: x.detach().numpy().copy() for k, x in weights.items()}
        for k, gradient in gradients(now, t).items():
            weights[k].grad = torch.from_numpy(gradient)
        optimizer.step()
        for k, values in params.items():
            values.append(weights[k].detach().numpy().copy())
        if t % SETTINGS["update_proj_gap"] == 0:
            for k, kept in projectors.items():
                matrix = optimizer.state[weights[k]]["projector"].ortho_matrix.numpy().copy()
                kept.append(matrix.T if k == "tall" else matrix)  # (k, r), as P in the references
    for kept in projectors.values():
        for old, new in itertools.pairwise(kept):
            overlap = np.diag(new.T @ old)
            if overlap.min() < 0.5:
                raise SystemExit(f"a singular vector turned, {overlap}: choose another SEED")
    return {"eps": eps, "params": _rounded(params), "projectors": _rounded(projectors)}


def _rounded(tree):
    return {k: np.round(np.stack(values), 9).tolist() for k, values in tree.items()}


def main():
    versions = {k: importlib.metadata.version(k) for k in ("galore-torch", "torch", "numpy")}
    gold = {"versions": versions, "settings": SETTINGS, "runs": [_run(eps) for eps in EPSILONS]}
    PATH.write_text(json.dumps(gold, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
