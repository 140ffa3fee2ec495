"""LORENZA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import optax

from lorenza_optax._base.checks import check_not_injected
from lorenza_optax._low_rank.arguments import scale_by, with_decay
from lorenza_optax._plan.selection import Rank
from lorenza_optax._residual.residual import DISCARD

__all__ = ["lorenza", "scale_by_lorenza"]


def scale_by_lorenza(
    rank: Rank = 128,
    update_proj_gap: int = 200,
    *,
    rho: optax.ScalarOrSchedule = 0.05,
    mu: optax.ScalarOrSchedule = 1e-3,
    num_probes: int = 1,
    scale: optax.ScalarOrSchedule = 1.0,
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
    stagger: bool = False,
    factored_updates: bool = False,
    gradient_transform: optax.GradientTransformation | None = None,
    factor_dtype: Any = None,
    moment_dtype: Any = None,
    weight_dimension_numbers: Any = None,
    subspace: str = "randomized_svd",
    axis_name: Any = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Rescales updates by LORENZA: :func:`lorenza` without weight decay and learning rate.

    .. math::
      g_t = \nabla f(\theta_t + \varepsilon_t), \quad \hat g_t = Q^\top g_t, \quad
      u_t = \mathrm{scale} \cdot Q \, \mathrm{Adam}(\hat g_t).

    Args:
      rank: Rank r of the subspaces, as in :func:`lorenza`; so are all that follow.
      update_proj_gap: Interval T between refreshes, in updates.
      rho: Radius ρ of the perturbation.
      mu: Smoothing radius μ.
      num_probes: Number q of probes.
      scale: Factor of the projected leaves' updates.
      b1: Adam's β₁.
      b2: Adam's β₂.
      eps: Adam's ε.
      base_optimizer: A ``scale_by_*`` that needs neither params nor the loss, instead of Adam.
      proj_type: Which side is compressed.
      moment_transport: How the inner state crosses a refresh.
      ascent: "zo", "subspace", "momentum", "signed_momentum" or "none".
      estimator: How slopes are taken.
      probe_batch_size: How many probes are evaluated at once.
      perturb_every: Perturb each k-th step only.
      probe_rank: How many singular pairs probes use.
      probe_factors: "svd" or "momentum": the right factors of probes.
      scale_probes: Whether probes are scaled with the singular values.
      ascent_fn: The loss whose ascent is looked for, instead of ``value_fn``.
      factored: Whether perturbed weights are kept factored.
      refresh: "gradient" or "sketch".
      stagger: Whether refreshes are spread over the updates.
      factored_updates: Whether updates are left as products.
      gradient_transform: Applied to the gradient before it is projected.
      factor_dtype: Dtype in which Q and R are kept.
      moment_dtype: Dtype in which moments are kept.
      weight_dimension_numbers: Which axes form the matrix of which leaf.
      subspace: "randomized_svd" or "svd".
      axis_name: Mapped axis over which the loss is per device.
      seed: Seed of sketches and probes.

    Returns:
      The transformation.

    Raises:
      ValueError, TypeError: As :func:`lorenza`.

    Examples:
      >>> import jax.numpy as jnp, optax, lorenza_optax
      >>> tx = optax.chain(
      ...     lorenza_optax.scale_by_lorenza(rank=4),
      ...     optax.scale_by_learning_rate(1e-2),
      ... )
      >>> params = {"kernel": jnp.ones((16, 8))}
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> print(updates["kernel"].shape)
      (16, 8)

    References:
      Refael, Arbel, Lindenbaum, Tirer, `LORENZA <https://arxiv.org/abs/2502.19571>`_, 2025
    """
    # The signature is spelled out three times because inject_hyperparams reads it.
    return scale_by(**locals(), residual=DISCARD)


