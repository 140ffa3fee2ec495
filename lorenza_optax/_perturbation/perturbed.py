"""The gradient at the ascent point for loops that cannot pass ``value_fn`` to ``update``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax

from lorenza_optax._ascent.ascent import AscentConfig
from lorenza_optax._ascent.directions import Directions, Probe, in_subspace
from lorenza_optax._ascent.gradient import NoAscentState, full_gradient, like_params
from lorenza_optax._ascent.surroundings import (
    Surroundings,
    applied,
    full_space_ascent,
    loss_of,
    of_state,
)
from lorenza_optax._base.paths import leaves_by_path, with_arrays
from lorenza_optax._factored.landscape import Displacement, Subspaces
from lorenza_optax._inner.inner import first_moment
from lorenza_optax._low_rank.in_update import perturbed_landscape
from lorenza_optax._perturbation.find import find_states
from lorenza_optax._plan.matrix_view import MatrixView, matrix_view
from lorenza_optax._plan.plan import dimension_numbers_by_path

__all__ = ["draws_anew", "perturbed_value_and_grad", "surroundings_of_states"]


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
    probe_rank: int | None = None,
    probe_factors: str = "svd",
    scale_probes: bool = False,
    ascent_fn: Callable[..., Any] | None = None,
    factored: bool = True,
    eta: optax.ScalarOrSchedule = 0.01,
    proj_type: str = "std",
    weight_dimension_numbers: Any = None,
    axis_name: Any = None,
    has_aux: bool = False,
) -> Callable[..., tuple[Any, Any]]:
    r"""Like ``jax.value_and_grad``, at the ascent point :math:`\theta + \rho A / \lVert A \rVert`.

    For training loops that call ``tx.update(grads, opt_state, params)`` and no more: linen's
    ``TrainState.apply_gradients``, gradient accumulation, clipping in front, other people's
    trainers. The subspace, the seed and the count are read from ``opt_state``, wherever in it
    :func:`lorenza` (or :func:`adazo_sam`, :func:`zo_sam_perturbation`, :func:`methods.sam`,
    :func:`methods.asam`) sits, in ``chain``, ``masked``, ``partition`` or ``MultiSteps``; no state
    is changed. Several states share one norm. The state of one of those four tells itself which
    ascent it is for, over all leaves; of ``ascent`` only "none" then has an effect. The gradient
    is that of ``update(..., value_fn=value_fn)`` with the same arguments: bit for bit in the same
    compiled program, to round-off across programs.

    Args:
      value_fn: ``value_fn(params, *args, **kwargs)`` to a scalar, or with ``has_aux`` to
        (scalar, aux).
      rho: Radius ρ, as in :func:`lorenza`; likewise the ascent's other arguments. Keep those
        that both functions take in one dict: the optimizer's own are not read. One that
        ``optax.inject_hyperparams`` changes is ``opt_state.hyperparams["rho"]``, inside ``jit``.
      mu: Smoothing radius μ.
      num_probes: Number q of probes.
      ascent: "zo", "subspace", "momentum", "signed_momentum" or "none". What perturbs all leaves
        perturbs frozen ones too: put ``jax.lax.stop_gradient`` on these in the loss.
      estimator: "auto", "jvp", "central" or "forward".
      probe_batch_size: How many probes are evaluated at once.
      perturb_every: Perturb each k-th step only.
      probe_rank: How many singular pairs probes use.
      probe_factors: "svd" or "momentum": the right factors of probes.
      scale_probes: Whether probes are scaled with the singular values.
      ascent_fn: The loss whose ascent is looked for, with the arguments of ``value_fn``.
      factored: Whether perturbed weights are kept factored.
      eta: η of :func:`methods.asam`.
      proj_type: As given to :func:`lorenza`.
      weight_dimension_numbers: Likewise.
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
        rho=rho,
        mu=mu,
        num_probes=num_probes,
        ascent=ascent,
        estimator=estimator,
        probe_batch_size=probe_batch_size,
        perturb_every=perturb_every,
        axis_name=axis_name,
        probe_rank=probe_rank,
        probe_factors=probe_factors,
        scale_probes=scale_probes,
        ascent_fn=ascent_fn,
        factored=factored,
        eta=eta,
    )

    def value_and_grad(params: Any, *args: Any, opt_state: Any, **kwargs: Any) -> tuple[Any, Any]:
        states, params = list(find_states(opt_state).values()), with_arrays(params)
        around = surroundings_of_states(params, states, config, weight_dimension_numbers, proj_type)
        near, move, _, _ = perturbed_landscape(
            config,
            around,
            states[0].count,
            params,
            loss_of(value_fn, has_aux, *args, **kwargs),
            applied(ascent_fn, *args, **kwargs),
            has_aux,
        )
        value, gradient = full_gradient(near, move, config)
        near.warn()
        return value, like_params(gradient, params)

    return value_and_grad


