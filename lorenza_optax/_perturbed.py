"""The gradient at the ascent point for loops that cannot pass ``value_fn`` to ``update``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lorenza_optax._ascent import AscentConfig
from lorenza_optax._directions import Directions, Probe, full_space, in_subspace
from lorenza_optax._gradient import (
    FullSpaceAscentState,
    draw_probes,
    value_and_grad_at_ascent,
)
from lorenza_optax._matrix_view import MatrixView, matrix_view
from lorenza_optax._paths import leaves_by_path
from lorenza_optax._plan import dimension_numbers_by_path
from lorenza_optax._step import LowRankState
from lorenza_optax._zo_sam import ZoSamState

__all__ = ["perturbed_value_and_grad"]


def perturbed_value_and_grad(
    value_fn: Callable[..., Any],
    *,
    rho: optax.ScalarOrSchedule = 0.05,
    mu: optax.ScalarOrSchedule = 1e-3,
    num_probes: int = 1,
    ascent: str = "zo",
    estimator: str = "auto",
    probe_batch_size: int | None = None,
    perturb_every: int = 1,
    weight_dimension_numbers: Any = None,
    axis_name: Any = None,
    has_aux: bool = False,
) -> Callable[..., tuple[Any, Any]]:
    r"""Like ``jax.value_and_grad``, at the ascent point :math:`\theta + \rho A / \lVert A \rVert`.

    For training loops that call ``tx.update(grads, opt_state, params)`` and no more: linen's
    ``TrainState.apply_gradients``, gradient accumulation, clipping in front, other people's
    trainers. The subspace, the seed and the count are read from ``opt_state``, wherever in it
    :func:`lorenza` (or :func:`adazo_sam`, :func:`zo_sam_perturbation`) sits, in ``chain``,
    ``masked``, ``partition`` or ``MultiSteps``; no state is changed. Several states share one
    norm. The gradient is that of ``update(..., value_fn=value_fn)`` with the same arguments:
    bit for bit in the same compiled program, to round-off across programs.

    Args:
      value_fn: ``value_fn(params, *args, **kwargs)`` to a scalar, or with ``has_aux`` to
        (scalar, aux).
      rho: Radius ρ, as in :func:`lorenza`; likewise the ascent's other arguments. Keep those
        that both functions take in one dict.
      mu: Smoothing radius μ.
      num_probes: Number q of probes.
      ascent: "zo" or "none".
      estimator: "auto", "jvp", "central" or "forward".
      probe_batch_size: How many probes are evaluated at once.
      perturb_every: Perturb each k-th step only.
      weight_dimension_numbers: As given to :func:`lorenza`.
      axis_name: Mapped axis over which the loss is per device (``shard_map``, ``pmap``).
      has_aux: Whether ``value_fn`` returns auxiliary output.

    Returns:
      A function ``(params, *args, opt_state, **kwargs) -> (value, grads)``, with ``has_aux``
      ``((value, aux), grads)``. ``value`` is the loss at the perturbed point, ``grads`` is a
      full gradient with the dtypes of ``params``.

    Raises:
      ValueError: If ``opt_state`` holds no state of this library, or one made for other
        parameters.
      TypeError: If ``value_fn`` returns no scalar.

    Examples:
      >>> import jax.numpy as jnp, optax, lorenza_optax
      >>> ascent = dict(rho=0.02)
      >>> loss = lambda params, x: jnp.mean((x @ params["kernel"]) ** 2)
      >>> tx = optax.chain(
      ...     optax.clip_by_global_norm(1.0), lorenza_optax.lorenza(1e-2, rank=4, **ascent)
      ... )
      >>> params, x = {"kernel": jnp.ones((16, 8))}, jnp.eye(16)
      >>> state = tx.init(params)
      >>> value_and_grad = lorenza_optax.perturbed_value_and_grad(loss, **ascent)
      >>> for _ in range(3):
      ...     value, grads = value_and_grad(params, x, opt_state=state)
      ...     updates, state = tx.update(grads, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(bool(loss(params, x) < 1))
      True
    """
    config = AscentConfig(
        rho, mu, num_probes, ascent, estimator, probe_batch_size, perturb_every, axis_name
    )

    def value_and_grad(params: Any, *args: Any, opt_state: Any, **kwargs: Any) -> tuple[Any, Any]:
        states = _find_states(opt_state)
        directions, probes, ready = _directions(params, states, config, weight_dimension_numbers)
        value, grads, _, _ = value_and_grad_at_ascent(
            lambda at: value_fn(at, *args, **kwargs),
            params,
            directions,
            probes,
            config,
            count=_array(states[0].count),
            ready=ready,
            has_aux=has_aux,
        )
        return value, grads

    return value_and_grad


def _find_states(opt_state: Any) -> list[Any]:
    is_ours = lambda node: isinstance(node, (LowRankState, ZoSamState))  # noqa: E731
    states = list(filter(is_ours, jax.tree.leaves(opt_state, is_leaf=is_ours)))
    if not states:
        raise ValueError(
            "opt_state holds no state of lorenza, adazo_sam or zo_sam_perturbation (found a"
            f" {type(opt_state).__name__}): pass the state of the optimizer that these gradients"
            " go to, such as TrainState.opt_state."
        )
    return states


def _array(leaf: Any) -> jax.Array:
    """A state's array, out of the box that NNX may keep it in."""
    return jax.tree.leaves(leaf)[0]


def _directions(
    params: Any, states: list[Any], config: AscentConfig, weight_dimension_numbers: Any
) -> tuple[Directions, Probe, jax.Array]:
    """The directions that all states span together, their probes, and whether all have any."""
    arrays = leaves_by_path(params)
    in_full = [isinstance(state.ascent, FullSpaceAscentState) for state in states]
    if any(in_full):
        if not all(in_full):
            raise ValueError(
                "opt_state holds both a state with an ascent in the full space (adazo_sam,"
                " zo_sam_perturbation) and one of lorenza: perturb by one of them only."
            )
        directions = full_space(arrays)
        return directions, _draw(directions, states[0], config), jnp.ones((), bool)

    numbers = dimension_numbers_by_path(weight_dimension_numbers, params, arrays)
    views, q, r, weights = {}, {}, {}, {}
    for state in states:
        left = {path: _array(factor) for path, factor in state.q.items()}
        right = {path: _array(factor) for path, factor in state.r.items()}
        if set(left) != set(right) and not config.never_perturbs:
            raise ValueError(
                "opt_state holds one factor of each subspace only, because the optimizer was made"
                " with rho=0: give it the same rho as perturbed_value_and_grad."
            )
        if overlap := sorted(set(left) & set(q)):
            raise ValueError(f"Two states in opt_state both project {', '.join(overlap)}.")
        own = {path: _view(path, arrays, numbers, left, right) for path in left if path in right}
        views, q, r = {**views, **own}, {**q, **left}, {**r, **right}
        family = in_subspace(own, left, right, arrays)
        weights |= _draw(family, state, config).weights
    # A state whose leaves all run in full never refreshes, and has nothing to wait for.
    refreshed = [_array(state.last_refresh) >= 0 for state in states if state.q]
    ready = jnp.all(jnp.stack([jnp.ones((), bool), *refreshed]))
    return in_subspace(views, q, r, arrays), Probe(weights, None), ready


def _draw(directions: Directions, state: Any, config: AscentConfig) -> Probe:
    ascent = state.ascent._replace(seed=_array(state.ascent.seed))
    return draw_probes(directions, ascent, _array(state.count), config)


def _view(
    path: str, arrays: dict[str, Any], numbers: dict[str, Any] | None, q: Any, r: Any
) -> MatrixView:
    """A projected leaf's view; its side does not matter, since Q and R are stored as such."""
    if path not in arrays:
        raise ValueError(
            f"opt_state projects a leaf {path!r} that params do not have: it was made for other"
            " parameters."
        )
    shape = arrays[path].shape
    try:
        view = matrix_view(shape, None if numbers is None else numbers[path], "left")
        known = numbers is not None or len(shape) == 2
        fits = known and q[path].shape[:-1] == (*view.batch, view.m) and r[path].shape[-1] == view.n
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"opt_state holds factors of shapes {q[path].shape} and {r[path].shape} for leaf"
            f" {path!r} of shape {shape}, which do not fit: pass the weight_dimension_numbers"
            " that the optimizer was given, and its own state."
        )
    return view
