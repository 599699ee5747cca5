"""`exps.grid`: what is finished, and runs that several processes, jobs and GPUs share, with a stub for main.py."""

import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from exps import grid, runs
from tests import grid_stub
from tests.grid_stub import entry, fake_main, point, write
from utils.results.records import load_results

ROOT = Path(__file__).parent.parent


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """Carries out points with the stub; -> (the outcome, the lines that the stub wrote)."""
    monkeypatch.setattr(grid, "POLL", 0.02)

    def carry_out(*asked, jobs=1, seconds=0.0, fails=""):
        log = tmp_path / "calls.txt"
        log.unlink(missing_ok=True)
        monkeypatch.setattr(grid, "call", fake_main(log, seconds, fails))
        outcome = grid.Grid(lambda failed: (asked, False), jobs).carry_out()
        return outcome, log.read_text().splitlines() if log.exists() else []

    return carry_out


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"epochs": 2}, "epochs: 1 -> 2"),
        ({"lrate": 0.5}, "lrate: 0.1 -> 0.5"),
        ({"dataset": "E"}, 'dataset: "D" -> "E"'),
        ({"increment": 1}, "increment: 2 -> 1"),
        ({"data_dir": "elsewhere"}, "data_dir: data -> elsewhere"),
    ],
)
def test_results_of_another_config_are_refused_each_time(stub, tmp_path, changed, said):
    before = {"epochs": 1, "lrate": 0.1}
    write(point(tmp_path, **before), entry(1), entry(2))
    other = point(tmp_path, **{**before, **changed})
    for _ in range(2):
        outcome, calls = stub(other)
        assert said in outcome.failed["a"]
        assert not calls
        assert grid.finished(other) is None
    assert grid.finished(point(tmp_path, **before)).summary.seeds == [1, 2]


def test_what_main_fills_in_is_no_other_config(tmp_path):
    keys = {"budget_in": "bytes", "memory_bytes_per_class": 600, "syn_form": "webp:10", "augmentations_per_image": 3}
    asked = point(tmp_path, **keys, real_per_class=1, syn_per_class="fill")
    write(asked, entry(1), entry(2), config={**asked.config, "augmentations_per_image": 1, "syn_per_class": 7})
    assert grid.finished(asked) is not None
    edges = point(tmp_path, **{**keys, "syn_form": "edges"}, real_per_class=1, syn_per_class="fill")
    assert "syn_form" in grid.refusal(edges)


def test_only_the_class_orders_that_are_asked_for_count(stub, tmp_path):
    asked = point(tmp_path)
    write(asked, entry(1, 80.0), entry(2, 70.0), entry(5, 10.0))
    done = grid.finished(asked)
    assert done.summary.seeds == [1, 2]
    assert done.summary.cnn.average_incremental_accuracy.mean == pytest.approx(75.0)
    assert stub(asked)[1] == []
    assert grid.finished(point(tmp_path, seed=[1, 3])) is None


def test_damaged_results_count_as_none(tmp_path):
    asked = point(tmp_path)
    asked.folder.mkdir()
    for content in ("[]", '{"runs": [{}]}', "{", '{"runs": 3}'):
        (asked.folder / "results.json").write_text(content)
        assert grid.finished(asked) is None


def test_a_run_that_fails_is_named_with_all_lines(stub, tmp_path):
    outcome, calls = stub(point(tmp_path, "good"), point(tmp_path, "bad"), fails="bad")
    assert outcome.failed == {"bad, order 1": "no luck\n  twice", "bad, order 2": "no luck\n  twice"}
    assert len(calls) == 4
    assert len(stub(point(tmp_path, "bad"))[1]) == 2, "it is tried again by the next command"


def test_a_run_whose_results_do_not_come_is_no_endless_loop(tmp_path, monkeypatch):
    monkeypatch.setattr(grid, "call", lambda *words, **_: subprocess.CompletedProcess(words, 0, "", ""))
    outcome = grid.Grid(lambda failed: ([point(tmp_path, seed=[1])], False), 1).carry_out()
    assert "results are of another config" in outcome.failed["a"]


