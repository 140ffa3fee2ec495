"""Real text on every machine: the source of Python's own standard library, or `--data PATH`.

Everything here is deterministic: the order of the files, the split into train and validation
(by file, from a hash of its relative path), the validation windows, and the training batch,
which is a function of (seed, step) alone, so that a resumed run sees the batches that the
uninterrupted one would have seen.
"""

import functools
import hashlib
import os
import pathlib
import sysconfig
import zipfile
import zlib
from typing import Any, NamedTuple

import numpy as np

VALIDATION_SHARE = 20  # one file in so many is held out
END_OF_TEXT = "<|endoftext|>"  # BPE's first token, between documents; bytes use byte 0
# Tests are left out of the default corpus: many systems ship Python without them, and the text
# should be the same everywhere. Installed packages are not the standard library.
NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test"}

# Not allowed, not UTF-8; of members of a zip: encrypted, packed in an unknown way, damaged.
UNREADABLE = (OSError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error)


class Corpus(NamedTuple):
    train: np.ndarray  # tokens, one long row
    validation: np.ndarray
    bpe: Any  # the tokenizer, if it was trained just now and is not yet saved
    fingerprint: str  # of text and tokenizer: a resumed run must have the same
    description: str


class Document(NamedTuple):
    name: str  # path relative to the folder, with forward slashes
    text: str


def read_documents(data=None):
    """(documents in order, description). `data` is a file, a folder, or None for the default.

    Of a folder, zips are looked into.
    """
    if data is None:
        root = pathlib.Path(sysconfig.get_path("stdlib"))
        documents, _ = _read_folder(root, sorted(root.rglob("*.py")), skipped_folders=NOT_LIBRARY)
        if not documents:
            raise SystemExit(
                "The default corpus is the source of Python's standard library, but this Python "
                "has none on disk (a frozen or zipped installation?). Give a text file or a "
                "folder with --data PATH."
            )
        return documents, "Python standard library"
    path = pathlib.Path(data).expanduser()
    if not path.exists():
        raise SystemExit(f"--data {data}: no such file or folder. Give a text file or a folder.")
    if path.is_dir():
        documents, skipped = _read_folder(path, sorted(path.rglob("*")))
        if not documents:
            raise SystemExit(
                f"--data {data}: no text in this folder ({skipped} files looked at, all empty, "
                "unreadable or not UTF-8). Give a folder with text files."
            )
        return documents, f"{data} ({len(documents)} files, {skipped} skipped as not text)"
    try:
        text = _decode(path.read_bytes())
    except OSError as error:
        raise SystemExit(f"--data {data}: cannot be read ({error.strerror}).") from None
    except ValueError as error:
        raise SystemExit(
            f"--data {data}: not UTF-8 text ({error}). Convert it first, for example with "
            "iconv -t UTF-8, or give another file."
        ) from None
    if not text.strip():
        raise SystemExit(f"--data {data}: the file is empty. Give a file with text in it.")
    return [Document(path.name, text)], str(data)


def _read_folder(root, paths, skipped_folders=frozenset()):
    documents, skipped = [], 0
    for path in paths:
        relative = path.relative_to(root)
        hidden = any(part.startswith(".") for part in relative.parts)
        if hidden or not skipped_folders.isdisjoint(relative.parts[:-1]) or not path.is_file():
            continue
        for name, read in _files_of(path):
            try:
                text = _decode(read())
            except UNREADABLE:
                text = ""
            if text.strip():
                documents.append(Document(f"{relative.as_posix()}{name}", text))
            else:
                skipped += 1
    return documents, skipped


def _files_of(path):
    """(rest of the name, function that reads it): the file, or those in it if it is a zip."""
    if path.suffix != ".zip" or not zipfile.is_zipfile(path):
        return [("", path.read_bytes)]
    archive = zipfile.ZipFile(path)
    members = sorted(info.filename for info in archive.infolist() if not info.is_dir())
    return [(f"/{name}", functools.partial(archive.read, name)) for name in members]


def _decode(raw):
    text = raw.decode("utf-8-sig")
    if "\0" in text:
        raise ValueError("it holds zero bytes, as binary files do")
    return text


