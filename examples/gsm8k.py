"""Instruction tuning on GSM8K's layout: JSON lines of a question and an answer.

An answer ends in a line `#### 42`; an answer that a model writes is right if it has the same
number there. The folder given as `--data-dir` holds gsm8k/train.jsonl and gsm8k/test.jsonl.
"""

import json
import pathlib
import re
from typing import NamedTuple

import numpy as np

FOLDER, TRAIN, TEST = "gsm8k", "train.jsonl", "test.jsonl"
LAYOUT = (
    f"Expected in --data-dir: {FOLDER}/{TRAIN}, {FOLDER}/{TEST}; UTF-8, one JSON object a line: "
    'question and answer, both text, the answer with "#### " before its number.'
)
# The files have no validation part: so much of the training part, its end, is held out.
VALIDATION_SHARE, VALIDATION_MOST = 0.05, 200
PROMPT = "Question: {}\nAnswer:"
# As the authors of GSM8K look for it.
NUMBER = re.compile(r"#### *\$?(-?[0-9.,]+)")


class Example(NamedTuple):
    question: str
    answer: str


class Dataset(NamedTuple):
    train: list[Example]
    validation: list[Example]
    test: list[Example]


def load(data_dir):
    """The Dataset, its examples in the order of the files."""
    folder = pathlib.Path(data_dir).expanduser() / FOLDER
    train, test = _read(folder / TRAIN, data_dir), _read(folder / TEST, data_dir)
    held_out = max(1, min(VALIDATION_MOST, round(VALIDATION_SHARE * len(train))))
    if len(train) <= held_out:
        raise SystemExit(f"{folder / TRAIN}: {len(train)} examples are too few. {LAYOUT}")
    return Dataset(train[:-held_out], train[-held_out:], test)


def _read(path, data_dir):
    if not path.is_file():
        raise SystemExit(f"--data-dir {data_dir}: there is no file {path}. {LAYOUT}")
    examples = []
    try:
        lines = path.read_bytes().decode("utf-8").split("\n")
    except ValueError as error:
        raise SystemExit(f"{path}: not UTF-8 text ({error}). {LAYOUT}") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            example = Example(row["question"], row["answer"])
        except (ValueError, KeyError, TypeError) as error:
            raise SystemExit(f"{path}, line {number}: {error!r}. {LAYOUT}") from None
        if not all(isinstance(text, str) for text in example):
            raise SystemExit(f"{path}, line {number}: not text. {LAYOUT}")
        if final_number(example.answer) is None:
            raise SystemExit(f"{path}, line {number}: no #### with a number. {LAYOUT}")
        examples.append(example)
    if not examples:
        raise SystemExit(f"{path}: there are no examples in it. {LAYOUT}")
    return examples


def final_number(answer):
    """The number behind ####, without commas, as text; None if there is none."""
    found = NUMBER.search(answer)
    return found and (found[1].replace(",", "").rstrip(".") or None)


def exact_match(examples, answers):
    """The share of answers with the right number."""
    pairs = zip(examples, answers, strict=True)
    right = [final_number(e.answer) == final_number(answer) for e, answer in pairs]
    return sum(right) / len(right)


def _prompt_tokens(tokenizer, example, ends):
    tokens = tokenizer.encode(PROMPT.format(example.question)).ids
    # Some tokenizers end each text with the token that is to end the answer.
    return tokens[:-1] if tokens and tokens[-1] in ends else tokens


def tokenize(tokenizer, examples, ends, max_len):
    """(data, number of examples left out): arrays as `decoder.py` takes them, (N, max_len).

    Prompt, answer and the token that ends it. What is longer is left out: a cut answer would lack
    its number.
    """
    rows = []
    for example in examples:
        prompt = _prompt_tokens(tokenizer, example, ends)
        answer = tokenizer.encode(f" {example.answer}", add_special_tokens=False).ids
        tokens = [*prompt, *answer, ends[0]]
        if len(tokens) <= max_len:
            padding = [ends[0]] * (max_len - len(tokens))
            learned = [0] * len(prompt) + [1] * (len(answer) + 1) + [0] * len(padding)
            rows.append((tokens + padding, learned))
    if not rows:
        raise SystemExit(f"--max-len {max_len}: every example is longer.")
    tokens, learned = (np.array(column, dtype=np.int32) for column in zip(*rows, strict=True))
    return {"tokens": tokens, "is_answer": learned}, len(examples) - len(rows)


def prompts(tokenizer, examples, ends):
    """A dict of the questions' tokens (N, P), padded behind, and their lengths (N,)."""
    rows = [_prompt_tokens(tokenizer, example, ends) for example in examples]
    lengths = np.array([len(row) for row in rows], dtype=np.int32)
    tokens = np.full((len(rows), lengths.max()), ends[0], dtype=np.int32)
    for row, into in zip(rows, tokens, strict=True):
        into[: len(row)] = row
    return {"tokens": tokens, "lengths": lengths}


def answers(tokenizer, generated, ends):
    """The text of each row of new tokens, up to the one that ends it."""
    texts = []
    for row in generated.tolist():
        stop = next((i for i, token in enumerate(row) if token in ends), len(row))
        texts.append(tokenizer.decode(row[:stop]))
    return texts