def test_runs_of_one_phase_0_wait_for_the_first(stub, tmp_path):
    asked = [point(tmp_path, name, phase0="same", seed=[1]) for name in "abc"]
    asked.append(point(tmp_path, "d", phase0="other", seed=[1]))
    _, calls = stub(*asked, jobs=4, seconds=0.2)
    assert {line.split()[0] for line in calls[:2]} == {"a", "d"}
    assert len(calls) == 4


def started(*arguments) -> subprocess.Popen:
    code = "import sys; from tests.grid_stub import carry_out; carry_out(*sys.argv[1:])"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    return subprocess.Popen([sys.executable, "-c", code, *arguments], cwd=ROOT, text=True, **pipes)


@pytest.mark.long
def test_four_processes_share_a_folder_and_one_is_killed(tmp_path):
    names, log = "abcdef", tmp_path / "calls.txt"
    processes = {process.pid: process for process in [started(str(tmp_path), ",".join(names), "0.4") for _ in range(4)]}
    limit = time.monotonic() + 60
    while not log.exists() and time.monotonic() < limit:
        time.sleep(0.02)
    killed = int(log.read_text().split()[2])
    processes.pop(killed).kill()
    outputs = [process.communicate(timeout=60)[0] for process in processes.values()]
    assert all(process.returncode == 0 for process in processes.values())
    assert all(output.endswith(" {}\n") for output in outputs), "nobody's work is a failure"
    assert "0 {}\n" in outputs, "the last one sees that all are finished"
    lines = [line.split() for line in log.read_text().splitlines()]
    done = Counter((name, seed) for name, seed, process, _ in lines if int(process) != killed)
    of_killed = {(name, seed) for name, seed, process, _ in lines if int(process) == killed}
    assert set(done.values()) == {1}, "every run once"
    assert done.keys() | of_killed == {(name, seed) for name in names for seed in "12"}
    assert all(grid.finished(point(tmp_path, name)) is not None for name in names), "the dead one's run is taken up"


def test_a_run_of_a_dead_sweep_that_goes_on_is_waited_for(stub, tmp_path):
    asked = point(tmp_path, seed=[1])
    folder = asked.folder / "seed1"
    folder.mkdir(parents=True)
    lock = grid.FileLock(folder / ".lock", thread_local=False)
    with runs.pool_of(1) as pool, lock:
        future = pool.submit(stub, asked)
        time.sleep(0.3)
        assert not future.done()
        write(asked, entry(1))
        outcome, calls = future.result(5)
    assert (outcome.failed, outcome.elsewhere, calls) == ({}, [], [])


