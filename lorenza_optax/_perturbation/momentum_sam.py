"""SAM along the first moment for trainers that know nothing of it: they hold the moved point."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lorenza_optax._ascent.ascent import AscentConfig, normalized
from lorenza_optax._ascent.surroundings import check_moments
from lorenza_optax._base.calls import wrapper_around
from lorenza_optax._base.checks import check_number, check_transformation, value_at
from lorenza_optax._base.mesh import in_auto_mode
from lorenza_optax._base.paths import leaves_by_path
from lorenza_optax._factored.landscape import Displacement, Subspaces
from lorenza_optax._inner.inner import FIRST_MOMENTS, first_moment
from lorenza_optax._low_rank.state import LowRankState
from lorenza_optax._perturbation.find import unboxed
from lorenza_optax._perturbation.perturbed import draws_anew, surroundings_of_states
from lorenza_optax._plan.plan import shape_and_dtype
from lorenza_optax._subspace.subspace import lift

__all__ = ["MomentumSamState", "momentum_sam", "momentum_sam_eval_params"]


class MomentumSamState(NamedTuple):
    """State of :func:`momentum_sam`.

    Attributes:
      base_optimizer_state: The optimizer's own state, which the perturbation is read from.
      count: Updates so far, int32.
      rho: Radius of the perturbation that the parameters hold, float32.
    """

    base_optimizer_state: Any
    count: Any
    rho: Any


def momentum_sam(
    base_optimizer: optax.GradientTransformation,
    rho: optax.ScalarOrSchedule = 0.05,
    *,
    proj_type: str = "std",
    weight_dimension_numbers: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""SAM at no extra pass, in any training loop: the parameters it holds are the perturbed ones.

    With the first moment m that the optimizer keeps anyway, of projected leaves lifted from
    their subspaces,

    .. math::
      \varepsilon_t = \rho \frac{m_t}{\lVert m_t \rVert}, \quad
      \theta_{t+1} = \theta_t + u\big(\nabla f(\theta_t + \varepsilon_t)\big),

    and the loop holds :math:`y_t = \theta_t + \varepsilon_t`: updates lead from :math:`y_t` to
    :math:`y_{t+1}`. Gradients that the loop takes where its parameters are, are then taken at
    the perturbed point, with one backward pass and no memory beyond the optimizer's. Evaluate
    and save :func:`momentum_sam_eval_params`, which gives :math:`\theta_t`. The steps are those
    of ``lorenza(..., ascent="momentum")`` with ``value_fn``, but for round-off.

    It must come last in a chain: a stage behind it would change the perturbation too. Gradients of
    :func:`subspace_value_and_grad`, which may exchange the subspaces, do not go with it.
    Momentum-SAM as published goes ahead along the step that momentum makes, which a negative ρ
    gives here; positive ρ is meant to ascend, as in SAM. A moment is of earlier batches: on the
    next one it was found to rise in fine-tuning, and to fall a little in pre-training
    (benchmarks/results/ascent.json).

    Args:
      base_optimizer: A whole optimizer that keeps a first moment, such as ``optax.adamw(1e-3)``
        or ``lorenza_optax.lorenza(1e-2)``. It sees unperturbed parameters.
      rho: Radius ρ of the perturbation in the Frobenius norm over all leaves, in units of the
        parameters; a schedule may give it.
      proj_type: As given to :func:`lorenza`, if that is the optimizer.
      weight_dimension_numbers: Likewise.

    Returns:
      The transformation; ``update`` needs ``params`` and takes no ``value_fn``.

    Raises:
      TypeError, ValueError: For arguments that do not fit; at ``init`` for an optimizer without a
        first moment, and for parameters of less than 32 bits, which cannot hold a perturbation.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, lorenza_optax
      >>> loss = lambda params: jnp.sum(params["kernel"] ** 2)
      >>> tx = lorenza_optax.momentum_sam(lorenza_optax.lorenza(1e-2, rank=4), rho=0.05)
      >>> params = {"kernel": jnp.ones((16, 8))}
      >>> state = tx.init(params)
      >>> for _ in range(3):  # the loop of any trainer
      ...     updates, state = tx.update(jax.grad(loss)(params), state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> clean = lorenza_optax.momentum_sam_eval_params(state, params)
      >>> print(f"{float(optax.tree.norm(optax.tree.sub(params, clean))):.2f}")
      0.05

    References:
      Becker, Altrock, Risse, `Momentum-SAM <https://arxiv.org/abs/2401.12033>`_, 2024
    """
    check_transformation("base_optimizer", base_optimizer)
    if base_optimizer is None:
        raise TypeError("base_optimizer must be an optax.GradientTransformation, got None.")
    check_number("rho", rho)
    base = optax.with_extra_args_support(base_optimizer)
    shapes = {"proj_type": proj_type, "weight_dimension_numbers": weight_dimension_numbers}

    def init(params: Any) -> MomentumSamState:
        for path, leaf in leaves_by_path(params).items():
            _, dtype = shape_and_dtype(path, leaf)
            if jnp.finfo(dtype).bits < 32:
                raise ValueError(
                    f"momentum_sam keeps its perturbation in the parameters, and leaf {path!r} is"
                    f" {leaf.dtype}, in which it would be rounded away. Keep float32 parameters"
                    " (and compute in less), or use lorenza(..., ascent='momentum') with value_fn."
                )
        state = base.init(params)
        if jax.tree.leaves(params):  # which optax.tree.map_params leaves out
            jax.eval_shape(lambda: _move(state, params, _radius(0), **shapes))  # or raises
        return MomentumSamState(state, jnp.zeros((), jnp.int32), _radius(0))

    def _radius(count: Any) -> jax.Array:
        return jnp.array(value_at(rho, count), jnp.float32)  # not that of a wrapper's own state

    def update(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, MomentumSamState]:
        if params is None:
            raise ValueError("momentum_sam needs params in update: the perturbed point.")
        if "value_fn" in extra_args:
            raise ValueError(
                "momentum_sam takes its gradients at the parameters that it is given, and no"
                " value_fn: leave it out, or use lorenza(..., ascent='momentum')."
            )
        if wrapper := wrapper_around(("schedule_free", "mechanize")):
            raise ValueError(
                f"momentum_sam does not work inside {wrapper}, which changes the updates that lead"
                " from one perturbed point to the next. Put it outside:"
                f" momentum_sam({wrapper}(...))."
            )
        held = _move(state.base_optimizer_state, params, state.rho, **shapes)
        point = _moved(params, held, -1)
        updates, new = base.update(updates, state.base_optimizer_state, point, **extra_args)
        count = optax.safe_increment(state.count)
        radius = _radius(count)
        following = _move(new, params, radius, **shapes)
        change = {path: move - held[path] for path, move in following.items()}
        return _moved(updates, change, 1), MomentumSamState(new, count, radius)

    return optax.GradientTransformationExtraArgs(init, update)