def lorenza(
    learning_rate: optax.ScalarOrSchedule,
    rank: Rank = 128,
    update_proj_gap: int = 200,
    *,
    rho: optax.ScalarOrSchedule = 0.05,
    mu: optax.ScalarOrSchedule = 1e-3,
    num_probes: int = 1,
    scale: optax.ScalarOrSchedule = 1.0,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    base_optimizer: optax.GradientTransformation | None = None,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any = None,
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
    stagger: bool = False,
    factored_updates: bool = False,
    gradient_transform: optax.GradientTransformation | None = None,
    factor_dtype: Any = None,
    moment_dtype: Any = None,
    weight_dimension_numbers: Any = None,
    subspace: str = "randomized_svd",
    axis_name: Any = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""LORENZA: Adam in a low-rank gradient subspace, at a sharpness-aware point.

    Every T updates the randomized SVD of the current gradient, :math:`G \approx Q \,
    \mathrm{diag}(s)\, R`, gives each weight matrix (m, n) a subspace of rank r. In between,
    with :math:`u_j \sim N(0, I_r)` per matrix and :math:`P_j = Q\,\mathrm{diag}(u_j) R` in all
    matrices at once,

    .. math::
      d_j &= \frac{f(\theta + \mu P_j) - f(\theta - \mu P_j)}{2\mu}, \quad
      A = \frac1q \sum_{j=1}^q d_j P_j, \quad
      \varepsilon_t = \rho \frac{A}{\lVert A \rVert} \\
      \hat g_t &= Q^\top \nabla f(\theta_t + \varepsilon_t), \quad
      N_t = \mathrm{Adam}(\hat g_t), \quad
      \theta_{t+1} = \theta_t - \gamma\,(\mathrm{scale}\, Q N_t + \lambda \theta_t) .

    The optimizer keeps r (m + n) + 2 r max(m, n) numbers a matrix where Adam keeps 2 m n.
    Leaves that are not projected (see :func:`projection_plan`) run the inner optimizer in full
    and are not perturbed.

    Positive ρ ascends, as in SAM; the published formula has a minus sign in front of the sum,
    which a negative ρ gives. If A is zero or not finite the step is not perturbed. A gradient
    that is not finite skips the step: a zero update (only weight decay, a later stage, acts), no
    change of factors and moments, and a refresh that was due stays due.

    Two ways to take the gradient at the perturbed point: pass ``value_fn`` (and the arguments
    that it names) to ``update``, which then ignores the gradient it is given (None will do);
    or, in loops that cannot, use :func:`perturbed_value_and_grad` and then ``update`` as usual.
    Without either, ``update`` makes a plain low-rank step on the given gradient. Stages in
    front of this one in a chain never see a gradient that is taken inside ``update``: put
    clipping into ``gradient_transform``. Losses must be those of the whole batch; under
    ``shard_map`` or ``pmap`` name the mapped axis in ``axis_name``.

    Args:
      learning_rate: Step size γ, a float or a schedule.
      rank: Rank r of the subspaces; leaves with min(m, n) <= r are not projected. A tree of
        ranks (or a prefix of one), or a function from a leaf's path and shape to its rank, gives
        each leaf its own; 0 is for leaves that run in full.
      update_proj_gap: Interval T between refreshes, in updates.
      rho: Radius ρ of the perturbation, its Frobenius norm over all projected leaves, in units
        of the parameters; a schedule may give it. 0 turns the ascent off, and saves half of a
        step's FLOPs. (Of the published ascent no radius stood out in benchmarks/RESULTS.md; the
        other kinds, which see where the loss rises, need SAM's radii, and smaller ones where
        training starts from scratch.)
      mu: Smoothing radius μ of the differences; unused by ``estimator="jvp"``.
      num_probes: Number q of probes a step; evaluated together.
      scale: Factor of the projected leaves' updates, a float or a schedule (GaLore's α).
      b1: Decay β₁ of Adam's first moment.
      b2: Decay β₂ of Adam's second moment.
      eps: Adam's ε, outside the root.
      base_optimizer: Any Optax transformation of the ``scale_by_*`` kind instead of Adam that needs
        neither params nor the loss: no learning rate, no sign flip. It sees the low-rank gradients
        of projected leaves, and in a state of its own the full gradients of the others.
      weight_decay: Decoupled weight decay λ, a float or a schedule.
      mask: Optax's weight-decay mask; it has no say in which leaves are projected.
      proj_type: "std" compresses the shorter side of each matrix, of a square the rows, the input,
        as GaLore's code (moments are r × max(m, n)), "reverse_std" the longer one (least memory; as
        ``optax.contrib.galore``), "left" the rows, "right" the columns.
      moment_transport: At a refresh "keep" leaves the inner state as it is (GaLore), "reset"
        makes it new, "rotate" carries the moments over to the new basis (LDAdam). None was best
        everywhere in benchmarks/RESULTS.md.
      ascent: How A is found. "zo": the published probes. "subspace": the exact direction, by one
        more backward pass in the subspace; leaves that are not projected are perturbed too, by
        their own gradient, and frozen ones as well: put ``jax.lax.stop_gradient`` on these in the
        loss. "momentum": the first moment, at no extra pass; "signed_momentum" turns it uphill
        by one probe. "none": not at all.
      estimator: "jvp" takes each slope d_j exactly by forward-mode differentiation, "central"
        and "forward" by differences of the loss; "auto" is "jvp", or "central" where the loss
        has no forward-mode rule (``jax.custom_vjp``).
      probe_batch_size: How many probes are evaluated at once; None for all, which share the
        weights and hold their own activations.
      perturb_every: Perturb each k-th step only; the others cost no extra pass.
      probe_rank: Probes use the leading so many singular pairs only: less variance, and R is
        kept with so many rows. None for r.
      probe_factors: "svd" keeps the right factors R of the last refresh; "momentum" takes the
        normalized rows of the first moment instead, which need no memory.
      scale_probes: Whether u is scaled with the singular values, so that probes prefer the
        directions in which the gradient was large.
      ascent_fn: Another loss for the ascent, for example on a part of the batch; it gets those
        extra arguments of ``update`` that it names, as ``value_fn`` does.
      factored: Whether losses are evaluated as x W + (x Q) N, without a copy of the weights.
        Leaves that the loss uses otherwise than linearly are perturbed plainly, and named in a
        warning.
      refresh: "gradient" takes new subspaces from the randomized SVD of a full gradient, as
        published. "sketch" takes them from products of the gradient with the old ones, which the
        backward pass at a refresh yields without ever forming a full gradient; they serve from
        the next update on, and the first three updates all refresh. A refresh from a gradient
        that is given to ``update`` is always of the first kind.
      stagger: Spreads refreshes over the T updates after the first, a few matrices at each;
        needs ``refresh="gradient"``, and takes a full gradient at every update. Matrices whose
        turn falls on a skipped update wait for the next interval.
      factored_updates: Leaves updates of projected leaves as products, for
        :func:`apply_updates`, which adds them in place.
      gradient_transform: An Optax transformation applied to the gradient before it is
        projected, such as ``optax.clip_by_global_norm(1.0)``. It sees all of the gradient,
        which is then formed at every update.
      factor_dtype: Dtype in which Q and R are kept; None for that of the parameters.
      moment_dtype: "float32" (also None), or rounded stochastically "bfloat16" or "int8": 8-bit
        codes with a scale for each 256 entries; float32 below 4096, or 64 along the last axis.
      weight_dimension_numbers: Which axes form the matrix of which leaf, as in
        :func:`projection_plan`: for scanned layers, attention kernels, or a choice of layers.
      subspace: "randomized_svd", or "svd" for a full decomposition; of gradients, not sketches.
      axis_name: Mapped axis over which the loss is per device; slopes and gradients are
        averaged over it.
      seed: Seed of sketches and probes. The same seed and state give the same bits.

    Returns:
      ``optax.chain(scale_by_lorenza(...), add_decayed_weights, scale_by_learning_rate)``.

    Raises:
      ValueError, TypeError: At construction for arguments out of range; at ``init`` for leaves
        that are not floats, dimension numbers that do not fit, a ``base_optimizer`` that needs
        params; at ``update`` for a ``value_fn`` that returns no scalar, or that is given inside
        ``masked``, ``partition``, ``MultiSteps`` or ``apply_if_finite``.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, lorenza_optax
      >>> def loss(params, x, y):
      ...     return jnp.mean((jnp.tanh(x @ params["in"]) @ params["out"] - y) ** 2)
      >>> keys = jax.random.split(jax.random.key(0), 3)
      >>> params = {"in": 0.3 * jax.random.normal(keys[0], (16, 32)),
      ...           "out": 0.3 * jax.random.normal(keys[1], (32, 8))}
      >>> x = jax.random.normal(keys[2], (64, 16))
      >>> y = jnp.sin(x[:, :8])
      >>> tx = lorenza_optax.lorenza(1e-2, rank=4, update_proj_gap=10)
      >>> opt_state = tx.init(params)
      >>> @jax.jit
      ... def step(params, opt_state, x, y):
      ...     updates, opt_state = tx.update(
      ...         None, opt_state, params, value_fn=loss, x=x, y=y)
      ...     return optax.apply_updates(params, updates), opt_state
      >>> before = loss(params, x, y)
      >>> for _ in range(30):
      ...     params, opt_state = step(params, opt_state, x, y)
      >>> print(bool(loss(params, x, y) < 0.7 * before))
      True

    References:
      Refael, Arbel, Lindenbaum, Tirer, `LORENZA <https://arxiv.org/abs/2502.19571>`_, 2025

      Zhao et al., `GaLore <https://arxiv.org/abs/2403.03507>`_, 2024

      Foret et al., `Sharpness-Aware Minimization <https://arxiv.org/abs/2010.01412>`_, 2021
    """
    check_not_injected("mask", mask)
    chosen = dict(locals())
    behind = [chosen.pop(name) for name in ("weight_decay", "mask", "learning_rate")]
    scaled = scale_by(**chosen, residual=DISCARD)
    return with_decay(scaled, *behind, factored_updates=factored_updates)
