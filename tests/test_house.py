"""The rules of the house: formatting, types, layers, private imports, sizes, public names."""

import ast
import pathlib
import shutil
import subprocess
import sys

import pytest

import lorenza_optax

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "lorenza_optax"

# Lower folders first, and in each its lower modules: each may import those before it only.
LAYERS = [
    ("_base", ["checks", "mesh", "noise", "paths", "tables", "calls"]),
    ("_linalg", ["stacks", "decompositions", "newton_schulz"]),
    ("_plan", ["matrix_view", "selection", "plan"]),
    ("_factored", ["weight", "shapes", "rules", "interpreter", "traced", "landscape"]),
    ("_subspace", ["subspace", "refresh", "sketch"]),
    ("_inner", ["quantized", "inner", "rules", "transport"]),
    ("_residual", ["residual", "full_rank", "eigenbasis", "proj_factor"]),
    ("_ascent", ["directions", "probes", "ascent", "gradient", "surroundings"]),
    ("_low_rank", [
        *("config", "state", "fit", "renewal", "widening", "inner_step", "random_subspace"),
        *("partial_refresh", "step", "in_update", "update", "zeroth_order", "low_rank"),
        *("arguments", "compose"),
    ]),
    ("_weight_norm", ["weight_norm", "weight_normalized"]),
    ("_layerwise", ["layers", "layer_stacks", "layerwise"]),
    ("", ["_lorenza", "_lorenza_plus"]),
    ("_perturbation", ["zo_sam", "find", "perturbed", "momentum_sam"]),
    ("_training", [
        "refresh_apart", "subspace_gradients", "diagnostics", "shardings", "check_state",
    ]),
    ("_memory", ["model_shapes", "memory_of", "report"]),
    ("", ["memory", "__init__", "_flax_layers", "flax"]),
]  # fmt: skip
MODULES = [f"{folder}.{name}".strip(".") for folder, names in LAYERS for name in names]


# Files of methods/ that build on others of methods/.
METHODS_THAT_USE = {"_lozo_m": ["_lozo"]}


def _imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def _name(path):
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def _own_imports(path):
    """The modules of this package that a file imports, by their names below it."""
    names = [m.split(".", 1)[1:] for m in _imports(path) if m.split(".")[0] == "lorenza_optax"]
    return {name[0] if name else "" for name in names}


def test_imports_point_down():
    files = {_name(path): path for path in PACKAGE.rglob("*.py") if path.parent.name != "methods"}
    folders = {f"{folder}.__init__" for folder, _ in LAYERS if folder}
    assert set(files) - folders == set(MODULES)
    for name, path in files.items():
        own = _own_imports(path)
        if name in folders:
            assert not own, f"{name} imports {own}"
        elif name != "__init__":
            above = own - set(MODULES[: MODULES.index(name)])
            assert not above, f"{name} imports {above}"


def test_methods_build_on_the_layers_and_stay_short():
    below = set(MODULES[: MODULES.index("_perturbation.zo_sam") + 1])
    for path in (PACKAGE / "methods").glob("*.py"):
        own = _own_imports(path)
        if path.stem == "__init__":
            assert all(name.startswith("methods.") for name in own)
            continue
        allowed = below | {f"methods.{name}" for name in METHODS_THAT_USE.get(path.stem, ())}
        assert own <= allowed, f"{path}: {own - allowed}"
        assert len(path.read_text().splitlines()) <= 120, path


def test_no_private_imports_and_flax_in_its_own_files():
    for path in PACKAGE.rglob("*.py"):
        for module in _imports(path):
            assert not module.startswith(("optax._src", "jax._src")), f"{path}: {module}"
            about_flax = path.stem in ("flax", "_flax_layers")
            assert about_flax or not module.startswith("flax"), f"{path}: {module}"


def test_files_stay_short():
    for folder in ("lorenza_optax", "examples", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            assert len(path.read_text().splitlines()) <= 300, path


def test_public_names_have_docstrings_with_examples():
    for module, name in [(m, n) for m in (lorenza_optax, lorenza_optax.methods) for n in m.__all__]:
        documented = getattr(module, name)
        if callable(documented) and name[0].islower():
            for section in ("Args:", "Returns:", "Raises:", "Examples:"):
                assert section in documented.__doc__, f"{name} lacks {section}"


def _tool(name):
    beside = pathlib.Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        pytest.fail(f"{name} is not installed: pip install '.[test]'")
    return found


@pytest.mark.parametrize("arguments", [("format", "--check"), ("check",)], ids=" ".join)
def test_ruff(arguments):
    done = subprocess.run(
        [_tool("ruff"), *arguments, "."], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_pyright():
    done = subprocess.run(
        [_tool("pyright"), "--pythonpath", sys.executable],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
