"""Several processes, started by one script, agree, and outlive the death of one of them."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import sysconfig

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "examples" / "distributed.py"
TEXT = pathlib.Path(sysconfig.get_path("stdlib")) / "email"  # real text, and read at once
sys.path.insert(0, str(SCRIPT.parent))

import distributed  # noqa: E402
import run_record  # noqa: E402


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Starts the script in a run folder of a name; runs share their compiled programs."""
    base = tmp_path_factory.mktemp("processes")
    # This test's own flags, but for the devices that it simulates.
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    environment = os.environ | {
        "XLA_FLAGS": " ".join(flags),
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": str(base / "xla"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    started = []

    def start(name, *arguments):
        command = [sys.executable, str(SCRIPT), "--out", str(base / name), "--data", str(TEXT)]
        process = subprocess.Popen(
            [*command, *arguments], env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        started.append(process)
        return process, base / name

    yield start
    for process in started:
        process.kill()


def finished(started):
    process, folder = started
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, out + error
    return out, [json.loads(path.read_text()) for path in sorted(folder.glob("result-*.json"))]


@pytest.fixture(scope="module")
def unbroken(start):
    return finished(start("unbroken"))


@pytest.mark.slow
def test_processes_agree_bit_for_bit_after_20_steps(unbroken):
    out, results = unbroken
    assert [result["step"] for result in results] == [20, 20]
    assert results[0]["parameters"] == results[1]["parameters"]
    for number in (0, 1):
        assert f"process {number}: parameters {results[number]['parameters']}" in out
    losses = [float(loss) for loss in re.findall(r"step \d+ loss (\S+)", out)]
    assert losses[-1] < losses[0] - 1
    assert "All 2 processes hold the same parameters" in out


@pytest.mark.slow
def test_a_killed_process_ends_the_run_which_resumes_with_the_same_bits(start, unbroken):
    process, _ = start("killed", "--steps", "1000")
    pids = {}
    for line in process.stdout:
        if match := re.search(r"process (\d): started \(pid (\d+)\)", line):
            pids[int(match[1])] = int(match[2])
        if "step 7 " in line:
            os.kill(pids[1], signal.SIGKILL)
            break
    _, error = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "Process 1 was killed by SIGKILL." in error
    step = int(re.search(r"The last checkpoint is of step (\d+)", error)[1])
    assert 5 <= step < 20
    assert "--resume" in error
    for pid in pids.values():
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)

    out, results = finished(start("killed", "--steps", "20", "--resume"))
    assert f"process 1: goes on after step {step}" in out
    assert results == unbroken[1]


def test_another_run_is_not_overwritten_by_mistake(start, unbroken):
    process, _ = start("unbroken")
    assert "holds a run already" in process.communicate(timeout=30)[1]
    assert process.returncode == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("processes", "3"), ("layout", "fsdp"), ("preset", "tiny"), ("batch-size", "8"),
        ("lr", "0.02"), ("rho", "0.1"), ("update-proj-gap", "2"), ("data", "texts"), ("seed", "1"),
    ],
)  # fmt: skip
def test_a_run_resumes_with_its_own_arguments_only(tmp_path, name, value):
    argv = ["--out", str(tmp_path / "run")]
    with pytest.raises(SystemExit, match="no run in"):
        distributed.main([*argv, "--resume"])
    (tmp_path / "run").mkdir()
    run_record.write(distributed.parse_arguments(argv))
    with pytest.raises(SystemExit, match=rf"was started with --{name} \S+ \(now {value}\)"):
        distributed.main([*argv, "--resume", f"--{name}", value])


def test_a_run_resumes_with_its_own_text_only(tmp_path):
    argv = ["--out", str(tmp_path), "--process-id"]
    first, second = (distributed.parse_arguments([*argv, number]) for number in "01")
    texts = [run_record.Data("text", "a folder", fingerprint) for fingerprint in "ab"]
    distributed.same_text(second, texts[0])
    assert run_record.read(tmp_path) == {}  # the first process alone writes
    for text in (texts[1], texts[0]):  # without a checkpoint a run begins anew
        distributed.same_text(first, text)
    (tmp_path / "checkpoints" / "5").mkdir(parents=True)
    for arguments in (first, second):
        distributed.same_text(arguments, texts[0])
        with pytest.raises(SystemExit, match=r"the text \(a folder\) is not what the run"):
            distributed.same_text(arguments, texts[1])


def test_folders_of_other_programs_are_left_alone(tmp_path):
    argv = ["--out", str(tmp_path)]
    (tmp_path / "notes.txt").touch()
    with pytest.raises(SystemExit, match="not a run of this program"):
        distributed.main(argv)
    (tmp_path / "run.json").write_text('{"arguments": {"optimizer": ["adamw"]}}')
    with pytest.raises(SystemExit, match="holds a run already"):
        distributed.main(argv)


@pytest.mark.parametrize("name", ["processes", "steps", "batch-size", "checkpoint-every"])
def test_counts_are_positive(name, capsys):
    with pytest.raises(SystemExit):
        distributed.parse_arguments([f"--{name}", "0"])
    assert f"argument --{name}: must be at least 1, not 0" in capsys.readouterr().err


def test_each_process_has_its_own_part_of_the_text():
    parts = [list(distributed.own_part(list(range(11)), number, 3)) for number in range(3)]
    assert parts == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


def test_different_parameters_are_an_error(tmp_path, capsys):
    for number, digest in enumerate(("a", "b")):
        (tmp_path / f"result-{number}.json").write_text(json.dumps({"parameters": digest}))
    assert distributed.compare(tmp_path, 2) == 1
    assert "do NOT hold the same" in capsys.readouterr().err


def test_an_error_in_one_process_is_shown(start):
    process, _ = start("failing", "--preset", "huge")
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "failed with exit status 1: --preset huge: choose from nano," in error
    assert "There is no checkpoint yet" in error


@pytest.mark.slow
@pytest.mark.parametrize("layout", distributed.LAYOUTS)
def test_four_processes(start, layout):
    arguments = ("--processes", "4", "--layout", layout)
    out, results = finished(start(f"four-{layout}", *arguments))
    assert len({result["parameters"] for result in results}) == 1
    assert "All 4 processes hold the same parameters" in out
    finished(start(f"short-{layout}", *arguments, "--steps", "7"))
    _, resumed = finished(start(f"short-{layout}", *arguments, "--resume"))
    assert resumed == results
