"""Four tasks of the GLUE benchmark from tab-separated files, and the tokens of their texts.

The folder given as `--data-dir` holds one folder for each task, see `Task.layout`.
"""

import copy
import pathlib
from typing import NamedTuple

import numpy as np
from scipy import stats


class Example(NamedTuple):
    texts: tuple[str, ...]  # one sentence, or the two of a pair
    label: int | float


class Dataset(NamedTuple):
    train: list[Example]
    dev: list[Example]


class Layout(NamedTuple):
    train: tuple[str, ...]  # files
    dev: tuple[str, ...]
    columns: tuple[str, ...]
    header: bool  # the first line names the columns, and their order is as it says
    more: int = 0  # columns that some rows have behind these

    def describe(self, folder):
        files = ", ".join(f"{folder}/{name}" for name in self.train + self.dev)
        header = "with a first line that names the columns" if self.header else "without header"
        return f"{files}; UTF-8, tab-separated, {header}: {', '.join(self.columns)}"


class Task(NamedTuple):
    folder: str
    layouts: tuple[Layout, ...]  # where several are in use, the one whose files are there
    texts: tuple[str, ...]  # the columns of the sentences
    labels: tuple[str, ...]  # as the files write them; an example's label is the index here
    metrics: tuple[str, ...]  # those GLUE reports, keys of METRICS; the first is plotted
    max_len: int  # tokens: longer texts are rare
    target: str = "label"  # the column of what is to be predicted

    @property
    def layout(self):
        ways = "; or ".join(layout.describe(self.folder) for layout in self.layouts)
        values = " or ".join(self.labels) or "a number from 0 to 5"
        return f"Expected in --data-dir: {ways}. A {self.target} is {values}."


def _glue(*columns, header=True):
    return Layout(("train.tsv",), ("dev.tsv",), columns, header)


TASKS = {
    "rte": Task(
        folder="RTE",
        layouts=(_glue("index", "sentence1", "sentence2", "label"),),
        texts=("sentence1", "sentence2"),
        labels=("entailment", "not_entailment"),
        metrics=("accuracy",),
        max_len=128,
    ),
    "cola": Task(
        folder="CoLA",
        layouts=(
            Layout(
                ("in_domain_train.tsv",),
                ("in_domain_dev.tsv", "out_of_domain_dev.tsv"),  # GLUE's dev set is both
                ("source", "label", "mark", "sentence"),
                header=False,
            ),
            _glue("source", "label", "mark", "sentence", header=False),
        ),
        texts=("sentence",),
        labels=("0", "1"),
        metrics=("matthews",),
        max_len=64,
    ),
    "sst2": Task(
        folder="SST-2",
        layouts=(_glue("label", "sentence"),),
        texts=("sentence",),
        labels=("0", "1"),
        metrics=("accuracy",),
        max_len=64,
    ),
    "stsb": Task(
        folder="STS-B",
        layouts=(
            # The STS benchmark's own files; some of their rows end in the sources of the texts.
            Layout(
                ("sts-train.csv",),
                ("sts-dev.csv",),
                ("genre", "filename", "year", "index", "score", "sentence1", "sentence2"),
                header=False,
                more=2,
            ),
            _glue("index", "sentence1", "sentence2", "score"),
        ),
        texts=("sentence1", "sentence2"),
        labels=(),
        metrics=("pearson", "spearman"),
        max_len=96,
        target="score",
    ),
}
SAME_COLUMN = {"content": "sentence"}  # two names in use for SST-2's


def load(name, data_dir):
    """The Dataset of one of TASKS, its examples in the order of the files."""
    if name not in TASKS:
        raise SystemExit(f"Task {name!r} is not known; choose from {', '.join(TASKS)}.")
    task, root = TASKS[name], pathlib.Path(data_dir).expanduser()
    folder = root / task.folder
    present = [way for way in task.layouts if all((folder / file).is_file() for file in way.train)]
    layout = present[0] if present else task.layouts[0]
    paths = [[folder / file for file in split] for split in (layout.train, layout.dev)]
    for path in (path for split in paths for path in split):
        if not path.is_file():
            raise SystemExit(f"--data-dir {data_dir}: there is no file {path}. {task.layout}")
    return Dataset(
        *([row for path in split for row in _read(path, task, layout)] for split in paths)
    )


