"""Helpers for Flax, linen and NNX. Nothing else in the package imports it.

``lorenza`` needs none of them: they save the lines that a training loop would repeat.
"""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.training import train_state

from lorenza_optax._base.calls import without_aux
from lorenza_optax._base.checks import check_choice
from lorenza_optax._flax_layers import weight_dimension_numbers
from lorenza_optax._low_rank.state import LowRankState
from lorenza_optax._low_rank.update import apply_updates
from lorenza_optax._perturbation.find import find_states, refuse_wrapped, stages_in_front
from lorenza_optax._perturbation.perturbed import perturbed_value_and_grad
from lorenza_optax._training.subspace_gradients import subspace_value_and_grad

__all__ = ["TrainState", "nnx_train_step", "weight_dimension_numbers"]


class TrainState(train_state.TrainState):
    r"""Flax's ``TrainState`` whose ``apply_gradients`` hands extra arguments on to the optimizer.

    So a linen loop can give :func:`lorenza_optax.lorenza` the loss itself, and the gradient is
    taken at the ascent point, between refreshes in the subspaces only.

    Examples:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, lorenza_optax
      >>> from lorenza_optax.flax import TrainState
      >>> model, x = nn.Dense(8), jnp.ones((2, 16))
      >>> state = TrainState.create(
      ...     apply_fn=model.apply,
      ...     params=model.init(jax.random.key(0), x)["params"],
      ...     tx=lorenza_optax.lorenza(1e-2, rank=4, rho=0.02),
      ... )
      >>> @jax.jit
      ... def train_step(state, batch):
      ...     loss = lambda params, batch: jnp.mean(state.apply_fn({"params": params}, batch) ** 2)
      ...     return state.apply_gradients(value_fn=loss, batch=batch)
      >>> for _ in range(3):
      ...     state = train_step(state, x)
      >>> int(state.step), bool(lorenza_optax.diagnostics(state.opt_state)["perturbed"])
      (3, True)
    """

    def apply_gradients(self, *, grads: Any = None, **kwargs: Any) -> TrainState:
        """One update.

        Args:
          grads: Gradients like the parameters, or the ``SubspaceGradients`` of
            :func:`lorenza_optax.subspace_value_and_grad`; None where ``value_fn`` is given.
          **kwargs: Fields of the state, which are replaced, as in Flax's own method
            (``batch_stats=...``); all others (``value_fn=...`` and what it takes) go to
            ``tx.update``. A field that ``value_fn`` names, such as a ``dropout_key``, does both.

        Returns:
          The state after the update.
        """
        fields = {field.name for field in dataclasses.fields(self)}
        wanted = _named_by(kwargs.get("value_fn"), kwargs.get("ascent_fn"))
        replaced = {name: value for name, value in kwargs.items() if name in fields}
        extra = {n: value for n, value in kwargs.items() if n not in fields or n in wanted}
        if (
            grads is not None
            and not extra
            and jax.tree.structure(grads) == jax.tree.structure(self.params)
        ):
            return super().apply_gradients(grads=grads, **replaced)  # knows of fp8's own leaves
        if grads is None and "value_fn" in extra:
            _check_takes_gradient(self.opt_state, "apply_gradients(value_fn=...)")
        tx: Any = self.tx
        updates, opt_state = tx.update(grads, self.opt_state, self.params, **extra)
        return self.replace(
            step=self.step + 1,
            params=apply_updates(self.params, updates),
            opt_state=opt_state,
            **replaced,
        )


def _named_by(*functions: Callable[..., Any] | None) -> set[str]:
    """The arguments that functions name."""
    return {name for f in functions if f is not None for name in inspect.signature(f).parameters}


def _check_takes_gradient(opt_state: Any, call: str) -> None:
    """Raises, or warns, where an optimizer cannot take the gradient itself as one would expect."""
    refuse_wrapped(opt_state, f"{call} lets the optimizer take its gradient itself.")
    if stages_in_front(opt_state):
        warnings.warn(
            f"{call} lets the optimizer take its gradient itself, which stages of optax.chain in"
            " front of it do not see: put them behind it, name them as gradient_transform=, or"
            " take the gradient outside, with lorenza_optax.perturbed_value_and_grad or"
            ' nnx_train_step(gradient="perturbed").',
            stacklevel=3,
        )


