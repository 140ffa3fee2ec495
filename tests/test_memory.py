"""The memory report against what is really allocated, to the byte."""

import json
import pathlib
import resource
import subprocess
import sys
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

import lorenza_optax
from lorenza_optax import memory
from lorenza_optax._low_rank import in_update
from lorenza_optax._memory.memory_of import METHODS, tree_bytes
from lorenza_optax._memory.model_shapes import PRESETS, abstract_params, find_model
from lorenza_optax._memory.report import parse_bytes
from lorenza_optax.memory import memory_report, step_memory
from tests import problems

EXAMPLES = pathlib.Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

import llama  # noqa: E402

RANK = 4
ARGUMENTS = {
    "default": {},
    "without-ascent": {"rho": 0.0},
    "bfloat16": {"factor_dtype": "bfloat16", "moment_dtype": "bfloat16"},
    "int8": {"moment_dtype": "int8", "rank": 3},
    "reverse": {"proj_type": "reverse_std", "moment_transport": "rotate"},
    "sketch": {"refresh": "sketch", "ascent": "subspace"},
    "sketch-probes": {"refresh": "sketch", "probe_rank": 2, "scale_probes": True},
    "stagger": {"stagger": True},
    "clipped": {"gradient_transform": optax.clip_by_global_norm(1.0)},
    "subspace": {"ascent": "subspace"},
    "formed": {"factored": False},
    "momentum": {"base_optimizer": optax.trace(0.9), "ascent": "momentum"},
    "selected": {"weight_dimension_numbers": problems.DIMENSION_NUMBERS},
}
QUICK = ("default", "bfloat16", "int8", "sketch", "selected")


def _params(dtype=jnp.float32):
    shapes = {**problems.SHAPES, "long": (4, 1500)}
    return problems.params(dtype=dtype, shapes=shapes)


def _loss(params):
    """Every matrix meets a matrix, as in a network."""
    total = 0.0
    for name, leaf in params.items():
        if leaf.ndim == 1:
            total += jnp.sum(leaf**2)
        elif name == "stacked":
            total += jnp.sum(jnp.einsum("bd,ldf->lbf", jnp.ones((2, leaf.shape[1])), leaf) ** 2)
        else:
            total += jnp.sum(jnp.tensordot(jnp.ones((2, leaf.shape[0])), leaf, 1) ** 2)
    return total


def _allocated(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def _row(method, params, rank=RANK, **arguments):
    (row,) = memory_report(params, rank, methods=[method], **arguments).rows
    return row


@pytest.fixture
def backward_passes(monkeypatch):
    """The sizes of the gradients that backward passes in `update` give."""
    sizes = {"full": set(), "low": set()}

    def spy(kind, function):
        def call(*args):
            value, gradient = function(*args)
            sizes[kind].add(tree_bytes(gradient))
            return value, gradient

        return call

    full, low = in_update.full_gradient, in_update.low_rank_gradient
    monkeypatch.setattr(in_update, "full_gradient", spy("full", full))
    monkeypatch.setattr(in_update, "low_rank_gradient", spy("low", low))
    return sizes


@pytest.mark.filterwarnings("ignore:Leaves of 3 or more", "error:value_fn uses some")
@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *((case, jnp.bfloat16) for case in QUICK),
        *(problems.slow(case, jnp.bfloat16) for case in ARGUMENTS if case not in QUICK),
        problems.slow("default", jnp.float32),
    ],
)
def test_lorenza_keeps_what_the_report_says(case, dtype, backward_passes):
    arguments = {"rank": RANK, **ARGUMENTS[case]}
    params = _params(dtype)
    row = _row("lorenza", params, **arguments)
    tx = lorenza_optax.lorenza(1e-3, **arguments)
    state = tx.init(params)
    assert row.weights == _allocated(params)
    assert row.state == _allocated(state)
    assert row.factors == _allocated((state[0].q, state[0].r, state[0].singular_values))
    arrays = [x for x in jax.tree.leaves((state[0].projected, state[0].others)) if x.ndim]
    assert row.moments == _allocated(arrays)

    jax.eval_shape(lambda: tx.update(None, state, params, value_fn=_loss))
    usual, refreshing = backward_passes["low"], backward_passes["full"]
    if case in ("stagger", "clipped"):  # which take a full gradient at each update
        assert usual == set()
        assert refreshing == {row.gradients} == {row.refresh_gradients} == {_allocated(params)}
        assert row.accumulators == row.gradients
        return
    if case.startswith("sketch"):
        assert refreshing == set()
        assert usual == {row.gradients, row.refresh_gradients}
        assert row.gradients < row.refresh_gradients
    else:
        assert refreshing == {row.refresh_gradients}
        assert usual == {row.gradients}
    value_and_grad = lorenza_optax.subspace_value_and_grad(_loss, **arguments)
    _, grads, _ = jax.eval_shape(lambda: value_and_grad(params, opt_state=state))
    assert row.accumulators == tree_bytes(grads)


