"""Three tasks of the GLUE benchmark from tab-separated files, and batches of their tokens.

The folder given as `--data-dir` holds one folder for each task, see `Task.layout`. As in
`corpus.py` everything is deterministic: a training batch is a function of (seed, step) alone.
"""

import copy
import pathlib
from typing import NamedTuple

import numpy as np


class Example(NamedTuple):
    texts: tuple[str, ...]  # one sentence, or the two of a pair
    label: int


class Dataset(NamedTuple):
    train: list[Example]
    dev: list[Example]


class Task(NamedTuple):
    folder: str
    train: tuple[str, ...]  # files
    dev: tuple[str, ...]
    columns: tuple[str, ...]
    header: bool  # the first line names the columns, and their order is as it says
    texts: tuple[str, ...]  # the columns of the sentences
    labels: tuple[str, ...]  # as the files write them; an example's label is the index here
    metric: str  # the one GLUE reports, a key of METRICS

    @property
    def layout(self):
        files = ", ".join(f"{self.folder}/{name}" for name in self.train + self.dev)
        header = "with a first line that names the columns" if self.header else "without header"
        return (
            f"Expected in --data-dir: {files}; UTF-8, tab-separated, {header}: "
            f"{', '.join(self.columns)}. A label is {' or '.join(self.labels)}."
        )


TASKS = {
    "rte": Task(
        folder="RTE",
        train=("train.tsv",),
        dev=("dev.tsv",),
        columns=("index", "sentence1", "sentence2", "label"),
        header=True,
        texts=("sentence1", "sentence2"),
        labels=("entailment", "not_entailment"),
        metric="accuracy",
    ),
    "cola": Task(
        folder="CoLA",
        train=("in_domain_train.tsv",),
        dev=("in_domain_dev.tsv", "out_of_domain_dev.tsv"),  # GLUE's dev set is both
        columns=("source", "label", "mark", "sentence"),
        header=False,
        texts=("sentence",),
        labels=("0", "1"),
        metric="matthews",
    ),
    "sst2": Task(
        folder="SST-2",
        train=("train.tsv",),
        dev=("dev.tsv",),
        columns=("label", "sentence"),
        header=True,
        texts=("sentence",),
        labels=("0", "1"),
        metric="accuracy",
    ),
}
SAME_COLUMN = {"content": "sentence"}  # two names in use for SST-2's


def load(name, data_dir):
    """The Dataset of one of TASKS, its examples in the order of the files."""
    if name not in TASKS:
        raise SystemExit(f"Task {name!r} is not known; choose from {', '.join(TASKS)}.")
    task, root = TASKS[name], pathlib.Path(data_dir).expanduser()
    paths = [[root / task.folder / file for file in split] for split in (task.train, task.dev)]
    for path in (path for split in paths for path in split):
        if not path.is_file():
            raise SystemExit(f"--data-dir {data_dir}: there is no file {path}. {task.layout}")
    return Dataset(*([row for path in split for row in _read(path, task)] for split in paths))


def _read(path, task):
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except ValueError as error:
        raise SystemExit(f"{path}: not UTF-8 text ({error}). {task.layout}") from None
    # Split by hand: quotation marks are text here, and so are the odd line breaks of Unicode.
    rows = [line.removesuffix("\r").split("\t") for line in text.split("\n")]
    numbered = [(number, row) for number, row in enumerate(rows, start=1) if row != [""]]
    columns = task.columns
    if task.header and numbered:
        columns = [SAME_COLUMN.get(column, column) for column in numbered.pop(0)[1]]
        missing = [column for column in (*task.texts, "label") if column not in columns]
        if missing:
            raise SystemExit(f"{path}: no column {', '.join(missing)}. {task.layout}")
    if not numbered:
        raise SystemExit(f"{path}: there are no examples in it. {task.layout}")
    examples = []
    for number, row in numbered:
        if len(row) != len(columns):
            raise SystemExit(
                f"{path}, line {number}: {len(row)} columns, not {len(columns)}. {task.layout}"
            )
        fields = dict(zip(columns, row, strict=True))
        if fields["label"] not in task.labels:
            raise SystemExit(f"{path}, line {number}: label {fields['label']!r}. {task.layout}")
        texts = tuple(fields[column] for column in task.texts)
        examples.append(Example(texts, task.labels.index(fields["label"])))
    return examples


def tokenize(tokenizer, examples, max_len):
    """A dict of int32 arrays, as `bert.py` takes them: ids, mask and types (N, max_len), labels.

    A longer text is cut, of a pair the longer one first; a shorter one is padded.
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
        "labels": [example.label for example in examples],
    }
    return {name: np.asarray(column, dtype=np.int32) for name, column in columns.items()}


def train_batch(data, seed, step, batch_size):
    """Batch number `step`, from 0: a function of (seed, step) alone.

    The batches walk through one random order of the examples after another, so that each example
    is seen once in every epoch; a batch may lie across the border of two.
    """
    count = len(data["labels"])
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    rows = np.empty(batch_size, dtype=np.int64)
    for epoch in np.unique(positions // count):
        here = positions // count == epoch
        order = np.random.default_rng([seed, epoch]).permutation(count)
        rows[here] = order[positions[here] % count]
    return {name: column[rows] for name, column in data.items()}


def dev_batches(data, batch_size):
    """All examples once and in order; the last batch is the shorter for it, so weigh by size."""
    starts = range(0, len(data["labels"]), batch_size)
    return [{name: c[start : start + batch_size] for name, c in data.items()} for start in starts]


def accuracy(labels, predictions):
    return float(np.mean(np.asarray(labels) == np.asarray(predictions)))


def matthews(labels, predictions):
    """The correlation of two binary rows, which guessing one label for all does not raise."""
    labels, predictions = np.asarray(labels), np.asarray(predictions)
    if np.ptp(labels) == 0 or np.ptp(predictions) == 0:
        return 0.0
    return float(np.corrcoef(labels, predictions)[0, 1])


METRICS = {"accuracy": accuracy, "matthews": matthews}
