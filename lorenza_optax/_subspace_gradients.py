"""Gradients in the subspaces for loops that accumulate them before ``update``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lorenza_optax._arguments import low_rank_config
from lorenza_optax._config import LowRankConfig
from lorenza_optax._find import find_states, refuse_wrapped
from lorenza_optax._gradient import (
    SKETCH,
    SubspaceGradients,
    full_gradient,
    low_rank_gradient,
    step_key,
    varying,
)
from lorenza_optax._in_update import (
    perturbed_landscape,
    sketched_subspaces,
    surroundings_of,
)
from lorenza_optax._inner import load_moments, store_moments
from lorenza_optax._landscape import Displacement, landscape
from lorenza_optax._mesh import in_auto_mode
from lorenza_optax._paths import leaves_by_path
from lorenza_optax._plan import ProjectionPlan
from lorenza_optax._refresh import is_due
from lorenza_optax._renewal import carried
from lorenza_optax._residual import DISCARD
from lorenza_optax._selection import Rank
from lorenza_optax._sketch import WARM_UP, sketch_rows
from lorenza_optax._state import LowRankState, check_same_tree, low_rank_like
from lorenza_optax._step import prepare
from lorenza_optax._surroundings import applied

__all__ = ["subspace_value_and_grad"]


def subspace_value_and_grad(
    value_fn: Callable[..., Any],
    *,
    rank: Rank = 128,
    update_proj_gap: int = 200,
    rho: optax.ScalarOrSchedule = 0.05,
    mu: optax.ScalarOrSchedule = 1e-3,
    num_probes: int = 1,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    base_optimizer: optax.GradientTransformation | None = None,
    proj_type: str = "std",
    moment_transport: str = "keep",
    ascent: str = "zo",
    estimator: str = "auto",
    probe_batch_size: int | None = None,
    perturb_every: int = 1,
    probe_rank: int | None = None,
    probe_factors: str = "svd",
    scale_probes: bool = False,
    ascent_fn: Callable[..., Any] | None = None,
    factored: bool = True,
    refresh: str = "gradient",
    factor_dtype: Any = None,
    moment_dtype: Any = None,
    weight_dimension_numbers: Any = None,
    subspace: str = "randomized_svd",
    axis_name: Any = None,
    seed: int = 0,
    has_aux: bool = False,
) -> Callable[..., tuple[Any, SubspaceGradients, Any]]:
    r"""Like ``jax.value_and_grad``, with gradients :math:`Q^\top \nabla f(\theta + \varepsilon)`.

    For loops that accumulate gradients over micro-batches: a full gradient is never formed, and
    the sum takes r × n numbers a matrix. The function refreshes the subspaces where that is due
    (by a pass of its own, at θ, over the micro-batch that it is called with), perturbs, and
    differentiates; :func:`lorenza`'s ``update`` takes the sum or mean of what it returns. All
    gradients of a sum must come from one state: hand the returned ``opt_state`` on.

    Args:
      value_fn: ``value_fn(params, *args, **kwargs)`` to a scalar, or with ``has_aux`` to
        (scalar, aux).
      rank: Rank r, as given to :func:`lorenza`; so are all that follow. Keep those that both
        functions take in one dict.
      update_proj_gap: Interval T between refreshes, in updates.
      rho: Radius ρ of the perturbation.
      mu: Smoothing radius μ.
      num_probes: Number q of probes.
      b1: Adam's β₁.
      b2: Adam's β₂.
      eps: Adam's ε.
      base_optimizer: The optimizer inside, if not Adam.
      proj_type: Which side is compressed.
      moment_transport: How the inner state crosses a refresh.
      ascent: How the ascent is found.
      estimator: How slopes are taken.
      probe_batch_size: How many probes are evaluated at once.
      perturb_every: Perturb each k-th step only.
      probe_rank: How many singular pairs probes use.
      probe_factors: The right factors of probes.
      scale_probes: Whether probes are scaled with the singular values.
      ascent_fn: The loss whose ascent is looked for.
      factored: Whether perturbed weights are kept factored.
      refresh: "gradient" or "sketch".
      factor_dtype: Dtype in which Q and R are kept.
      moment_dtype: Dtype in which moments are kept.
      weight_dimension_numbers: Which axes form the matrix of which leaf.
      subspace: "randomized_svd" or "svd".
      axis_name: Mapped axis over which the loss is per device.
      seed: Seed of sketches and probes.
      has_aux: Whether ``value_fn`` returns auxiliary output.

    Returns:
      A function ``(params, *args, opt_state, **kwargs) -> (value, gradients, opt_state)``, with
      ``has_aux`` ``((value, aux), gradients, opt_state)``. ``gradients`` is a pytree
      (``SubspaceGradients``) that may be added and scaled.

    Raises:
      ValueError: If ``opt_state`` does not hold exactly one state of :func:`lorenza`, or one
        made with other arguments.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, lorenza_optax
      >>> shared = dict(rank=4, rho=0.02)
      >>> loss = lambda params, x: jnp.mean((x @ params["kernel"]) ** 2)
      >>> tx = lorenza_optax.lorenza(1e-2, **shared)
      >>> value_and_grad = lorenza_optax.subspace_value_and_grad(loss, **shared)
      >>> params = {"kernel": jnp.ones((16, 8))}
      >>> state = tx.init(params)
      >>> total = None
      >>> for micro_batch in jnp.eye(16).reshape(2, 8, 16):
      ...     value, grads, state = value_and_grad(params, micro_batch, opt_state=state)
      ...     total = grads if total is None else jax.tree.map(jnp.add, total, grads)
      >>> print(total.projected["kernel"].shape)
      (4, 16)
      >>> mean = jax.tree.map(lambda g: g / 2, total)
      >>> updates, state = tx.update(mean, state, params)
      >>> print(updates["kernel"].shape)
      (16, 8)
    """
    chosen = dict(locals())
    del chosen["value_fn"], chosen["has_aux"]
    config = low_rank_config(**chosen, residual=DISCARD)

    def value_and_grad(
        params: Any, *args: Any, opt_state: Any, **kwargs: Any
    ) -> tuple[Any, SubspaceGradients, Any]:
        refuse_wrapped(opt_state)
        states = list(find_states(opt_state).values())
        if len(states) != 1 or not isinstance(states[0], LowRankState):
            raise ValueError(
                "subspace_value_and_grad needs an opt_state with exactly one state of lorenza,"
                f" found {len(states)}: {', '.join(type(state).__name__ for state in states)}."
            )
        (state,) = states
        plan = config.plan(params)
        loss = lambda at: value_fn(at, *args, **kwargs)  # noqa: E731
        check_same_tree(config, plan, state)
        state = _refreshed(config, plan, state, params, loss, has_aux)
        around = surroundings_of(config, plan, state)
        near, move, _, _ = perturbed_landscape(
            config.ascent,
            around,
            state.count,
            params,
            loss,
            applied(ascent_fn, *args, **kwargs),
            has_aux,
        )
        value, gradient = low_rank_gradient(near, around.subspaces, move, config.ascent)
        near.warn()
        others = {path: g.astype(plan.leaves[path].dtype) for path, g in gradient.others.items()}
        low = low_rank_like(leaves_by_path(params), plan, gradient.low)
        return value, SubspaceGradients(low, others), _replaced(opt_state, state)

    return value_and_grad


def _refreshed(
    config: LowRankConfig,
    plan: ProjectionPlan,
    state: LowRankState,
    params: Any,
    loss: Callable[[Any], Any],
    has_aux: bool,
) -> LowRankState:
    """The state, with new subspaces from the gradient at θ if they are due."""
    if not plan.projected:
        return state
    around = surroundings_of(config, plan, state)
    near = landscape(
        loss,
        varying(params, config.ascent),
        around.subspaces,
        keep_factored=config.ascent.factored,
        has_aux=has_aux,
    )
    still = Displacement({}, {})

    def from_sketches() -> LowRankState:
        key = step_key(state.ascent.seed, state.count, SKETCH)
        columns = sketch_rows(around.rows, around.subspaces.projectors, key)
        _, gradient = low_rank_gradient(near, around.subspaces, still, config.ascent, columns)
        return in_auto_mode(
            lambda *args: _with_sketches(config, plan, *args),
            gradient.low,
            gradient.sketches,
            state,
            like=state,
        )

    def from_gradient() -> LowRankState:
        _, gradient = full_gradient(near, still, config.ascent)
        return in_auto_mode(
            lambda *args: _with_gradient(config, plan, *args), gradient, state, like=state
        )

    warm_up = WARM_UP if config.sketches else 1
    due = is_due(state.count, state.last_refresh, config.update_proj_gap, warm_up)
    renew = from_sketches if config.sketches else from_gradient
    return jax.lax.cond(due, renew, lambda: state)


def _with_sketches(
    config: LowRankConfig, plan: ProjectionPlan, low: Any, sketches: Any, state: LowRankState
) -> LowRankState:
    new, share = sketched_subspaces(config, plan, low, sketches, state)
    moments = load_moments(state.projected, config.inner.init(low))
    moved = carried(config, state.count, moments, low, new.overlaps)
    return _installed(config, state, new.subspaces, moved, new.refreshed, share, new.overlap)


def _with_gradient(
    config: LowRankConfig, plan: ProjectionPlan, gradient: Any, state: LowRankState
) -> LowRankState:
    found, _ = prepare(config, plan, gradient, state)
    shares = (found.captured_energy, found.overlap)
    return _installed(config, state, found.subspaces, found.projected, found.refreshed, *shares)


def _installed(
    config: LowRankConfig,
    state: LowRankState,
    subspaces: Any,
    moments: Any,
    refreshed: jax.Array,
    share: jax.Array,
    overlap: jax.Array,
) -> LowRankState:
    q, r, values = subspaces
    dtype = config.stored_moment_dtype()
    # Carried by "keep" they are as they were, and storing them again changes nothing.
    stored = store_moments(moments, dtype, None)
    new = state._replace(
        q=q,
        r=r,
        singular_values=values,
        projected=stored,
        last_refresh=state.count,
        captured_energy=share,
        subspace_overlap=overlap,
    )
    return jax.tree.map(lambda n, o: jnp.where(refreshed, n, o).astype(o.dtype), new, state)


def _replaced(opt_state: Any, new: LowRankState) -> Any:
    """The optimizer's state with the low-rank state in it exchanged, boxes kept."""
    is_ours = lambda node: isinstance(node, LowRankState)  # noqa: E731

    def exchange(node: Any) -> Any:
        if not is_ours(node):
            return node
        return jax.tree.unflatten(jax.tree.structure(node), jax.tree.leaves(new))

    return jax.tree.map(exchange, opt_state, is_leaf=is_ours)
