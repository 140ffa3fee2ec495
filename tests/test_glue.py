"""The GLUE files are read, tokenized and scored."""

import pathlib
import sys

import numpy as np
import pytest
from scipy import stats

from tests import checkpoints

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

import glue  # noqa: E402

PAIRS = [
    glue.Example(("the cat sat on the mat .", "a cat sat ."), 0),
    glue.Example(("the dog ran", "the dogs ran over the mat"), 2),
    glue.Example(("a dog", "a cat"), 1),
]


FILES = {
    "RTE/train.tsv": "index\tsentence1\tsentence2\tlabel\n"
    '0\tHe said "no.\tHe spoke.\tentailment\n1\tA dog\u0085ran.\tA cat ran.\tnot_entailment\n',
    "RTE/dev.tsv": "index\tsentence1\tsentence2\tlabel\n0\tA.\tB.\tnot_entailment",
    "CoLA/in_domain_train.tsv": "gj04\t1\t\tThe cat sat.\ncj99\t0\t*\tThe sat cat.\n",
    "CoLA/in_domain_dev.tsv": "gj04\t1\t\tA dog ran.\n",
    "CoLA/out_of_domain_dev.tsv": "clc95\t0\t??\tRan a dog.",
    "SST-2/train.tsv": "label\tsentence\r\n0\tno wit\r\n1\tlovable\r\n",
    "SST-2/dev.tsv": "label\tcontent\n1\tgood .\n",
    "STS-B/sts-train.csv": 'main-captions\tMSRvid\t2012\t0001\t5.000\tA plane.\tAn "air plane.\n'
    "main-news\theadlines\t2016\t0012\t2.75\tA.\tB.\tSource (http://a)\tSource (http://b)\n",
    "STS-B/sts-dev.csv": "main-captions\tMSRvid\t2012test\t0000\t0\tA cat.\tNo.\n",
}
READ = {
    "rte": (
        [(('He said "no.', "He spoke."), 0), (("A dog\u0085ran.", "A cat ran."), 1)],
        [(("A.", "B."), 1)],
    ),
    "cola": (
        [(("The cat sat.",), 1), (("The sat cat.",), 0)],
        [(("A dog ran.",), 1), (("Ran a dog.",), 0)],
    ),
    "sst2": ([(("no wit",), 0), (("lovable",), 1)], [(("good .",), 1)]),
    "stsb": (
        [(("A plane.", 'An "air plane.'), 5.0), (("A.", "B."), 2.75)],
        [(("A cat.", "No."), 0.0)],
    ),
}
# The same tasks as GLUE's own download has them.
GLUE_FILES = {
    "cola": {
        "CoLA/train.tsv": FILES["CoLA/in_domain_train.tsv"],
        "CoLA/dev.tsv": FILES["CoLA/in_domain_dev.tsv"] + FILES["CoLA/out_of_domain_dev.tsv"],
    },
    "stsb": {
        "STS-B/train.tsv": "index\tgenre\tsentence1\tsentence2\tscore\n"
        '0\tx\tA plane.\tAn "air plane.\t5.000\n1\tx\tA.\tB.\t2.75\n',
        "STS-B/dev.tsv": "index\tgenre\tsentence1\tsentence2\tscore\n0\tx\tA cat.\tNo.\t0\n",
    },
}


@pytest.fixture
def data_dir(tmp_path):
    return write(tmp_path, FILES)


def write(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content.encode())
    return folder


@pytest.mark.parametrize("task", list(glue.TASKS))
def test_files_are_read(data_dir, task):
    assert tuple(glue.load(task, data_dir)) == READ[task]


@pytest.mark.parametrize("task", list(GLUE_FILES))
def test_files_of_glues_own_download_are_read(tmp_path, task):
    assert tuple(glue.load(task, write(tmp_path, GLUE_FILES[task]))) == READ[task]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("RTE/dev.tsv", None, r"there is no file .*/RTE/dev\.tsv"),
        ("RTE/train.tsv", b"", "no examples"),
        ("RTE/train.tsv", b"index\tsentence1\tsentence2\tlabel\n", "no examples"),
        ("RTE/train.tsv", b"index\tsentence1\tlabel\n0\ta\t1\n", "no column sentence2"),
        ("RTE/train.tsv", b"\xff\xfe", "not UTF-8"),
    ],
)
def test_wrong_rte_files_are_refused_with_the_layout(data_dir, name, content, message):
    (data_dir / name).unlink()
    if content is not None:
        (data_dir / name).write_bytes(content)
    layout = (
        r"Expected in --data-dir: RTE/train\.tsv, RTE/dev\.tsv; .* entailment or not_entailment"
    )
    with pytest.raises(SystemExit, match=f"{message}.*{layout}"):
        glue.load("rte", data_dir)