def momentum_sam_eval_params(
    opt_state: Any,
    params: Any,
    *,
    proj_type: str = "std",
    weight_dimension_numbers: Any = None,
) -> Any:
    """The parameters without their perturbation, for evaluation and saving.

    Args:
      opt_state: A state that holds that of :func:`momentum_sam`, such as
        ``TrainState.opt_state``.
      params: The parameters that the loop holds.
      proj_type: As given to :func:`momentum_sam`; keep both arguments in one dict.
      weight_dimension_numbers: Likewise.

    Returns:
      θ, a tree like ``params``.

    Raises:
      ValueError: If ``opt_state`` holds no such state.

    Examples:
      >>> import jax.numpy as jnp, optax, lorenza_optax
      >>> params = {"kernel": jnp.ones((4, 4))}
      >>> state = lorenza_optax.momentum_sam(optax.adam(1e-3)).init(params)
      >>> clean = lorenza_optax.momentum_sam_eval_params(state, params)
      >>> print(bool(jnp.all(clean["kernel"] == 1)))  # nothing has moved yet
      True
    """
    is_ours = lambda node: isinstance(node, MomentumSamState)  # noqa: E731
    found = [node for node in jax.tree.leaves(opt_state, is_leaf=is_ours) if is_ours(node)]
    if not found:
        raise ValueError(
            f"opt_state (a {type(opt_state).__name__}) holds no state of momentum_sam: pass the"
            " state of the optimizer that these parameters are trained with."
        )
    for state in map(unboxed, found):
        inner, rho = state.base_optimizer_state, state.rho
        move = _move(inner, params, rho, proj_type, weight_dimension_numbers)
        params = _moved(params, move, -1)
    return params


