"""Section E: ways to find new subspaces, on the same real gradients.

The gradients are those of a small Llama's matrices in training with AdamW, taken at the first
three updates and then every T. Each way goes on from its own last factors, as a training run
would, and is held against the best subspaces of each gradient. Told apart are what a way needs:
sketches, which one backward pass yields without the gradient, or the gradient itself.
"""

import functools
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.progress

import corpus
import llama
import lorenza_optax
import optimizers
import pretrain
from benchmarks.refresh.matrix import best_share, share
from lorenza_optax._linalg.decompositions import OVERSAMPLING, matmul, orthonormal
from lorenza_optax._subspace.sketch import WARM_UP, factors_from, sketch_rows

OWN = "sketches through old factors (refresh='sketch')"
GRADIENT = "randomized SVD, 1 power iteration (refresh='gradient')"
COLD = "randomized SVD, no power iteration"


def _own(matrix, left, right, key, rank):
    """As the library does: ĝ = Pᵀ G and Y = G Ω, a step of subspace iteration from each side."""
    del rank  # that of the old factors
    columns = sketch_rows({"w": right}, {"w": left}, key)["w"]
    low, sketch = matmul(left.T, matrix), matmul(matrix, columns.T)
    found = factors_from(low[None], sketch[None])
    return found.projectors[0], found.partners[0]


def _single_pass(matrix, left, right, key, rank, rows):
    """Tropp, Yurtsever, Udell, Cevher 2017, started from the old factors; ``rows`` of Ψ."""
    columns = sketch_rows({"w": right}, {"w": left}, key)["w"]
    fresh = jax.random.normal(jax.random.fold_in(key, 1), (rows - rank, matrix.shape[0]))
    psi = jnp.concatenate([left.T, fresh / jnp.sqrt(matrix.shape[0])])
    q = orthonormal(matmul(matrix, columns.T))
    core = jnp.linalg.lstsq(matmul(psi, q), matmul(psi, matrix))[0]
    u, _, vt = jnp.linalg.svd(core, full_matrices=False)
    return matmul(q, u[:, :rank]), vt[:rank]


def _from_gradient(matrix, left, right, key, rank, power_iterations):
    del left, right
    u, _, vt = lorenza_optax.randomized_svd(matrix, rank, key, power_iterations=power_iterations)
    return u, vt


def ways(rank):
    width = rank + OVERSAMPLING
    return {
        OWN: _own,
        f"single-pass SVD, {width} rows": functools.partial(_single_pass, rows=width),
        f"single-pass SVD, {2 * width + 1} rows": functools.partial(
            _single_pass, rows=2 * width + 1
        ),
        COLD: functools.partial(_from_gradient, power_iterations=0),
        GRADIENT: functools.partial(_from_gradient, power_iterations=1),
    }


def sketches(size, arguments, text, console):
    """E: the energy of each way's subspaces, as a share of the best ones'."""
    del text
    plan = pretrain.make_plan(pretrain.parse_arguments(size))
    gap, rank = plan.settings.update_proj_gap, plan.settings.rank
    documents, description = corpus.read_documents()
    data = corpus.tokenize(documents, description, "bytes", 256, plan.seq_len)
    params, loss = llama.init(plan.model, plan.seed), llama.loss_of(plan.model)
    tx = optax.adamw(optimizers.OPTIMIZERS["adamw"].pretraining)
    gradient, update, opt_state = jax.jit(jax.grad(loss)), jax.jit(tx.update), tx.init(params)
    projected = lorenza_optax.projection_plan(params, rank).projected
    functions = {name: jax.jit(functools.partial(way, rank=rank))
                 for name, way in ways(rank).items()}  # fmt: skip
    factors = {name: _start(projected, rank) for name in functions}
    shares = {name: [] for name in functions}
    del arguments
    for step in rich.progress.track(range(plan.steps), "  gradients", console=console):
        batch = corpus.train_batch(data.train, plan.seed, step, plan.batch_size, plan.seq_len)
        tree = gradient(params, batch)
        if step < WARM_UP or step % gap == 0:
            leaves = dict(zip(lorenza_optax.projection_plan(tree, rank).leaves,
                              jax.tree.leaves(tree), strict=True))  # fmt: skip
            matrices = {path: _oriented(leaf, leaves[path]) for path, leaf in projected.items()}
            best = {path: best_share(matrix, rank) for path, matrix in matrices.items()}
            for name, function in functions.items():
                ratios = []
                for index, (path, matrix) in enumerate(matrices.items()):
                    key = jax.random.fold_in(jax.random.key(step), index)
                    factors[name][path] = function(matrix, *factors[name][path], key)
                    ratios.append(share(factors[name][path][0], matrix) / best[path])
                shares[name].append({"step": step, "share_of_best": statistics.fmean(ratios)})
        updates, opt_state = update(tree, opt_state, params)
        params = optax.apply_updates(params, updates)
    return {"rank": rank, "gap": gap, "matrices": len(projected), "ways": shares}, [], []


def _oriented(leaf, gradient):
    return leaf.matrix.orient(leaf.matrix.matrix(gradient))


def _start(projected, rank):
    """Random orthonormal factors, the same for all ways."""
    rng = np.random.default_rng(0)

    def random(leaf):
        sides = (leaf.matrix.compressed_size, leaf.matrix.free)
        left, right = (np.linalg.qr(rng.standard_normal((side, rank)))[0] for side in sides)
        return jnp.asarray(left, jnp.float32), jnp.asarray(right.T, jnp.float32)

    return {path: random(leaf) for path, leaf in projected.items()}