@pytest.mark.parametrize(
    ("line", "message"),
    [("x\t1\tA cat.\n", "line 3: 3 columns, not 4"), ("x\t2\t\tA cat.\n", "line 3: label '2'")],
)
def test_wrong_lines_are_refused_by_number(data_dir, line, message):
    with (data_dir / "CoLA" / "in_domain_train.tsv").open("a") as file:
        file.write(line)
    with pytest.raises(SystemExit, match=message):
        glue.load("cola", data_dir)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a\tb\tc\t1\t5.1\tA.\tB.\n", r"line 3: score '5\.1'.* number from 0 to 5"),
        ("a\tb\tc\t1\tnan\tA.\tB.\n", "line 3: score 'nan'"),
        ("a\tb\tc\t1\tlow\tA.\tB.\n", "line 3: score 'low'"),
        ("a\tb\tc\t1\t5\tA.\n", "line 3: 6 columns, not 7"),
        ("a\tb\tc\t1\t5\tA.\tB.\tC\tD\tE\n", "line 3: 10 columns, not 7"),
    ],
)
def test_wrong_scores_are_refused_by_number(data_dir, line, message):
    with (data_dir / "STS-B" / "sts-train.csv").open("a") as file:
        file.write(line)
    with pytest.raises(SystemExit, match=message):
        glue.load("stsb", data_dir)


def test_unknown_task_and_folder_are_refused(tmp_path):
    with pytest.raises(SystemExit, match="choose from rte, cola, sst2, stsb"):
        glue.load("mnli", tmp_path)
    with pytest.raises(SystemExit, match="there is no file"):
        glue.load("sst2", tmp_path / "nowhere")


def test_tokens_of_sentences_and_pairs():
    tokenizer = checkpoints.bert_tokenizer()
    single = glue.tokenize(tokenizer, [glue.Example(("The cats ran",), 1)], max_len=8)
    assert single["input_ids"].tolist() == [[2, 5, 6, 13, 9, 3, 0, 0]]
    assert single["attention_mask"].tolist() == [[1] * 6 + [0] * 2]
    assert single["labels"].tolist() == [1]
    assert {column.dtype for column in single.values()} == {np.dtype(np.int32)}
    # The seven and the four tokens are cut to four and three.
    pair = glue.tokenize(tokenizer, PAIRS[:1], max_len=10)
    assert pair["input_ids"].tolist() == [[2, 5, 6, 8, 10, 3, 4, 6, 8, 3]]
    assert pair["token_type_ids"].tolist() == [[0] * 6 + [1] * 4]
    assert tokenizer.padding is None
    assert tokenizer.truncation is None
    with pytest.raises(SystemExit, match="must be at least 5"):
        glue.tokenize(tokenizer, PAIRS, max_len=4)


def test_metrics():
    labels, predictions = [1, 1, 1, 0, 0, 1], [1, 0, 1, 0, 1, 1]
    measured = {name: metric(labels, predictions) for name, metric in glue.METRICS.items()}
    assert measured["accuracy"] == pytest.approx(4 / 6)
    # tp 3, tn 1, fp 1, fn 1: (3 * 1 - 1 * 1) / sqrt(4 * 4 * 2 * 2)
    assert measured["matthews"] == pytest.approx(0.25)
    assert glue.METRICS["matthews"](labels, [1] * 6) == 0.0
    scores, predicted = [0.0, 1.0, 2.0, 5.0], [0.1, 0.2, 0.3, 2.3]
    expected = stats.pearsonr(scores, predicted).statistic
    assert glue.METRICS["pearson"](scores, predicted) == pytest.approx(expected)
    assert glue.METRICS["spearman"](scores, predicted) == pytest.approx(1.0)
    # Equal scores share their rank.
    tied = [0.0, 1.0, 1.0, 5.0], [3.0, 1.0, 2.0, 9.0]
    expected = stats.spearmanr(*tied).statistic
    assert glue.METRICS["spearman"](*tied) == pytest.approx(expected)
    used = {metric for task in glue.TASKS.values() for metric in task.metrics}
    assert used == set(glue.METRICS)