def _directions(
    state: Any, params: Any, proj_type: str, weight_dimension_numbers: Any
) -> tuple[Displacement, Subspaces]:
    """All first moments in an optimizer's state, and the subspaces of those that are low-rank."""
    shapes = {path: leaf.shape for path, leaf in leaves_by_path(params).items()}
    is_low = lambda node: isinstance(node, LowRankState)  # noqa: E731
    holds = lambda node: is_low(node) or _own_moment(node) is not None  # noqa: E731
    nodes = [node for node in jax.tree.leaves(state, is_leaf=holds) if holds(node)]
    full: dict[str, jax.Array] = {}
    for node in nodes:
        own = {} if is_low(node) else leaves_by_path(_own_moment(node))
        for path, moment in own.items():
            if shapes.get(path) != moment.shape:
                raise ValueError(
                    f"base_optimizer keeps a first moment of shape {moment.shape} for leaf"
                    f" {path!r} of shape {shapes.get(path)}: momentum_sam perturbs along moments of"
                    " a leaf's own shape, or in subspaces that a state of this library keeps. Use"
                    " optax.adamw, lorenza, methods.galore or the like."
                )
        full = {**own, **full}
    low = [unboxed(node) for node in nodes if is_low(node)]
    if any(map(draws_anew, low)):
        raise ValueError(
            "base_optimizer draws its subspaces anew at each update, as methods.apollo and"
            " methods.flora do, so that its first moments are in none that momentum_sam could"
            " perturb in. Use one that keeps its subspaces, such as lorenza or methods.galore."
        )
    around = None
    if low:
        config = AscentConfig(ascent="momentum")
        around = surroundings_of_states(params, low, config, weight_dimension_numbers, proj_type)
        full |= around.moments.full
    if not full and (around is None or not around.moments.low):
        raise ValueError(
            "base_optimizer keeps no first moment under any of the names"
            f" {', '.join(FIRST_MOMENTS)}, which momentum_sam perturbs along: use one with"
            " momentum, such as optax.adamw or lorenza."
        )
    if around is None:
        return Displacement({}, full), Subspaces({}, {})
    check_moments(around)
    return Displacement(around.moments.low, full), around.subspaces


def _own_moment(node: Any) -> Any:
    """The first moment among a NamedTuple's own fields, not deeper; else None."""
    if not hasattr(node, "_fields"):
        return None
    own = node._asdict()
    return first_moment(node) if any(jax.tree.leaves(own.get(n)) for n in FIRST_MOMENTS) else None


def _move(
    state: Any, params: Any, rho: jax.Array, proj_type: str, weight_dimension_numbers: Any
) -> dict[str, jax.Array]:
    """ρ m / ‖m‖ by path, in at least float32; 0 while there is no moment."""
    moments, subspaces = _directions(state, params, proj_type, weight_dimension_numbers)
    leaves = leaves_by_path(params)
    moved = {path: leaf for path, leaf in leaves.items() if path in (*moments.low, *moments.full)}

    def build(moments: Displacement, projectors: Any, rho: jax.Array) -> dict[str, jax.Array]:
        unit, _ = normalized(moments, Subspaces(subspaces.views, projectors))
        unit = unit.scaled(rho)
        lifted = {}
        for path in moved:
            if path in unit.full:
                lifted[path] = unit.full[path]
                continue
            view = subspaces.views[path]
            lifted[path] = view.leaf(view.orient(lift(projectors[path], unit.low[path])))
        return lifted

    return in_auto_mode(build, moments, subspaces.projectors, rho, like=moved)


def _moved(tree: Any, move: dict[str, jax.Array], sign: int) -> Any:
    """The tree plus a move of some of its leaves, in the dtypes of the tree."""
    add: Callable[[Any, Any], Any] = lambda leaf, by: (leaf + sign * by).astype(leaf.dtype)  # noqa: E731
    leaves = [
        add(leaf, move[path]) if path in move else leaf
        for path, leaf in leaves_by_path(tree).items()
    ]
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)
