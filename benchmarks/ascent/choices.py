"""The ascents that are compared, and the perturbation that each makes."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib

import lorenza_optax

BAR = 0.85  # of SAM's rise, by "subspace", for 2 passes


class Choice(NamedTuple):
    """An ascent: its passes, in units of one forward pass on the batch, and its arguments.

    Probes by forward mode cost one pass and one more each. In full space a tangent costs two,
    and AdaZo-SAM is cheaper by differences, 2 passes; the slope that it finds here, by forward
    mode, is the better one. "subspace" costs the forward pass and the gradient of the
    activations, but not of the weights.
    """

    passes: float
    arguments: dict[str, Any]
    is_random: bool = True
    in_full_space: bool = False


SAM, OWN, SUBSPACE = "SAM", "zo, q=1", "subspace"
HALF_BATCH = object()  # stands for the loss on half of the batch, in `Choice.arguments`
CHOICES = {
    SAM: Choice(3, {}, is_random=False),
    "AdaZo (full space), q=1": Choice(2, {}, in_full_space=True),
    OWN: Choice(2, {}),
    "zo, q=4": Choice(5, {"num_probes": 4}),
    "zo, q=16": Choice(17, {"num_probes": 16}),
    "zo scaled, q=4": Choice(5, {"num_probes": 4, "scale_probes": True}),
    "zo probe_rank=4, q=4": Choice(5, {"num_probes": 4, "probe_rank": 4}),
    "zo momentum factors, q=4": Choice(5, {"num_probes": 4, "probe_factors": "momentum"}),
    "momentum": Choice(0, {"ascent": "momentum"}, is_random=False),
    "signed_momentum": Choice(2, {"ascent": "signed_momentum"}, is_random=False),
    SUBSPACE: Choice(2, {"ascent": "subspace"}, is_random=False),
    "subspace, half batch": Choice(
        1, {"ascent": "subspace", "ascent_fn": HALF_BATCH}, is_random=False
    ),
}


def perturbation_by(choice, loss, rho):
    """(params, opt_state, batch) -> epsilon, as the library perturbs for this choice."""

    def with_point(params, batch):
        return loss(params, batch), params

    def on_half(params, batch):
        return loss(params, jax.tree.map(lambda x: x[: len(x) // 2], batch))

    named = {k: on_half if v is HALF_BATCH else v for k, v in choice.arguments.items()}
    value_and_grad = lorenza_optax.perturbed_value_and_grad(
        with_point, rho=rho, has_aux=True, **named
    )

    def perturbation(params, opt_state, batch):
        # The gradient at the perturbed point is not used, and so not computed.
        (_, point), _ = value_and_grad(params, batch, opt_state=opt_state)
        return jax.tree.map(jnp.subtract, point, params)

    return jax.jit(perturbation)


def perturbation_by_sam(rho):
    """(params, gradient) -> epsilon, as `optax.contrib.sam` perturbs."""
    ascent = optax.chain(optax.contrib.normalize(), optax.sgd(rho))
    sam = optax.contrib.sam(optax.identity(), ascent, opaque_mode=True)

    @jax.jit
    def perturbation(params, gradient):
        point, _ = sam.update(gradient, sam.init(params), params, grad_fn=lambda at, _: at)
        return jax.tree.map(jnp.subtract, point, params)

    return perturbation