def test_each_run_has_a_gpu_of_its_own(stub, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,GPU-7")
    asked = [point(tmp_path, name, seed=[1], device="auto") for name in "abcdefgh"]
    _, calls = stub(*asked, jobs=8, seconds=0.3)
    assert sorted(line.split()[3] for line in calls) == sorted(["0", "1", "2", "3", "4", "5", "6", "GPU-7"])


def test_more_jobs_than_gpus_share_them_evenly_and_a_named_device_wins(stub, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    _, calls = stub(*(point(tmp_path, name, seed=[1]) for name in "abcd"), jobs=4, seconds=0.3)
    assert Counter(line.split()[3] for line in calls) == {"2": 2, "5": 2}
    _, calls = stub(*(point(tmp_path, name, seed=[1], device=["1"]) for name in "ef"), jobs=2, seconds=0.1)
    assert [line.split()[3] for line in calls] == ["-", "-"]
    _, calls = stub(*(point(tmp_path, name, seed=[1], device="cpu") for name in "gh"), jobs=2, seconds=0.1)
    assert [line.split()[3] for line in calls] == ["-", "-"]


def test_the_bar_counts_all_runs_and_its_line_ends(stub, tmp_path, capfd):
    stub(*(point(tmp_path, name) for name in "ab"), seconds=0.02)
    said = capfd.readouterr().err
    assert said.endswith("\n")
    assert "4/4" in said
    assert not re.search(r"/[123] ", said)


SLEEPER = """
import signal, sys, time
from pathlib import Path
def stop(*_):
    Path(sys.argv[1]).write_text("checkpoint")
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
Path(sys.argv[1]).write_text("started")
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_runs_at_once_with_their_checkpoints(tmp_path, number):
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    files = [tmp_path / f"{i}.txt" for i in range(2)]
    code = (
        "import sys; from exps import runs; from utils import cli\n"
        "runs.MAIN = (sys.argv[1],)\n"
        "sys.exit(cli.run(lambda: len(runs.for_each(sys.argv[2:], lambda file: runs.call(runs.MAIN, file), 2))))"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "sleeper.py"), *map(str, files)]
    sweep = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, start_new_session=True, text=True)
    limit = time.monotonic() + 30
    while not all(file.exists() for file in files) and time.monotonic() < limit:
        time.sleep(0.02)
    began = time.monotonic()
    sweep.send_signal(number)
    assert sweep.wait(10) == 128 + number, sweep.stderr.read()
    assert time.monotonic() - began < 5
    assert [file.read_text() for file in files] == ["checkpoint"] * 2
    assert "Traceback" not in sweep.stderr.read()


def test_last_words_have_all_lines_of_the_message():
    text = "noise\nerror: f.json: 2 problems in the config\n  f.json: one\n  f.json: two\nmore noise\n"
    done = subprocess.CompletedProcess([], 2, "", text)
    assert runs.last_words(done) == "f.json: 2 problems in the config\n  f.json: one\n  f.json: two"
    assert runs.last_words(subprocess.CompletedProcess([], 1, "", "a\nb\n")) == "b"


@pytest.mark.parametrize("command", ["exps.pareto", "exps.compare"])
@pytest.mark.parametrize("jobs", ["0", "-2", "x"])
def test_jobs_are_at_least_one(command, jobs, capsys):
    module = __import__(command, fromlist=["main"])
    assert module.main(["some.json", "--jobs", jobs]) == 2
    assert f"'{jobs}' is not a whole number of at least 1" in capsys.readouterr().err


def test_submit_starts_the_command_as_an_array(tmp_path, monkeypatch, capsys):
    from exps import pareto

    started = []

    class Job:
        def __init__(self, number):
            self.job_id = number

        def done(self):
            return True

        def exception(self):
            return None

    class Executor:
        def __init__(self, folder):
            self.folder = folder

        def update_parameters(self, **parameters):
            started.append(parameters)

        def batch(self):
            return runs.stopped_together()

        def submit(self, function):
            started.append(function)
            return Job(len(started))

    class Helpers:
        CommandFunction = staticmethod(lambda words, cwd, env: words[1:])

    module = type(sys)("submitit")
    module.AutoExecutor, module.helpers = Executor, Helpers
    monkeypatch.setitem(sys.modules, "submitit", module)
    options = grid_stub_options(tmp_path)
    assert pareto.submit(options, tmp_path / "out", lambda failed: ([point(tmp_path)], False)) == 0
    assert started[0] == {"name": "escort-sweep", "timeout_min": 60, "slurm_partition": "gpu"}
    words = ["-m", "exps.pareto", "sweep.json", "--output", str(tmp_path / "out"), "--jobs", "2", "--budgets", "5,6"]
    assert started[1:] == [words] * 3
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(pareto.UserError, match="pip install submitit"):
        pareto.submit(options, tmp_path / "out", lambda failed: ([], False))
    assert pareto.main(["--submit", "2"]) == 2


def grid_stub_options(tmp_path):
    import argparse

    values = {"file": Path("sweep.json"), "submit": 3, "slurm": ["timeout_min=60", "slurm_partition=gpu"], "jobs": 2}
    return argparse.Namespace(**values, seeds=[], budgets=[5, 6], forms=[], methods=[])


def test_results_are_read_again_when_they_change(tmp_path):
    asked = point(tmp_path)
    write(asked, entry(1))
    assert grid.done_orders(asked).keys() == {1}
    write(asked, entry(2))
    assert grid.done_orders(asked).keys() == {1, 2}
    assert load_results(asked.folder).summary.seeds == [1, 2]
    assert grid_stub.KEYS["dataset"] == asked.config["dataset"]
