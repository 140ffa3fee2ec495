"""The loss near θ: at W + P N for projected leaves, without forming the sum."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp

from lorenza_optax._base.calls import check_scalar
from lorenza_optax._base.mesh import in_auto_mode
from lorenza_optax._base.noise import Noise, Noisy
from lorenza_optax._base.paths import leaves_by_path
from lorenza_optax._factored.interpreter import Materialized, evaluate
from lorenza_optax._factored.traced import casts, formed, trace, weight_at
from lorenza_optax._factored.weight import materialize
from lorenza_optax._linalg.decompositions import matmul
from lorenza_optax._plan.matrix_view import MatrixView

__all__ = ["Displacement", "Landscape", "Rows", "Subspaces", "landscape", "multiplied"]

Arrays = Mapping[str, jax.Array]


class Subspaces(NamedTuple):
    """The subspaces of all projected leaves, by path.

    Attributes:
      views: How each leaf is a matrix.
      projectors: P ([b,] k, r), in the oriented view of the leaf (see :class:`MatrixView`).
    """

    views: Mapping[str, MatrixView]
    projectors: Arrays


class Rows(NamedTuple):
    """N = diag(u) K, not multiplied out: in a scan over layers that is done layer by layer.

    Attributes:
      factors: u ([b,] r).
      rows: K ([b,] r, l), in any dtype.
    """

    factors: jax.Array
    rows: jax.Array


def multiplied(low: Any) -> jax.Array:
    """N as an array."""
    if not isinstance(low, Rows):
        return low
    return low.factors[..., None] * low.rows.astype(low.factors.dtype)


class Displacement(NamedTuple):
    """A move of the parameters.

    Attributes:
      low: N ([b,] r, l) by path, an array or :class:`Rows`: a projected leaf moves by P N.
      full: Moves of other leaves, in the leaf's shape; or as :class:`Noise`, which is drawn where
        the loss uses the leaf.
    """

    low: Mapping[str, Any]
    full: Mapping[str, Any]

    def scaled(self, factor: jax.typing.ArrayLike) -> Displacement:
        def scale(move: Any) -> Any:
            if isinstance(move, Noise):
                return move.scaled(factor)
            if isinstance(move, Rows):
                return move._replace(factors=scale(move.factors))
            return (factor * move).astype(move.dtype)

        return jax.tree.map(scale, self, is_leaf=lambda move: isinstance(move, (Noise, Rows)))


class Landscape(NamedTuple):
    """A loss and the point θ.

    Attributes:
      at: (displacement, leaves=θ, vanishes=False, products=None) -> what the loss returns there.
        ``leaves`` replaces θ's own (to differentiate by them); with ``vanishes`` the displacement
        is known to be zero, and only its derivative is computed; ``products`` adds further
        pairs (a ([b,] k, s), b ([b,] s, l)), several by path, whose product is zero.
      leaves: θ by path, in the dtypes in which it is evaluated.
      seen: Leaves whose sum with a displacement had to be formed, and the primitive that did.
      has_aux: Whether the loss returns auxiliary output too.
    """

    at: Callable[..., Any]
    leaves: dict[str, jax.Array]
    seen: Materialized
    has_aux: bool

    def value(self, move: Displacement, leaves: Arrays | None = None, **kwargs: Any) -> jax.Array:
        """The scalar alone."""
        result = self.at(move, self.leaves if leaves is None else leaves, **kwargs)
        return result[0] if self.has_aux else result

    def warn(self, can_form_all: bool = True) -> None:
        """Says once, while tracing, which leaves could not be kept factored."""
        if self.seen:
            uses = ", ".join(f"{path!r} ({name})" for path, name in sorted(self.seen.items()))
            hint = " Pass factored=False to evaluate all leaves so and silence this."
            hint = hint if can_form_all else ""
            warnings.warn(
                "value_fn uses some projected leaves in a way that needs the perturbed weight"
                f" itself: {uses}. The numbers are the same, but these leaves save neither memory"
                " nor time." + hint,
                stacklevel=2,
            )


def landscape(
    loss: Callable[[Any], Any],
    params: Any,
    subspaces: Subspaces,
    *,
    full_paths: frozenset[str] = frozenset(),
    keep_factored: bool = True,
    noisy: bool = False,
    has_aux: bool = False,
) -> Landscape:
    """The loss as a function of displacements from θ.

    Args:
      loss: Parameters to a scalar, or with ``has_aux`` to (scalar, aux).
      params: θ.
      subspaces: Where projected leaves may move.
      full_paths: Leaves that may move freely.
      keep_factored: Whether to evaluate x (W + P N) as x W + (x P) N.
      noisy: Whether moves of ``full_paths`` are :class:`Noise`.
      has_aux: Whether ``loss`` returns auxiliary output too.
    """
    treedef, arrays = jax.tree.structure(params), leaves_by_path(params)
    views, projectors = subspaces.views, subspaces.projectors
    seen = Materialized()

    def checked(leaves: Arrays) -> Any:
        # By path: what has been through a transformation of jax is sorted by its keys.
        result = loss(jax.tree.unflatten(treedef, [leaves[path] for path in arrays]))
        check_scalar(result, has_aux)
        return result

    # Along pieces of vectors nothing is displaced, so such leaves need not be wide.
    cut = any(view.granularity != 1 for view in views.values())
    if cut or not (noisy or (views and keep_factored)):
        wide = _wide_enough(checked, arrays, full_paths | frozenset(() if cut else views))
        return Landscape(_plain_evaluation(checked, wide, subspaces), wide, seen, has_aux)

    traced, rebuild = trace(checked, arrays)
    # Formed in bfloat16, W + P N would be W: leaves whose sum is needed must be wider, and where
    # the loss casts them first, the sum is formed before.
    narrow = {path for path in views if jnp.finfo(arrays[path].dtype).bits < 32}
    found = formed(traced, arrays, views) if narrow or casts(traced) else Materialized()
    wide = _wide_enough(checked, arrays, full_paths | (narrow & set(found)))
    if any(wide[path].dtype != leaf.dtype for path, leaf in arrays.items()):
        traced, rebuild = trace(checked, wide)
        found = formed(traced, wide, views) if found else found
    rounded = {path for path in found.rounded if jnp.finfo(wide[path].dtype).bits >= 32}
    seen.update(found)

    def at(
        move: Displacement,
        leaves: Arrays = wide,
        *,
        vanishes: bool = False,
        products: Mapping[str, Sequence[Any]] | None = None,
    ) -> Any:
        args = []
        for path in arrays:
            leaf = leaves[path]
            if isinstance(noise := move.full.get(path), Noise):
                # Of a narrow leaf no wide copy is needed.
                base = arrays[path] if leaves is wide else leaf
                args.append(Noisy(base, noise, leaf.dtype, vanishes))
                continue
            if path in move.full:
                leaf = leaf + move.full[path].astype(leaf.dtype)
            terms = []
            if path in move.low:
                low, factors = move.low[path], None
                if isinstance(low, Rows):
                    factors, low = low
                pair = views[path].product(projectors[path], low)
                terms.append((*pair, vanishes, factors))
            for pair in (products or {}).get(path, ()):
                terms.append((*views[path].product(*pair), True, None))
            weight = weight_at(path, leaf, views.get(path), terms)
            args.append(materialize(weight) if terms and path in rounded else weight)
        return rebuild(evaluate(traced, args, seen))

    return Landscape(at, wide, seen, has_aux)


def _plain_evaluation(
    loss: Callable[[Arrays], Any], arrays: Arrays, subspaces: Subspaces
) -> Callable[..., Any]:
    """The same by forming W + P N."""

    def moved(path: str, leaf: jax.Array, pairs: list[Any]) -> jax.Array:
        def total(leaf: jax.Array, pairs: list[Any]) -> jax.Array:
            view = subspaces.views[path]
            for a, b in pairs:
                left, right = view.product(a.astype(leaf.dtype), b.astype(leaf.dtype))
                leaf = leaf + view.leaf(matmul(left, right))
            return leaf

        return in_auto_mode(total, leaf, pairs, like=leaf)

    def at(
        move: Displacement,
        leaves: Arrays = arrays,
        *,
        vanishes: bool = False,
        products: Mapping[str, Sequence[Any]] | None = None,
    ) -> Any:
        del vanishes
        point = dict(leaves)
        for path, leaf in point.items():
            if path in move.full:
                leaf = leaf + move.full[path].astype(leaf.dtype)
            pairs = []
            if path in move.low:
                pairs.append((subspaces.projectors[path], multiplied(move.low[path])))
            for a, b in (products or {}).get(path, ()):
                if pairs and a is pairs[0][0]:  # one product of the leaf's size is enough
                    pairs[0] = (a, pairs[0][1] + b)
                else:
                    pairs.append((a, b))
            point[path] = moved(path, leaf, pairs) if pairs else leaf
        return loss(point)

    return at


def _wide_enough(
    loss: Callable[[Arrays], Any], arrays: dict[str, jax.Array], paths: frozenset[str]
) -> dict[str, jax.Array]:
    """The leaves, those that are displaced in at least float32, so that ε is not rounded away.

    A displacement is smaller than a bfloat16 step of most weights. Where a mixture of dtypes
    does not go through the loss (a scan's carry must keep its dtype), all leaves are widened.
    """
    wide = {
        path: leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))
        for path, leaf in arrays.items()
    }
    mixed = {path: wide[path] if path in paths else leaf for path, leaf in arrays.items()}
    if all(leaf.dtype == mixed[path].dtype for path, leaf in arrays.items()):
        return arrays
    abstract = lambda point: jax.eval_shape(lambda p: (loss(p), None)[1], point)  # noqa: E731
    abstract(arrays)  # what is wrong with the loss itself is raised as it is
    failure: Exception | None = None
    for candidate in (mixed, wide):
        try:
            abstract(candidate)
            return candidate
        except TypeError as error:
            failure = error
    raise TypeError(
        "value_fn does not accept float32 parameters, which a perturbation needs: in"
        f" {', '.join(sorted({str(leaf.dtype) for leaf in arrays.values()}))} it would be rounded"
        " away. Let it cast its activations where it needs a fixed dtype (a scan's carry), or"
        " pass rho=0."
    ) from failure
