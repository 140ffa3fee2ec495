"""Which axes form the matrices of Flax's layers, read from the modules themselves."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import jax
from flax import linen, nnx

from lorenza_optax._base.paths import leaves_by_path
from lorenza_optax._plan.matrix_view import WeightDimensionNumbers
from lorenza_optax._plan.selection import default_choice

__all__ = ["weight_dimension_numbers"]

Numbers = WeightDimensionNumbers | None


def weight_dimension_numbers(model: Any, *args: Any, **kwargs: Any) -> dict[str, Numbers]:
    r"""The dimension numbers of a Flax model's parameters, for the argument of that name.

    Shapes alone do not tell an attention kernel (embed, heads, head_dim) from a convolution's
    or from a stack of scanned layers; the modules know. Chosen are the kernels of ``Dense``,
    ``Linear``, ``DenseGeneral``, ``LinearGeneral`` (and so of ``MultiHeadDotProductAttention``),
    ``Einsum``, ``Conv`` and ``ConvTranspose``, and matrices that a module of yours holds itself;
    axes added by ``scan`` and ``vmap`` are batch axes. Left out are embeddings (also where a head
    is tied to one), scales and biases. To leave out more, or take in an embedding, hand the
    result to :func:`lorenza_optax.select_leaves`.

    Args:
      model: A linen module, which is traced, or an NNX module.
      *args: What a linen module is called with; shapes are enough (``jax.ShapeDtypeStruct``),
        and what is no array, such as ``train=False``, is handed on as it is.
      **kwargs: Likewise.

    Returns:
      Dimension numbers, or None, by the path of each parameter.

    Raises:
      TypeError: If the model is no Flax module.

    Examples:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, lorenza_optax
      >>> from lorenza_optax.flax import weight_dimension_numbers
      >>> model, x = nn.MultiHeadDotProductAttention(num_heads=4), jnp.ones((1, 6, 32))
      >>> numbers = weight_dimension_numbers(model, x)
      >>> print(numbers["out/kernel"])
      WeightDimensionNumbers(reduction_axis=(0, 1), output_axis=(2,))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> plan = lorenza_optax.projection_plan(params, 4, weight_dimension_numbers=numbers)
      >>> sorted(plan.projected)
      ['key/kernel', 'out/kernel', 'query/kernel', 'value/kernel']
    """
    if isinstance(model, nnx.Module):
        return _of_nnx(model)
    if isinstance(model, linen.Module):
        return _of_linen(model, args, kwargs)
    raise TypeError(f"model must be a linen or NNX module, got {type(model).__name__}.")


def _of_linen(model: linen.Module, args: Any, kwargs: Any) -> dict[str, Numbers]:
    # Inside a scan a module sees the parameters of one layer: of all shapes in which a leaf was
    # seen, the one with the fewest axes is its own.
    own: dict[str, Any] = {}
    kernels: dict[str, Numbers] = {}

    def record(module: linen.Module) -> None:
        below = leaves_by_path(module.variables.get("params", {}))
        for name, leaf in below.items():
            path = "/".join((*module.path, name))
            if len(leaf.shape) <= len(own.get(path, leaf.shape)):
                own[path] = leaf.shape
        if "kernel" in below:
            found = _linen_kernel(module, len(below["kernel"].shape))
            if found is not None:
                kernels["/".join((*module.path, "kernel"))] = found

    def interceptor(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        result = call(*args, **kwargs)
        record(context.module)
        return result

    # Only arrays are traced: a flag such as `train` is one that a module asks about in Python.
    leaves, structure = jax.tree.flatten((args, kwargs))
    arrays = {i: leaf for i, leaf in enumerate(leaves) if hasattr(leaf, "shape")}

    def init(arrays: dict[int, Any]) -> Any:
        args, kwargs = structure.unflatten(arrays.get(i, leaf) for i, leaf in enumerate(leaves))
        with linen.intercept_methods(interceptor):
            return model.init(jax.random.key(0), *args, **kwargs)

    shapes = jax.eval_shape(init, arrays)
    return _of_leaves(shapes["params"], own, kernels)


def _linen_kernel(module: linen.Module, ndim: int) -> Numbers:
    """Of the kernel that a module holds, in the shape that the module itself sees."""
    if isinstance(module, linen.DenseGeneral):
        axis = module.axis if isinstance(module.axis, Sequence) else (module.axis,)
        return _general(len(module.batch_dims), len(axis), ndim)
    if isinstance(module, linen.Einsum) and module.einsum_str is not None:
        return _einsum(module.einsum_str)
    if isinstance(module, (linen.Conv, linen.ConvTranspose)):
        return _convolution(module, ndim)
    if isinstance(module, linen.Dense):
        return _general(0, ndim - 1, ndim)
    return None


def _of_nnx(model: nnx.Module) -> dict[str, Numbers]:
    own: dict[str, Any] = {}
    kernels: dict[str, Numbers] = {}
    for path, module in nnx.iter_modules(model):
        name = "/".join((*map(str, path), "kernel"))
        if isinstance(module, nnx.Linear):
            own[name] = (module.in_features, module.out_features)
            kernels[name] = _general(0, 1, 2)
        elif isinstance(module, nnx.LinearGeneral):
            batch = tuple(module.batch_axis.values())
            own[name] = (*batch, *module.in_features, *module.out_features)
            kernels[name] = _general(len(batch), len(module.in_features), len(own[name]))
        elif isinstance(module, (nnx.Conv, nnx.ConvTranspose)):
            own[name] = tuple(module.kernel_shape)
            kernels[name] = _convolution(module, len(own[name]))
        elif isinstance(module, nnx.Einsum):
            own[name] = tuple(module.kernel_shape)
            kernels[name] = _einsum(module.einsum_str)
    return _of_leaves(nnx.state(model, nnx.Param), own, kernels)


def _of_leaves(params: Any, own: dict[str, Any], kernels: dict[str, Numbers]) -> dict[str, Numbers]:
    """Of all leaves, given the shapes that modules see, and what is known of their kernels."""
    numbers: dict[str, Numbers] = {}
    for path, leaf in leaves_by_path(params).items():
        seen = own.get(path, leaf.shape)
        found = kernels[path] if path in kernels else default_choice(path, seen)[0]
        numbers[path] = _stacked(found, seen, leaf.shape)
    return numbers


def _general(batch: int, inputs: int, ndim: int) -> Numbers:
    """Batch axes, then those of the input, then those of the output."""
    split = batch + inputs
    return WeightDimensionNumbers(tuple(range(batch, split)), tuple(range(split, ndim)))


def _convolution(module: Any, ndim: int) -> Numbers:
    """The window, the input, the output; of a transposed kernel the output before the input."""
    if getattr(module, "transpose_kernel", False):
        return WeightDimensionNumbers((*range(ndim - 2), ndim - 1), (ndim - 2,))
    return _general(0, ndim - 1, ndim)


def _einsum(equation: str) -> Numbers:
    """The kernel's axes in ``"input,kernel->output"``; those in all three are batch axes."""
    inputs, output = equation.replace(" ", "").split("->")
    kernel = inputs.split(",")[1]
    if "." in kernel:
        return None
    rows = tuple(i for i, axis in enumerate(kernel) if axis not in output)
    given = inputs.split(",")[0]
    columns = tuple(i for i, a in enumerate(kernel) if a in output and a not in given)
    return WeightDimensionNumbers(rows, columns) if rows and columns else None


def _stacked(numbers: Numbers, own: tuple[int, ...], shape: tuple[int, ...]) -> Numbers:
    """The same in a leaf to which ``scan`` or ``vmap`` has added axes, in front if in doubt."""
    if numbers is None or own == shape:
        return numbers
    choices = itertools.combinations(range(len(shape)), len(own))
    for axes in reversed(list(choices)):
        if tuple(shape[axis] for axis in axes) == own:
            rows, columns = (tuple(axes[i] for i in tuple(part)) for part in numbers)  # type: ignore[arg-type]
            return WeightDimensionNumbers(rows, columns)
    return None