@pytest.mark.filterwarnings("ignore:Leaves of 3 or more")
def test_low_rank_gradients_of_a_real_step():
    params = {k: v for k, v in _params().items() if v.ndim < 3}
    tx = lorenza_optax.lorenza(1e-3, RANK)
    value_and_grad = jax.jit(
        lambda p, s: lorenza_optax.subspace_value_and_grad(_loss, rank=RANK)(p, opt_state=s)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, grads, _ = value_and_grad(params, tx.init(params))
    row = _row("lorenza", params)
    assert row.gradients == row.accumulators == _allocated(grads)
    assert row.refresh_gradients == _allocated(jax.jit(jax.grad(_loss))(params))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["adamw", "galore"])
def test_the_rivals_keep_what_the_report_says(method, dtype):
    params = _params(dtype)
    tx = optax.adamw(1e-3) if method == "adamw" else optax.contrib.galore(1e-3, RANK)
    state, row = tx.init(params), _row(method, params)
    assert row.state == _allocated(state)
    assert row.gradients == row.accumulators == _allocated(jax.grad(_loss)(params))
    assert row.weights == _allocated(params)
    if method == "galore":
        assert row.factors == _allocated(state[0].projector)
        # It compresses the longer side: the moments of (15, 6) are (4, 6), of (8, 14) (8, 4).
        shapes = {k: m.shape for k, m in state[0].base_optimizer_state.mu.items()}
        assert (shapes["tall"], shapes["wide"]) == ((4, 6), (8, 4))


@pytest.mark.filterwarnings("ignore:Leaves of 3 or more")
def test_lora_has_adapters_on_the_leaves_that_lorenza_projects():
    params = _params()
    projected = lorenza_optax.projection_plan(params, RANK).projected
    adapters = {
        path: (jnp.zeros((leaf.matrix.m, RANK)), jnp.zeros((RANK, leaf.matrix.n)))
        for path, leaf in projected.items()
    }
    assert set(projected) == {"wide", "tall", "square"}  # "long" has no more rows than the rank
    row = _row("lora", params)
    assert row.weights == _allocated(params) + _allocated(adapters)
    assert row.state == _allocated(optax.adamw(1e-3).init(adapters))
    assert row.gradients == row.accumulators == _allocated(adapters)


def test_totals_and_the_order_of_rows():
    report = memory_report("60M", [16, 64])
    assert [(row.method, row.rank) for row in report.rows] == [
        ("adamw", None), *((name, r) for name in ("galore", "lora", "lorenza") for r in (16, 64)),
    ]  # fmt: skip
    for row in report.rows:
        assert row.total == row.weights + row.state + max(row.gradients, row.refresh_gradients)
    sketched = _row("lorenza", "60M", 64, refresh="sketch")
    assert sketched.total < _row("lorenza", "60M", 64).total < _row("adamw", "60M").total


def test_nothing_is_allocated():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    report = memory_report("7B", 1024, methods=["lorenza", "adamw"], moment_dtype="int8")
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 500_000  # kB, where the weights alone would take 27 GB
    adamw, lorenza = report.rows
    assert report.parameters == 6_738_415_616
    assert adamw.state == 2 * 4 * report.parameters + 4  # and the count
    assert lorenza.state < 0.5 * adamw.state


