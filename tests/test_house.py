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

# Lower modules first: each may import those before it only.
LAYERS = [
    "_checks",
    "_mesh",
    "_noise",
    "_stacks",
    "_linalg",
    "_newton_schulz",
    "_matrix_view",
    "_paths",
    "_tables",
    "_calls",
    "_selection",
    "_plan",
    "_factored",
    "_factored_shapes",
    "_factored_rules",
    "_interpreter",
    "_traced",
    "_landscape",
    "_subspace",
    "_refresh",
    "_quantized",
    "_inner",
    "_inner_rules",
    "_transport",
    "_residual",
    "_full_rank",
    "_eigenbasis",
    "_proj_factor",
    "_directions",
    "_probes",
    "_ascent",
    "_config",
    "_gradient",
    "_sketch",
    "_state",
    "_fit",
    "_renewal",
    "_random_subspace",
    "_some",
    "_step",
    "_surroundings",
    "_in_update",
    "_update",
    "_zeroth_order",
    "_low_rank",
    "_arguments",
    "_compose",
    "_weight_norm",
    "_weight_normalized",
    "_layers",
    "_layer_stacks",
    "_layerwise",
    "_lorenza",
    "_lorenza_plus",
    "_zo_sam",
    "_find",
    "_perturbed",
    "_diagnostics",
    "_shardings",
    "_check_state",
    "_momentum_sam",
    "_refresh_apart",
    "_subspace_gradients",
    "_model_shapes",
    "_memory_of",
    "_memory_report",
    "memory",
    "__init__",
    "_flax_layers",
    "flax",
]


# Files of methods/ that build on others of methods/.
METHODS_THAT_USE = {"_lozo_m": ["_lozo"]}


def _imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def test_imports_point_down():
    modules = {path.stem: path for path in PACKAGE.glob("*.py")}
    assert set(modules) == set(LAYERS)
    for name, path in modules.items():
        below = LAYERS[: LAYERS.index(name)]
        own = {m.split(".")[1] for m in _imports(path) if m.startswith("lorenza_optax.")}
        assert own <= set(below), f"{name} imports {own - set(below)}"


def test_methods_build_on_the_layers_and_stay_short():
    for path in (PACKAGE / "methods").glob("*.py"):
        parts = [m.split(".")[1:] for m in _imports(path) if m.split(".")[0] == "lorenza_optax"]
        assert all(parts), f"{path} imports lorenza_optax itself"
        if path.stem == "__init__":
            assert all(names[0] == "methods" for names in parts)
            continue
        allowed = {(layer,) for layer in LAYERS[: LAYERS.index("_zo_sam") + 1]}
        allowed |= {("methods", name) for name in METHODS_THAT_USE.get(path.stem, ())}
        assert set(map(tuple, parts)) <= allowed, f"{path}: {set(map(tuple, parts)) - allowed}"
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