def nnx_train_step(
    loss_fn: Callable[..., Any],
    *,
    gradient: str = "update",
    has_aux: bool = False,
    **arguments: Any,
) -> Callable[..., Any]:
    r"""A training step for a loss that is written on an NNX module.

    What the loss changes in the model (running statistics of ``nnx.BatchNorm``, counters of
    ``nnx.Rngs``), and in NNX objects among its arguments, is the same at all points that one step
    evaluates, so that dropout masks are those of one batch on both sides of a difference, and is
    changed once.

    Args:
      loss_fn: ``loss_fn(model, *args, **kwargs)`` to a scalar, or with ``has_aux`` to (scalar,
        aux).
      gradient: Who takes the gradient. "update": the optimizer itself, which is the cheapest;
        running statistics and aux then come from one more forward pass, at the unperturbed
        parameters. "perturbed": :func:`lorenza_optax.perturbed_value_and_grad`, a whole gradient,
        which other stages of a chain may act on. "subspace":
        :func:`lorenza_optax.subspace_value_and_grad`, low-rank gradients only.
      has_aux: Whether ``loss_fn`` returns auxiliary output.
      **arguments: Those of the function that takes the gradient: the same that the optimizer was
        given. None for "update".

    Returns:
      A function ``(model, optimizer, *args, **kwargs)`` that updates both and returns the loss
      at the perturbed point, with ``has_aux`` (loss, aux). ``optimizer`` is an
      ``nnx.Optimizer``; wrap the function in ``nnx.jit``. With "update" the loss of a step that was
      skipped, as its gradient was not finite, is nan.

    Raises:
      ValueError: For another ``gradient``.
      TypeError: For arguments where ``gradient`` takes none.

    Examples:
      >>> import jax.numpy as jnp, lorenza_optax
      >>> from flax import nnx
      >>> from lorenza_optax.flax import nnx_train_step
      >>> model = nnx.Linear(16, 8, rngs=nnx.Rngs(0))
      >>> optimizer = nnx.Optimizer(model, lorenza_optax.lorenza(1e-2, rank=4), wrt=nnx.Param)
      >>> train_step = nnx.jit(nnx_train_step(lambda model, x: jnp.mean(model(x) ** 2)))
      >>> losses = [train_step(model, optimizer, jnp.ones((2, 16))) for _ in range(3)]
      >>> print(bool(losses[-1] < losses[0]))
      True
    """
    check_choice("gradient", gradient, ("update", "perturbed", "subspace"))
    if gradient == "update" and arguments:
        raise TypeError(
            "gradient='update' takes no arguments of the ascent, they are the optimizer's:"
            f" got {', '.join(arguments)}."
        )

    def step(model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        graphdef, boxed, rest = nnx.split(model, optimizer.wrt, ...)
        params, rest = nnx.as_pure(boxed), nnx.as_pure(rest)
        opt_state = nnx.as_pure(optimizer.opt_state)
        arguments_of_loss, given = jax.tree.flatten((args, kwargs), is_leaf=_is_nnx)
        objects = [leaf for leaf in arguments_of_loss if _is_nnx(leaf)]
        graphdef_of_objects, state_of_objects = nnx.split(objects)
        state_of_objects = nnx.as_pure(state_of_objects)
        kinds: dict[Any, Any] = {}  # of the model's variables beside parameters, by path

        def loss(params: Any) -> Any:
            """(value, (aux, what the model keeps beside its parameters, what objects keep))."""
            copy = nnx.merge(graphdef, params, rest)
            copies = nnx.merge(graphdef_of_objects, state_of_objects)
            own = iter(copies)
            leaves = [next(own) if _is_nnx(leaf) else leaf for leaf in arguments_of_loss]
            args, kwargs = jax.tree.unflatten(given, leaves)
            found = loss_fn(copy, *args, **kwargs)
            value, aux = found if has_aux else (without_aux(found), None)
            new: Any = nnx.split(copy, optimizer.wrt, ...)[2]
            kinds.update({path: type(variable) for path, variable in nnx.to_flat_state(new)})
            return value, (aux, nnx.as_pure(new), nnx.as_pure(nnx.split(copies)[1]))

        if gradient == "update":
            # What depends on no parameter, as counters do, costs nothing: XLA drops the rest.
            _check_takes_gradient(opt_state, 'nnx_train_step(gradient="update")')
            _, (aux, *kept) = loss(params)
            before = find_states(opt_state)
            updates, opt_state = optimizer.tx.update(
                None, opt_state, params, value_fn=lambda at: loss(at)[0]
            )
            after = find_states(opt_state)
            # A low-rank state keeps no loss that is not finite, and counts the step as skipped.
            skipped = [
                state.skipped != before[place].skipped
                for place, state in after.items()
                if isinstance(state, LowRankState)
            ]
            value = jnp.where(
                jnp.any(jnp.array(skipped, bool)), jnp.nan, next(iter(after.values())).ascent.value
            )
        elif gradient == "perturbed":
            value_and_grad = perturbed_value_and_grad(loss, has_aux=True, **arguments)
            (value, (aux, *kept)), grads = value_and_grad(params, opt_state=opt_state)
            updates, opt_state = optimizer.tx.update(grads, opt_state, params)
        else:
            value_and_grad = subspace_value_and_grad(loss, has_aux=True, **arguments)
            (value, (aux, *kept)), grads, opt_state = value_and_grad(params, opt_state=opt_state)
            updates, opt_state = optimizer.tx.update(grads, opt_state, params)

        new_rest, new_objects = kept
        nnx.update(model, apply_updates(params, updates), _as_variables(new_rest, kinds))
        nnx.update(objects, new_objects)
        nnx.update(optimizer.opt_state, nnx.state(opt_state))
        optimizer.step[...] += 1
        return (value, aux) if has_aux else value

    return step


def _is_nnx(node: Any) -> bool:
    return isinstance(node, (nnx.Pytree, nnx.Variable))


def _as_variables(state: Any, kinds: dict[Any, Any]) -> Any:
    """A state without its variables, which the model may not have yet (``sow``), with them."""

    def value(path: Any) -> Any:
        node = state
        for key in path:
            node = node[key]
        return node

    return nnx.from_flat_state([(path, kind(value(path))) for path, kind in kinds.items()])
