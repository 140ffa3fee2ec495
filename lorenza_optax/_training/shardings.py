"""How an optimizer's state is to be sharded, from how the parameters are."""

from __future__ import annotations

import math
from typing import Any

import jax
import optax
from jax.sharding import AxisType, NamedSharding

from lorenza_optax._base.paths import leaves_by_path

__all__ = ["state_shardings"]


def state_shardings(
    tx: optax.GradientTransformation, params: Any, param_shardings: Any = None
) -> Any:
    r"""The shardings of an optimizer's state that go with those of the parameters.

    A leaf that is not projected hands its sharding on to its moments. Of a projected one, seen
    as matrices ([b,] m, n), stacked layers included,

    .. math::
      Q_{[b,]\, m \times r}, \quad R_{[b,]\, r \times n}, \quad
      \text{moments}_{[b,]\, r \times n} \ (\text{or } r \times m)

    are sharded over the mesh axes that the parameter's own b, m and n are sharded over; the
    rank never is, and scalars are replicated. (Of several dimensions that make up m or n, it is
    those of the first that count.) Whatever else stands in the state, such as the accumulator
    of ``optax.MultiSteps`` or the moments of another optimizer in an ``optax.partition``, is
    sharded as what it is made of, and a dimension that its axes do not divide is replicated.

    Args:
      tx: Any Optax transformation, ours anywhere in it.
      params: The parameters, or their ``jax.eval_shape``.
      param_shardings: Their shardings, a tree like ``params`` of ``NamedSharding``, or one for
        all; None to take them from ``params``.

    Returns:
      A tree like ``tx.init(params)`` of ``NamedSharding``: the ``out_shardings`` of
      ``jax.jit(tx.init)`` and of the training step (else XLA may choose others for small arrays,
      and compile a second time for its own choice), and where a checkpoint is restored to. On a
      mesh with Explicit axes ``init`` shards its state so by itself, and ``update`` keeps it so.

    Raises:
      ValueError: If a leaf has no ``NamedSharding``, or another mesh than the rest.

    Examples:
      >>> import jax, jax.numpy as jnp, lorenza_optax
      >>> from jax.sharding import NamedSharding, PartitionSpec as P
      >>> mesh = jax.make_mesh((1,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> params = {"kernel": jnp.ones((16, 8)), "bias": jnp.ones(8)}
      >>> specs = {"kernel": P("fsdp", None), "bias": P()}
      >>> shardings = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
      >>> tx = lorenza_optax.lorenza(1e-2, rank=4)
      >>> for_state = lorenza_optax.state_shardings(tx, params, shardings)
      >>> state = jax.jit(tx.init, out_shardings=for_state)(params)
      >>> q, mu = state[0].q["kernel"], state[0].projected.mu["kernel"]
      >>> print(q.shape, tuple(q.sharding.spec), mu.shape, tuple(mu.sharding.spec))
      (16, 4) ('fsdp',) (4, 16) (None, 'fsdp')
    """
    leaves = leaves_by_path(params)
    mesh, specs = _mesh_and_specs(leaves, params if param_shardings is None else param_shardings)
    explicit = mesh.abstract_mesh.update(axis_types=(AxisType.Explicit,) * len(mesh.axis_names))
    # Types carry shardings on a mesh with Explicit axes, through whatever `init` makes of them.
    typed = [
        jax.ShapeDtypeStruct(
            leaf.shape,
            leaf.dtype,
            sharding=NamedSharding(explicit, _dividing(specs[path], leaf, mesh)),
        )
        for path, leaf in leaves.items()
    ]
    with jax.sharding.use_abstract_mesh(explicit):
        state = jax.eval_shape(tx.init, jax.tree.unflatten(jax.tree.structure(params), typed))

    def sharding(leaf: Any) -> NamedSharding:
        spec = () if leaf.sharding is None else tuple(leaf.sharding.spec)
        while spec and spec[-1] is None:
            spec = spec[:-1]  # as compiled programs write them: others would be traced again
        return NamedSharding(mesh, jax.P(*spec))

    return jax.tree.map(sharding, state)


def _dividing(spec: jax.P, leaf: Any, mesh: Any) -> jax.P:
    """The spec without axes that do not divide their dimension: it is replicated."""

    def kept(axes: Any, size: int) -> Any:
        names = axes if isinstance(axes, tuple) else () if axes is None else (axes,)
        return axes if size % math.prod(mesh.shape[name] for name in names) == 0 else None

    return jax.P(*(kept(axes, size) for axes, size in zip(spec, leaf.shape, strict=False)))


def _mesh_and_specs(leaves: dict[str, Any], given: Any) -> tuple[Any, dict[str, Any]]:
    """The one mesh, and each leaf's PartitionSpec."""
    if isinstance(given, NamedSharding):
        shardings = dict.fromkeys(leaves, given)
    else:
        shardings = leaves_by_path(given)
    shardings = {path: getattr(s, "sharding", s) for path, s in shardings.items()}
    meshes: dict[Any, str] = {}
    for path in leaves:
        sharding = shardings.get(path)
        if not isinstance(sharding, NamedSharding):
            found = "nothing" if sharding is None else f"a {type(sharding).__name__}"
            raise ValueError(
                f"state_shardings needs a NamedSharding for each parameter, and found {found}"
                f" for {path!r}. Pass param_shardings, a tree like params, or params that lie on a"
                " mesh."
            )
        meshes.setdefault(sharding.mesh, path)
    if len(meshes) != 1:
        places = ", ".join(f"{path!r} on {mesh}" for mesh, path in meshes.items())
        raise ValueError(f"state_shardings needs parameters on one mesh, found {places or 'none'}.")
    (mesh,) = meshes
    return mesh, {path: shardings[path].spec for path in leaves}