def surroundings_of_states(
    params: Any,
    states: list[Any],
    config: AscentConfig,
    weight_dimension_numbers: Any,
    proj_type: str,
) -> Surroundings:
    """What all states together say; their probes are drawn each from its own seed."""
    arrays = leaves_by_path(params)
    # A method that perturbs nothing by itself may stand behind a stage that does.
    own = [state for state in states if not isinstance(state.ascent, NoAscentState)]
    states = own if any(map(full_space_ascent, own)) else states
    kinds = {full_space_ascent(state) for state in states}
    if kinds != {None}:
        if len(kinds) > 1:
            raise ValueError(
                "opt_state holds both a state with an ascent in the full space (adazo_sam,"
                " zo_sam_perturbation, methods.sam, methods.asam) and one with another ascent:"
                " perturb by one of them only."
            )
        return of_state(config, {}, states[0])

    numbers = dimension_numbers_by_path(weight_dimension_numbers, params, arrays)
    found: list[Surroundings] = []
    for state in states:
        paths = list(state.q) + [path for path in state.r if path not in state.q]
        if draws_anew(state) and not config.never_perturbs:
            raise ValueError(
                "opt_state is of an optimizer that draws its subspaces anew at each update, so it"
                " holds none to perturb in. Pass rho=0.0, or put lorenza_optax.methods.sam or"
                " zo_sam_perturbation in front of the optimizer."
            )
        if overlap := sorted(
            path for path in paths if any(path in f.subspaces.views for f in found)
        ):
            raise ValueError(f"Two states in opt_state both project {', '.join(overlap)}.")
        views = {path: _view(path, arrays, numbers, proj_type, state) for path in paths}
        try:
            found.append(of_state(config, views, state))
        except KeyError:
            if isinstance(state.ascent, NoAscentState):
                raise ValueError(
                    "opt_state is of a method that never perturbs by itself and keeps nothing to"
                    f" probe along for ascent={config.ascent!r}: pass ascent='subspace', or,"
                    " if it keeps a first moment, ascent='momentum' or probe_factors='momentum', or"
                    " put lorenza_optax.methods.sam in front of it."
                ) from None
            raise ValueError(
                "opt_state does not hold what this ascent needs, because the optimizer was made"
                " with other arguments (rho=0, another ascent, probe_factors or scale_probes):"
                " give it and perturbed_value_and_grad the same."
            ) from None
    return _together(found)


def draws_anew(state: Any) -> bool:
    """Whether an optimizer has moments in subspaces that it does not keep."""
    return not state.q and not state.r and bool(first_moment(state.projected))


def _together(found: list[Surroundings]) -> Surroundings:
    def union(*parts: Any) -> Any:
        return {path: value for part in parts for path, value in part.items()}

    def draw(directions: Directions) -> Probe:
        weights = [one.draw(in_subspace(one.subspaces, one.partners)).weights for one in found]
        return Probe(union(*weights), None)

    # A state whose leaves all run in full never refreshes, and has nothing to wait for.
    return Surroundings(
        Subspaces(
            union(*(one.subspaces.views for one in found)),
            union(*(one.subspaces.projectors for one in found)),
        ),
        union(*(one.partners for one in found)),
        union(*(one.rows for one in found)),
        Displacement(
            union(*(one.moments.low for one in found)),
            union(*(one.moments.full for one in found)),
        ),
        draw,
        None,
        jnp.all(jnp.stack([one.ready for one in found])),
    )


def _view(
    path: str,
    arrays: dict[str, Any],
    numbers: dict[str, Any] | None,
    proj_type: str,
    state: Any,
) -> MatrixView:
    """A projected leaf's view; the side is also told by which factors the state holds."""
    if path not in arrays:
        raise ValueError(
            f"opt_state projects a leaf {path!r} that params do not have: it was made for other"
            " parameters, or by methods.owlore, whose layers lie in stacks of their own."
        )
    shape, q, r = arrays[path].shape, state.q.get(path), state.r.get(path)
    try:
        view = matrix_view(shape, None if numbers is None else numbers[path], proj_type)
        fits = numbers is not None or len(shape) == 2
        fits &= q is None or q.shape[:-1] == (*view.batch, view.m)
        fits &= r is None or (r.shape[:-2], r.shape[-1]) == (view.batch, view.n)
    except ValueError:
        fits = False
    if not fits:
        shapes = " and ".join(str(factor.shape) for factor in (q, r) if factor is not None)
        raise ValueError(
            f"opt_state holds factors of shapes {shapes} for leaf {path!r} of shape {shape}, which"
            " do not fit: pass the weight_dimension_numbers that the optimizer was given, and its"
            " own state."
        )
    left, right = (0 if q is None else q.shape[-1]), (0 if r is None else r.shape[-2])
    if left != right:  # the factor that projects has the whole rank
        view = dataclasses.replace(view, compressed="left" if left > right else "right")
    return view