def _read(path, task, layout):
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except ValueError as error:
        raise SystemExit(f"{path}: not UTF-8 text ({error}). {task.layout}") from None
    # Split by hand: quotation marks are text here, and so are the odd line breaks of Unicode.
    rows = [line.removesuffix("\r").split("\t") for line in text.split("\n")]
    numbered = [(number, row) for number, row in enumerate(rows, start=1) if row != [""]]
    columns = layout.columns
    if layout.header and numbered:
        columns = [SAME_COLUMN.get(column, column) for column in numbered.pop(0)[1]]
        missing = [column for column in (*task.texts, task.target) if column not in columns]
        if missing:
            raise SystemExit(f"{path}: no column {', '.join(missing)}. {task.layout}")
    if not numbered:
        raise SystemExit(f"{path}: there are no examples in it. {task.layout}")
    examples = []
    for number, row in numbered:
        if not len(columns) <= len(row) <= len(columns) + layout.more:
            raise SystemExit(
                f"{path}, line {number}: {len(row)} columns, not {len(columns)}. {task.layout}"
            )
        fields = dict(zip(columns, row, strict=False))
        label = _label(fields[task.target], task)
        if label is None:
            raise SystemExit(
                f"{path}, line {number}: {task.target} {fields[task.target]!r}. {task.layout}"
            )
        examples.append(Example(tuple(fields[column] for column in task.texts), label))
    return examples


def _label(text, task):
    """What is to be predicted, or None if the text is not one."""
    if task.labels:
        return task.labels.index(text) if text in task.labels else None
    try:
        return float(text) if 0 <= float(text) <= 5 else None
    except ValueError:
        return None


def tokenize(tokenizer, examples, max_len):
    """A dict of arrays, as `bert.py` takes them: ids, mask and types (N, max_len), labels (N,).

    All are int32, but scores float32. A longer text is cut, of a pair the longer one first; a
    shorter one is padded.
    """
    tokenizer = copy.deepcopy(tokenizer)  # the settings below are of this call alone
    is_pair = len(examples[0].texts) == 2
    least = tokenizer.num_special_tokens_to_add(is_pair) + 1 + is_pair
    if max_len < least:
        raise SystemExit(f"max_len={max_len}: must be at least {least}, [CLS] and [SEP] included.")
    padding = tokenizer.padding or {}
    token = padding.get("pad_token", "[PAD]")
    if (pad_id := tokenizer.token_to_id(token)) is None:
        raise SystemExit(f"The tokenizer has no {token} token to pad with.")
    tokenizer.enable_truncation(max_len, strategy="longest_first")
    tokenizer.enable_padding(length=max_len, pad_id=pad_id, pad_token=token)
    rows = tokenizer.encode_batch([e.texts if is_pair else e.texts[0] for e in examples])
    columns = {
        "input_ids": [row.ids for row in rows],
        "attention_mask": [row.attention_mask for row in rows],
        "token_type_ids": [row.type_ids for row in rows],
    }
    labels = np.asarray([example.label for example in examples])
    kind = np.float32 if labels.dtype.kind == "f" else np.int32
    arrays = {name: np.asarray(column, dtype=np.int32) for name, column in columns.items()}
    return arrays | {"labels": labels.astype(kind)}


def accuracy(labels, predictions):
    return float(np.mean(np.asarray(labels) == np.asarray(predictions)))


def pearson(labels, predictions):
    """The correlation; 0 for predictions that are all the same, which have none."""
    labels, predictions = np.asarray(labels), np.asarray(predictions)
    if np.ptp(labels) == 0 or np.ptp(predictions) == 0:
        return 0.0
    return float(np.corrcoef(labels, predictions)[0, 1])


def spearman(labels, predictions):
    """The correlation of the ranks."""
    return pearson(stats.rankdata(labels), stats.rankdata(predictions))


METRICS = {
    "accuracy": accuracy,
    # Of two binary rows: guessing one label for all does not raise it.
    "matthews": pearson,
    "pearson": pearson,
    "spearman": spearman,
}