def split_documents(documents):
    """(train, validation): by file; a text of too few files is cut at nine tenths instead."""

    def held_out(document):
        digest = hashlib.sha256(document.name.encode()).digest()
        return int.from_bytes(digest[:8], "big") % VALIDATION_SHARE == 0

    validation = [document for document in documents if held_out(document)]
    train = [document for document in documents if not held_out(document)]
    if len(documents) >= VALIDATION_SHARE and validation and train:
        return train, validation
    text = "\n\n".join(document.text for document in documents)
    cut = len(text) * 9 // 10
    return [Document("first nine tenths", text[:cut])], [Document("last tenth", text[cut:])]


def fingerprint(documents):
    digest = hashlib.sha256()
    for document in documents:
        for part in document:
            raw = part.encode()
            digest.update(len(raw).to_bytes(8, "big") + raw)
    return digest.hexdigest()


def encode_bytes(documents):
    return np.frombuffer(b"\0".join(d.text.encode() for d in documents), dtype=np.uint8)


def train_bpe(documents, vocab_size):
    """A byte-level BPE tokenizer, so any text can be encoded and decoded without loss."""
    import tokenizers

    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + 1:
        raise SystemExit(
            f"--vocab-size {vocab_size}: BPE needs at least {len(alphabet) + 1} "
            "(256 bytes and the end of text). Use a larger one, or --tokenizer bytes."
        )
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in documents), trainer)
    return tokenizer


def encode_bpe(tokenizer, documents):
    end = [tokenizer.token_to_id(END_OF_TEXT)]
    encodings = tokenizer.encode_batch([document.text for document in documents])
    rows = [np.asarray(encoding.ids + end, dtype=np.uint32) for encoding in encodings]
    return np.concatenate(rows)


def tokenize(documents, description, tokenizer, vocab_size, seq_len, saved=None):
    """Splits and tokenizes; BPE tokens that `save` left in the folder `saved` are used again."""
    train, validation = split_documents(documents)
    key = f"{tokenizer}-{vocab_size}-{fingerprint(documents)}"
    bpe = None
    if tokenizer == "bytes":
        tokens = encode_bytes(train), encode_bytes(validation)
    elif (tokens := _saved_tokens(saved, key)) is None:
        print(f"Training a BPE tokenizer with {vocab_size} tokens ...", flush=True)
        bpe = train_bpe(train, vocab_size)
        tokens = encode_bpe(bpe, train), encode_bpe(bpe, validation)
    for name, row in zip(("training", "validation"), tokens, strict=True):
        if len(row) < seq_len + 1:
            raise SystemExit(
                f"{description}: the {name} part holds {len(row)} tokens, and one sequence needs "
                f"{seq_len + 1}. Give more text with --data, or a shorter --seq-len."
            )
    return Corpus(*tokens, bpe=bpe, fingerprint=key, description=description)


def save(data, folder):
    """Keeps a newly trained BPE tokenizer and its tokens in the run folder, for a resume."""
    if data.bpe is None:
        return
    data.bpe.save(str(folder / "tokenizer.json"))
    # Written aside and renamed: an interruption leaves no half file behind.
    unfinished = folder / "tokens.unfinished.npz"
    np.savez(unfinished, key=data.fingerprint, train=data.train, validation=data.validation)
    os.replace(unfinished, folder / "tokens.npz")


def _saved_tokens(folder, key):
    if folder is None or not (folder / "tokens.npz").exists():
        return None
    with np.load(folder / "tokens.npz") as saved:
        return (saved["train"], saved["validation"]) if str(saved["key"]) == key else None


def train_batch(tokens, seed, step, batch_size, seq_len):
    """Batch number `step`: (batch_size, seq_len + 1) random windows, a function of (seed, step)."""
    rng = np.random.default_rng([seed, step])
    starts = rng.integers(0, len(tokens) - seq_len, size=batch_size)
    return _windows(tokens, starts, seq_len)


def validation_batches(tokens, count, batch_size, seq_len):
    """`count` batches of windows spread evenly over the held-out text, always the same."""
    starts = np.linspace(0, len(tokens) - seq_len - 1, count * batch_size).astype(np.int64)
    windows = _windows(tokens, starts, seq_len)
    return windows.reshape(count, batch_size, seq_len + 1)


def _windows(tokens, starts, seq_len):
    return tokens[starts[:, None] + np.arange(seq_len + 1)].astype(np.int32)
