"""What scaling counts is what there is; its races refresh when they say so; its words fit."""

import math

import jax
import numpy as np
import pytest

pytestmark = pytest.mark.usefixtures("compile_quickly")

from benchmarks import (  # noqa: E402
    experiments,
    report,
    run,
    scaling,
)
from benchmarks.scaling import devices, fits, plan, steps  # noqa: E402

NANO = plan.Shape(16, 1, 8, 8, 4)


def test_flops_are_those_of_the_matrix_products():
    width, layers, batch, length = 1024, 2, 2, 64
    shape = plan.Shape(width, layers, batch, length, rank=32)
    tokens = np.zeros((batch, length + 1), np.int32)
    weights = layers * 12 * width**2 + 256 * width
    attention = layers * 2 * length * width
    product = 2 * batch * length
    refreshes = {"adamw": True, "sam": True, "rho=0": False}
    found = {n: steps.step_flops(n, shape, tokens, r) for n, r in refreshes.items()}
    forward = product * (weights + attention)
    adam = 17 * weights  # about so many for each number
    assert found["adamw"] == pytest.approx(3 * forward + adam, rel=0.03)
    assert found["sam"] == pytest.approx(6 * forward + adam, rel=0.04)
    # All matrices are projected: in place of x.T @ g come x @ Q and its product with g, and the
    # step is lifted.
    sides = layers * (4 * 2 * width + 2 * 5 * width) + 256 + width
    low = product * shape.rank * sides + 2 * shape.rank * weights
    assert found["rho=0"] == pytest.approx(3 * forward - product * weights + low, rel=0.02)


HLO = """HloModule jit_step, entry_computation_layout={()->f32[]}

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%body (x: (f32[8])) -> (f32[8]) {
  %all-gather.1 = f32[8]{0} all-gather(%x), dimensions={0}
}

%often (x: f32[4]) -> f32[4] {
  %w = (f32[8]) while(%x), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"5"}}
}

%seldom (x: f32[4]) -> f32[4] {
  %all-reduce.7 = (f32[4]{0}, f32[]) all-reduce(%x, %y), to_apply=%add
}

ENTRY %main (p: f32[4]) -> f32[] {
  %all-reduce-start = f32[100]{0} all-reduce-start(%p), to_apply=%add
  %all-reduce-done = f32[100]{0} all-reduce-done(%all-reduce-start)
  ROOT %c = f32[4] conditional(%i, %p, %p), branch_computations={%seldom, %often}
}
"""


def test_collectives_count_as_often_as_they_run():
    found = devices.parse(HLO)
    assert found == {"all-reduce": [1, 400], "all-gather": [5, 5 * 32]}
    assert devices.sent_bytes(found, 4) == 2 * 3 / 4 * 400 + 3 / 4 * 160
    with pytest.raises(RuntimeError, match="a loop of unknown length"):
        devices.parse(HLO.replace("known_trip_count", "unknown"))


def test_replicas_send_their_gradients_and_those_in_the_subspaces():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def sent(name, placement, refresh=False):
        return devices.collectives(name, NANO, mesh, placement, refresh)

    width, rank = NANO.width, NANO.rank
    weights = 12 * width**2 + 2 * 256 * width + 3 * 2 * width  # with embedding, head, norms
    loss = 1
    assert sent("adamw", "replicated") == {"all-reduce": [1, 4 * (weights + loss)]}
    # Four square matrices and two of 1 x 4; the head, 16 x 256, is projected too.
    low = rank * (4 * width + 2 * 4 * width + 256) + 256 * width + 2 * 3 * width
    assert sent("rho=0", "replicated") == {"all-reduce": [1, 4 * (low + loss)]}
    # Sharded, each device holds an eighth of what has so many, and they must be put together.
    leaf = jax.ShapeDtypeStruct((16, 64), np.float32)
    assert devices.fully_sharded(leaf, mesh).shard_shape(leaf.shape) == (16, 8)
    assert sent("adamw", "fsdp")["all-gather"][0] > 1


def test_growth_in_words():
    x = [1, 2, 4, 8]
    words = {
        "linear": [5 + 3 * n for n in x],
        "constant": [100, 101, 100, 103],
        "faster than linear": [n**2 for n in x],
        "slower than linear": [math.sqrt(n) for n in x],
        "not steadily": [1, 2, 1.5, 3],
    }
    for word, values in words.items():
        assert fits.growth(x, values).word == word
    found = fits.growth(x, [7 * n**1.5 for n in x])
    assert found.exponent == pytest.approx(1.5)
    assert found.last_exponent == pytest.approx(1.5)
    linear = fits.growth(x, words["linear"])
    assert (linear.smallest, linear.largest) == (3, 3)
    assert fits.growth([1, 8], [1, 3]).word == "grows"
    assert fits.ratio([2, 4, 90], [1, 2, 3]).median == 2
    assert [fits.significant(v) for v in (0, 0.01234, 4.567, 1234.5)] == [
        "0", "0.0123", "4.57", "1234",
    ]  # fmt: skip


class Letters:
    def batch(self, shape, step):
        rng = np.random.default_rng(step)
        return rng.integers(0, 256, (shape.batch, shape.length + 1), np.int32)


@pytest.fixture
def nano(monkeypatch):
    tiny = plan.SIZES["cpu"]._replace(
        races=(NANO,), unrolled=(1, 2), unrolled_counted=(1, 2), unrolled_timed=(1,),
        scanned=(1, 2), layers_of=NANO, widths=(16, 32), ranks=(2, 4), probes=(1, 2), wide=NANO,
        sharded=NANO, batch_per_device=1, rounds=3, refresh_rounds=2,
    )  # fmt: skip
    monkeypatch.setattr(plan, "SIZES", {"cpu": tiny, "full": tiny})
    monkeypatch.setattr(plan, "RACERS", ("adamw", "rho=0"))
    monkeypatch.setattr(steps, "_text", Letters)


@pytest.mark.slow
def test_cells_run_and_are_reported(nano, tmp_path):
    only = ["--only", "time-race", "flops-race", "compile-unrolled-*-adamw"]
    assert run.main(["scaling", "--out", tmp_path, *only]) == 0
    records, _ = experiments.read(tmp_path / "scaling", scaling.cells("cpu"))
    race = records["cpu-time-race-16"]["result"]["optimizers"]
    assert len(race["rho=0"]["seconds"]) == 3
    assert len(race["rho=0"]["refresh_step_seconds"]) == 2
    assert race["adamw"]["refresh_step_seconds"] == []
    text = report.build(tmp_path, ["scaling"])
    flops = records["cpu-flops-race-16"]["result"]
    share = flops["rho=0"]["step"] / flops["adamw"]["step"]
    rounds = zip(race["rho=0"]["seconds"], race["adamw"]["seconds"], strict=True)
    median = np.median([ours / theirs for ours, theirs in rounds])
    assert f"| LORENZA, ρ = 0 | {share:.2f} | " in text
    assert f"LORENZA, ρ = 0 {median:.2f}; and in AdamW's FLOPs LORENZA, ρ = 0 {share:.2f}" in text
    assert (tmp_path / "scaling" / "growth-cpu.png").stat().st_size > 1000


@pytest.mark.slow
def test_a_process_of_its_own_has_other_devices(nano, tmp_path):
    only = ["--only", "devices-*-2-batch2", "devices-*-4-batch8"]
    assert run.main(["scaling", "--out", tmp_path, *only]) == 0
    text = report.build(tmp_path, ["scaling"])
    assert "| AdamW | " in text
    assert "Between refreshes a device sends" in text
