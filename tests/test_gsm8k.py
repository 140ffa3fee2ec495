"""GSM8K's files are read, tokenized with the answer to be learned, and scored by the number."""

import json
import pathlib
import sys

import numpy as np
import pytest

from tests import checkpoints

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

import gsm8k  # noqa: E402

ENDS = (checkpoints.END_ID, 3)


def example(question, number):
    return gsm8k.Example(question, f"It is <<1+1={number}>>{number}.\n#### {number}")


def write(folder, train, test):
    (folder / "gsm8k").mkdir(exist_ok=True)
    for name, examples in (("train", train), ("test", test)):
        lines = [json.dumps(e._asdict(), ensure_ascii=False) for e in examples]
        (folder / "gsm8k" / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_the_end_of_the_training_file_is_held_out(tmp_path):
    train = [example(f"{i}\u2028?", i) for i in range(100)]
    test = [example("last?", "1,200")]
    dataset = gsm8k.load(write(tmp_path, train, test))
    assert dataset == (train[:95], train[95:], test)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 3: JSONDecodeError"),
        ('{"question": "a"}', "line 3: KeyError\\('answer'\\)"),
        ("[1]", "line 3: TypeError"),
        ('{"question": 1, "answer": "#### 1"}', "line 3: not text"),
        ('{"question": "a", "answer": "1"}', "line 3: no #### with a number"),
    ],
)
def test_wrong_lines_are_refused_by_number(tmp_path, line, message):
    write(tmp_path, [example("a", 1), example("b", 2)], [example("c", 3)])
    with (tmp_path / "gsm8k" / "train.jsonl").open("a") as file:
        file.write(line)
    with pytest.raises(SystemExit, match=rf"train\.jsonl, {message}.*Expected in --data-dir"):
        gsm8k.load(tmp_path)


def test_wrong_files_are_refused_with_the_layout(tmp_path):
    with pytest.raises(SystemExit, match=r"there is no file .*train\.jsonl.* question and answer"):
        gsm8k.load(tmp_path)
    write(tmp_path, [example("a", 1)], [example("c", 3)])
    with pytest.raises(SystemExit, match="1 examples are too few"):
        gsm8k.load(tmp_path)
    (tmp_path / "gsm8k" / "test.jsonl").write_bytes(b"\xff\n")
    with pytest.raises(SystemExit, match=r"test\.jsonl: not UTF-8"):
        gsm8k.load(tmp_path)
    (tmp_path / "gsm8k" / "test.jsonl").write_text("\n")
    with pytest.raises(SystemExit, match="no examples in it"):
        gsm8k.load(tmp_path)


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("so it is 5.\n#### 5", "5"),
        ("#### 1,234", "1234"),
        ("#### $-3.5", "-3.5"),
        ("#### 7.", "7"),
        ("####  8 apples", "8"),
        ("#### 9\nQuestion: #### 10", "9"),
        ("#### none", None),
        ("42", None),
        ("#### .", None),
    ],
)
def test_final_number(answer, number):
    assert gsm8k.final_number(answer) == number


def test_exact_match_is_the_share_of_right_numbers():
    examples = [example("a", "1,000"), example("b", 2), example("c", 3), example("d", 4)]
    answers = ["#### 1000", "I do not know", "#### 33", "#### 4.\n"]
    assert gsm8k.exact_match(examples, answers) == 0.5


def test_tokens_of_prompts_and_answers():
    tokenizer = checkpoints.decoder_tokenizer()
    short = gsm8k.Example("é?", "#### 7")
    data, left_out = gsm8k.tokenize(tokenizer, [short, example("x" * 60, 1)], ENDS, max_len=40)
    assert left_out == 1
    assert {column.shape for column in data.values()} == {(1, 40)}
    tokens, learned = data["tokens"][0].tolist(), data["is_answer"][0].astype(bool)
    # What is learned is the answer and the token that ends it, and nothing else.
    answer = data["tokens"][0][learned].tolist()
    assert answer[-1] == ENDS[0]
    assert tokenizer.decode(answer[:-1], skip_special_tokens=False) == " #### 7"
    start, stop = learned.nonzero()[0][[0, -1]]
    assert tokens[0] == checkpoints.BEGIN_ID
    assert tokenizer.decode(tokens[1:start], skip_special_tokens=False) == "Question: é?\nAnswer:"
    assert tokens[stop + 1 :] == [ENDS[0]] * (39 - stop)
    with pytest.raises(SystemExit, match="--max-len 5: every example is longer"):
        gsm8k.tokenize(tokenizer, [short], ENDS, max_len=5)

    prompts = gsm8k.prompts(tokenizer, [short, example("xyz?", 1)], ENDS)
    assert prompts["tokens"][0, : prompts["lengths"][0]].tolist() == tokens[:start]
    assert prompts["lengths"].tolist() == [start, start + 1]  # é is two bytes
    assert prompts["tokens"].shape == (2, start + 1)


def test_a_tokenizer_that_ends_each_text_does_not_end_the_prompt():
    tokenizer = checkpoints.decoder_tokenizer()
    plain = gsm8k.prompts(tokenizer, [example("a", 1)], ENDS)
    tokenizer.post_processor = checkpoints.template(f"{checkpoints.BEGIN} $A {checkpoints.END}")
    np.testing.assert_array_equal(
        gsm8k.prompts(tokenizer, [example("a", 1)], ENDS)["tokens"], plain["tokens"]
    )


def test_answers_stop_at_an_end():
    tokenizer = checkpoints.decoder_tokenizer()
    ids = tokenizer.encode("#### 7", add_special_tokens=False).ids
    rows = np.array([[*ids, ENDS[0], *ids], [*ids, ENDS[1], *ids], [*ids, *ids, ids[-1]]])
    assert gsm8k.answers(tokenizer, rows, ENDS) == ["#### 7", "#### 7", "#### 7#### 77"]