@pytest.mark.parametrize("preset", problems.few(PRESETS, ("60M", "130M", "7B")))
def test_presets_are_those_of_the_examples(preset):
    _, expected = llama.abstract(llama.PRESETS[preset].model)
    mine = abstract_params(PRESETS[preset])
    as_dict = lambda tree: {  # noqa: E731
        jax.tree_util.keystr(path, simple=True, separator="/"): (leaf.shape, leaf.dtype)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    assert as_dict(mine) == as_dict(expected)


LLAMA = {
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632,
    "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4,
    "torch_dtype": "bfloat16", "tie_word_embeddings": False,
}  # fmt: skip
QWEN2 = {
    "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864,
    "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
    "dtype": "bfloat16", "tie_word_embeddings": True,
}  # fmt: skip
BERT = {
    "model_type": "bert", "vocab_size": 30522, "hidden_size": 384, "intermediate_size": 1536,
    "num_hidden_layers": 6, "num_attention_heads": 12, "max_position_embeddings": 512,
    "type_vocab_size": 2,
}  # fmt: skip
# As published: TinyLlama-1.1B, Qwen2-0.5B, all-MiniLM-L6-v2; the others are counted by hand.
COUNTS = {
    "TinyLlama": (LLAMA, 1_100_048_384, "bfloat16"),
    "Qwen2": (QWEN2, 494_032_768, "bfloat16"),
    "MiniLM": (BERT, 22_713_216, "float32"),
    "biases": (
        {**LLAMA, "attention_bias": True, "mlp_bias": True},
        1_100_048_384 + 22 * (2 * 2048 + 2 * 256 + 2 * 5632 + 2048),
        "bfloat16",
    ),
    "head_dim": (
        {**LLAMA, "head_dim": 128}, 1_100_048_384 + 22 * 2 * 2048 * (2048 + 256), "bfloat16",
    ),
}  # fmt: skip


def _write(folder, config):
    path = folder / "config.json"
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    return path


@pytest.mark.parametrize("name", COUNTS)
def test_configs_have_the_published_number_of_parameters(name, tmp_path):
    config, parameters, dtype = COUNTS[name]
    path = _write(tmp_path, config)
    report = memory_report(path, 16, methods=["adamw"])
    assert report.parameters == parameters
    assert report.rows[0].weights == parameters * jnp.dtype(dtype).itemsize
    as_folder = memory_report(str(tmp_path), 16, methods=["adamw"], dtype="float32")
    assert as_folder.rows[0].weights == 4 * parameters
    # Each published layer's matrices are projected, and no table of embeddings.
    plan = lorenza_optax.projection_plan(abstract_params(find_model(path)), 16)
    matrices = 6 if name == "MiniLM" else 7
    beside = {"MiniLM": {"pooler/kernel"}, "Qwen2": set()}.get(name, {"head/kernel"})
    assert len(plan.projected) == config["num_hidden_layers"] * matrices + len(beside)
    assert beside <= set(plan.projected)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", r"config.json: this is not a readable JSON file \(Expecting"),
        ("[]", "config.json: a config.json holds an object, not a list"),
        ({**LLAMA, "model_type": "mamba"}, "model_type is 'mamba', and known are llama, qwen2"),
        ({**LLAMA, "model_type": ["llama"]}, r"model_type is \['llama'\], and known are"),
        ({**LLAMA, "tie_word_embeddings": "no"}, "'tie_word_embeddings' must be true or false"),
        ({"hidden_size": 8}, "model_type is None"),
        ({k: v for k, v in LLAMA.items() if k != "vocab_size"}, "json: the key 'vocab_size' is mi"),
        ({**BERT, "max_position_embeddings": None}, "key 'max_position_embeddings' is missing"),
        ({**LLAMA, "hidden_size": "2048"}, "'hidden_size' must be a positive integer, got '2048'"),
        ({**LLAMA, "num_hidden_layers": 0}, "'num_hidden_layers' must be a positive integer"),
        ({**LLAMA, "num_attention_heads": 30}, "2048 is no multiple of 'num_attention_heads' 30"),
        ({**LLAMA, "torch_dtype": "int4"}, "dtype 'int4' is none of float32"),
    ],
)
def test_broken_configs(config, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        memory_report(_write(tmp_path, config))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"params": "8B"}, ValueError, "'8B' is neither a preset .60M, 130M, 350M, 1B, 7B. nor"),
        ({"rank": 0}, ValueError, "rank must be at least 1"),
        ({"rank": 4.0}, TypeError, "rank must be an int, got float"),
        ({"rank": "64"}, TypeError, "rank must be an int, got str"),
        ({"rank": True}, TypeError, "rank must be an int, got bool"),
        ({"rank": {"w": 4}}, TypeError, "an int or several of them, .* got dict: ranks by leaf"),
        ({"rank": lambda path, shape: 4}, TypeError, "got function: ranks by leaf"),
        ({"methods": "adam"}, ValueError, "method must be one of .* got 'adam'"),
        ({"methods": ["adam"]}, ValueError, "method must be one of 'adamw', 'galore'"),
        ({"dtype": "int8"}, ValueError, "dtype must be None or one of float32"),
        ({"params": {"w": jnp.ones((8, 8))}, "dtype": "float32"}, ValueError, "has its own"),
        ({"params": {"w": 1.0}}, TypeError, "Leaf 'w' is a float"),
        ({"memory": "24 gigs"}, ValueError, "such as '24GB', got '24 gigs'"),
        ({"memory": 0}, ValueError, "memory must be at least 1"),
        ({"learning": 1}, TypeError, "unexpected keyword argument 'learning'"),
        ({"ascent": "up"}, ValueError, "ascent must be one of"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        memory_report(**{"params": "60M", "rank": 64, **arguments})


def test_one_rank_of_numpy_and_one_method_by_name():
    report = memory_report("60M", np.int64(16), methods="lorenza")
    assert report.rows == memory_report("60M", [16], methods=["lorenza"]).rows
    assert json.dumps(report.as_dict()) == json.dumps(
        memory_report("60M", np.array([16]), methods=["lorenza"]).as_dict()
    )


def test_sizes_of_memory():
    assert parse_bytes("24GB") == 24 * 10**9
    assert parse_bytes("1.5 gib") == 3 * 2**29
    assert parse_bytes("7") == 7


@pytest.mark.parametrize("config", [problems.slow(PRESETS["60M"]), BERT], ids=["60M", "bert"])
def test_the_largest_model_fits_and_one_with_another_layer_does_not(config, tmp_path):
    path, memory = "60M", 1_000_000_000
    if config is BERT:
        path, memory = _write(tmp_path, config), 300_000_000
    report = memory_report(path, 64, memory=memory, moment_dtype="int8")
    deepest = set()
    for row, largest in zip(report.rows, report.largest, strict=True):
        sizes = find_model(path)
        for layers, fits in ((largest.num_layers, True), (largest.num_layers + 1, False)):
            tree = abstract_params(types.SimpleNamespace(**{**vars(sizes), "num_layers": layers}))
            counted = METHODS[row.method](tree, row.rank, {"moment_dtype": "int8"})
            assert (counted.total <= memory) == fits
            if fits:
                assert counted.total == largest.total
                assert sum(np.prod(x.shape) for x in jax.tree.leaves(tree)) == largest.parameters
        deepest.add(largest.num_layers)
    assert len(deepest) == len(report.rows)
    tight = memory_report(path, 64, memory="10MB")
    assert {largest.num_layers for largest in tight.largest} == {0}
    assert "none of this width" in str(tight)


def test_temporaries_of_a_step():
    shapes = {"a": jax.ShapeDtypeStruct((64, 96), jnp.float32)}
    tx = lorenza_optax.lorenza(1e-2, rank=8)
    x = jax.ShapeDtypeStruct((32, 64), jnp.float32)

    def step(params, state, x):
        loss = lambda params, x: jnp.mean(jnp.tanh(x @ params["a"]) ** 2)  # noqa: E731
        updates, state = tx.update(None, state, params, value_fn=loss, x=x)
        return optax.apply_updates(params, updates), state

    state = jax.eval_shape(tx.init, shapes)
    jitted = jax.jit(step, donate_argnums=(0, 1))
    report = memory_report(shapes, 8, step_fn=jitted, step_args=(shapes, state, x))
    assert report.step is not None
    kept = tree_bytes((shapes, state))
    assert report.step.arguments == pytest.approx(kept + tree_bytes(x), rel=0.01)
    assert report.step.temporaries > 0
    assert report.step.aliased >= 0.9 * kept
    assert "The compiled step" in str(report)
    plain = step_memory(step, shapes, state, x)
    assert plain is not None
    assert plain.aliased == 0


def test_a_backend_that_does_not_say():
    silent = types.SimpleNamespace(memory_analysis=lambda: None)
    lowered = types.SimpleNamespace(compile=lambda: silent)
    step = types.SimpleNamespace(lower=lambda *args: lowered)
    assert step_memory(step) is None
    report = memory_report("60M", 64, methods=["adamw"], step_fn=step)
    assert report.step is None
    assert "The compiled step" not in str(report)


def test_command_line(capsys, tmp_path):
    path = _write(tmp_path, BERT)
    memory.main([str(path), "--rank", "16", "--memory", "1GB", "--moment-dtype", "int8", "--json"])
    printed = json.loads(capsys.readouterr().out)
    expected = memory_report(path, 16, memory="1GB", moment_dtype="int8")
    assert printed == expected.as_dict()
    assert printed["rows"][-1]["state"] == expected.rows[-1].state
    memory.main(["60M", "--method", "adamw", "lorenza", "--dtype", "bfloat16"])
    table = capsys.readouterr().out
    assert "Llama 60M of the GaLore paper, bfloat16: 58,073,600 parameters" in table
    ranks = [line.split()[1] for line in table.splitlines() if line.startswith("lorenza  ")]
    assert ranks == ["16", "32", "64", "128"]
    with pytest.raises(SystemExit):
        memory.main(["8B"])
    assert "'8B' is neither a preset" in capsys.readouterr().err


def test_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-m", "lorenza_optax.memory", "60M",
         "--rank", "64", "--memory", "1GB"],
        cwd=EXAMPLES.parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "largest that fits" in done.stdout
