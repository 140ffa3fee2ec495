"""Gradients in the subspaces for loops that accumulate them before ``update``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax
import optax

from lorenza_optax._ascent.gradient import SubspaceGradients, full_gradient, low_rank_gradient
from lorenza_optax._ascent.surroundings import applied, loss_of
from lorenza_optax._base.mesh import in_auto_mode
from lorenza_optax._base.paths import leaves_by_path, with_arrays
from lorenza_optax._low_rank.arguments import low_rank_config
from lorenza_optax._low_rank.config import LowRankConfig
from lorenza_optax._low_rank.fit import check_same_tree
from lorenza_optax._low_rank.in_update import perturbed_landscape, surroundings_of
from lorenza_optax._low_rank.random_subspace import closed, opened
from lorenza_optax._low_rank.state import LowRankState, examples, low_rank_like
from lorenza_optax._perturbation.find import find_states, refuse_wrapped
from lorenza_optax._perturbation.momentum_sam import MomentumSamState
from lorenza_optax._plan.plan import ProjectionPlan
from lorenza_optax._plan.selection import Rank
from lorenza_optax._residual.residual import DISCARD
from lorenza_optax._subspace.subspace import RANDOM, project
from lorenza_optax._training.refresh_apart import refreshed_apart

__all__ = ["subspace_value_and_grad"]


def subspace_value_and_grad(
    value_fn: Callable[..., Any],
    *,
    transformation: optax.GradientTransformation | None = None,
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

    For a method of ``lorenza_optax.methods`` pass its ``scale_by_*`` as ``transformation``. A
    random subspace costs no refresh; with VLoRP's granularity the full gradient of one
    micro-batch is formed, and the sum is small all the same.

    Args:
      value_fn: ``value_fn(params, *args, **kwargs)`` to a scalar, or with ``has_aux`` to
        (scalar, aux).
      transformation: What ``scale_by_lorenza`` or another ``scale_by_*`` returned, with the
        arguments that the optimizer was made with, in place of all of them here.
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
        made with other arguments; for a method that needs the full gradient, or takes none.
      TypeError: If ``transformation`` is something else.

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
    del chosen["value_fn"], chosen["has_aux"], chosen["transformation"]
    config = _config_of(transformation, chosen)

    def value_and_grad(
        params: Any, *args: Any, opt_state: Any, **kwargs: Any
    ) -> tuple[Any, SubspaceGradients, Any]:
        refuse_wrapped(opt_state)
        _refuse_held(opt_state)
        states = list(find_states(opt_state).values())
        if len(states) != 1 or not isinstance(states[0], LowRankState):
            raise ValueError(
                "subspace_value_and_grad needs an opt_state with exactly one state of lorenza,"
                f" found {len(states)}: {', '.join(type(state).__name__ for state in states)}."
            )
        (state,), params = states, with_arrays(params)
        plan = config.plan(params)
        loss = loss_of(value_fn, has_aux, *args, **kwargs)
        check_same_tree(config, plan, state)
        if config.subspace in RANDOM:
            ready = opened(config, plan, state)
            state = closed(config, state, ready)
        else:
            ready = state = refreshed_apart(config, plan, state, params, loss, has_aux)
        around = surroundings_of(config, plan, ready)
        near, move, _, _ = perturbed_landscape(
            config.ascent,
            around,
            state.count,
            params,
            loss,
            applied(config.ascent.ascent_fn, *args, **kwargs),
            has_aux,
        )
        if config.granularity == 1:
            value, gradient = low_rank_gradient(near, around.subspaces, move, config.ascent)
            low, others = gradient.low, gradient.others
        else:
            value, full = full_gradient(near, move, config.ascent)
            low = _projected(plan, params, full, around.subspaces.projectors)
            others = {path: full[path] for path in plan.others}
        near.warn()
        others = {path: g.astype(plan.leaves[path].dtype) for path, g in others.items()}
        low = low_rank_like(leaves_by_path(params), plan, low)
        return value, SubspaceGradients(low, others), _replaced(opt_state, state)

    return value_and_grad


def _refuse_held(opt_state: Any) -> None:
    """Raises where the parameters hold a perturbation in subspaces that would be exchanged here."""
    is_holding = lambda node: isinstance(node, MomentumSamState)  # noqa: E731
    for node in filter(is_holding, jax.tree.leaves(opt_state, is_leaf=is_holding)):
        find_states(node)
        raise ValueError(
            "momentum_sam keeps its perturbation in the parameters, in the subspaces of the last"
            " update, which subspace_value_and_grad may exchange. Give update full gradients, or"
            " use lorenza(..., ascent='momentum') without momentum_sam."
        )


def _config_of(transformation: Any, arguments: dict[str, Any]) -> LowRankConfig:
    """The choices that a transformation was made with, or that the arguments are."""
    if transformation is None:
        return low_rank_config(**arguments, residual=DISCARD)
    parameters = inspect.signature(subspace_value_and_grad).parameters
    given = [
        name
        for name, value in arguments.items()
        if value is not parameters[name].default and value != parameters[name].default
    ]
    if given:
        raise ValueError(
            f"transformation= brings its own arguments: leave out {', '.join(given)} here, and"
            " give them to the transformation."
        )
    config = getattr(getattr(transformation, "update", None), "config", None)
    if not isinstance(config, LowRankConfig):
        raise TypeError(
            "transformation must be what a function scale_by_* of lorenza_optax returned. Of a"
            " chain, as lorenza(...) is one, or of a wrapper, pass that part alone:"
            " scale_by_lorenza(...). Flora, GradNormLoRP and OwLore need the whole gradient:"
            " accumulate those of jax.grad."
        )
    if config.zeroth_order is not None:
        raise ValueError(
            "This method takes no gradients: call update(None, state, params, value_fn=loss) with"
            " a loss that is the mean over all micro-batches."
        )
    config.check_accumulates()
    return config


def _projected(plan: ProjectionPlan, params: Any, gradient: Any, projectors: Any) -> Any:
    """ĝ by path from a full gradient."""

    def project_all(gradient: Any, projectors: Any) -> Any:
        low = {}
        for path, leaf in plan.projected.items():
            matrix = leaf.matrix.matrix(gradient[path].astype(leaf.compute_dtype))
            low[path] = project(projectors[path], leaf.matrix.orient(matrix))
        return low

    return in_auto_mode(
        project_all, gradient, projectors, like=lambda: examples(plan, leaves_by_path(params))[0]
    )


def _replaced(opt_state: Any, new: LowRankState) -> Any:
    """The optimizer's state with the low-rank state in it exchanged, boxes kept."""
    is_ours = lambda node: isinstance(node, LowRankState)  # noqa: E731

    def exchange(node: Any) -> Any:
        if not is_ours(node):
            return node
        return jax.tree.unflatten(jax.tree.structure(node), jax.tree.leaves(new))

    return jax.tree.map(exchange, opt_state, is_leaf=is_ours)
