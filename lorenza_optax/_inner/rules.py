"""Inner optimizers that Optax lacks, as transformations of the ``scale_by_*`` kind."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from lorenza_optax._base.checks import check_constant, check_decay
from lorenza_optax._linalg.newton_schulz import newton_schulz

__all__ = ["interpolated_ema", "is_elementwise", "orthogonalize", "scale_by_adam"]


def scale_by_adam(
    b1: Any, b2: Any, eps: Any, *, eps_before_correction: bool = False
) -> optax.GradientTransformationExtraArgs:
    """Optax's Adam, marked as elementwise: see :func:`is_elementwise`.

    The published code of GaLore adds ε to the root of the moment as it is
    (``eps_before_correction``): it folds the bias corrections into the step size, so that the
    update is m̂ / (√v̂ + ε / √(1 - β₂ᵗ)).
    """
    check_decay("b1", b1)
    check_decay("b2", b2)
    check_constant("eps", eps, 0)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        del extra_args
        correction = 1
        if eps_before_correction:
            correction = jnp.sqrt(1 - b2 ** (state.count + 1.0))
        return optax.scale_by_adam(b1, b2, eps / correction).update(updates, state, params)

    update.is_elementwise = True  # pyright: ignore[reportFunctionMemberAccess]
    return optax.GradientTransformationExtraArgs(optax.scale_by_adam(b1, b2, eps).init, update)


def is_elementwise(inner: optax.GradientTransformation) -> bool:
    """Whether an optimizer is known to treat each entry by itself, with an ``optax`` Adam's state.

    Only those of this module are known: of a transformation that somebody made it cannot be seen.
    """
    return getattr(inner.update, "is_elementwise", False)


def interpolated_ema(decay: Any) -> optax.GradientTransformation:
    """β₁ m + (1 - β₁) g, with the running mean m ← β₁ m + (1 - β₁) g."""
    check_decay("b1", decay)
    mean = optax.ema(decay, debias=False)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        means, state = mean.update(updates, state)
        mix = lambda m, g: decay * m + (1 - decay) * g  # noqa: E731
        return jax.tree.map(mix, means, updates), state

    return optax.GradientTransformation(mean.init, update)


def orthogonalize() -> optax.GradientTransformation:
    """Muon's step: each matrix ([b,] m, n) by :func:`newton_schulz`; other leaves as they are."""

    def orthogonal(update: Any, _: Any) -> Any:
        return newton_schulz(update) if update.ndim >= 2 else update

    return optax.stateless_with_tree_map(orthogonal)
