"""A run that is killed, at whatever moment, and goes on ends as one that never was: to the last bit."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.optim import SGD

from models.training import checkpoint
from models.training.trainer import Trainer
from tests import forks
from tests.conftest import long_but
from tests.digits import make_digits
from tests.little_config import results, train_little, without, write_config
from utils.data.batches import EpochBatchSampler

SHORT = {"epochs": 2, "compression_epochs": 2, "ft_epochs": 1, "milestones": [1], "init_milestones": [1]}
EVERY_STEP = {"checkpoint_every": 1e-9}
NEVER = {"checkpoint_every": 0}


@pytest.fixture
def train(tmp_path, shapes):
    """Calls main.py with a small config of three phases; returns its exit code."""
    config = {
        **{"model_name": "icarl", "batch_size": 16, "augmentations_per_image": 2, "augmentation_prob": 0.4},
        **{"memory_per_class": 3, "real_per_class": 2, "syn_per_class": 4, "init_lr": 0.05, "lrate": 0.05},
        **SHORT,
    }
    return lambda out, **values: train_little(shapes, tmp_path / out, **{**config, "init_epoch": 2, **values})


def checkpoints(out: Path) -> list[str]:
    return sorted(file.name for file in (out / "seed1993" / "checkpoints").iterdir())


def timeless(out: Path):
    """results.json without its times and without the name of its own folder."""
    return without(results(out), "seconds", "seconds_reused", "output_dir", "checkpoint_every")


def assert_same(ours, theirs, where=""):
    assert type(ours) is type(theirs), where
    if isinstance(ours, dict):
        assert list(ours) == list(theirs), where
        for key, value in ours.items():
            assert_same(value, theirs[key], f"{where}.{key}")
    elif isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs), where
    else:
        assert ours == theirs, where


def assert_ends_alike(one: Path, other: Path) -> None:
    """The last checkpoint (weights, memory, what the method carries on), results.json, and each epoch's row, once."""
    for name in checkpoints(one):
        a, b = (checkpoint.load(out / "seed1993" / "checkpoints" / name) for out in (one, other))
        for key in ("network", "memory", "method"):
            assert_same(a[key], b[key], key)
    assert timeless(one) == timeless(other)
    a, b = ((out / "seed1993" / "epochs.csv").read_text().splitlines() for out in (one, other))
    assert [row.rpartition(",")[0] for row in a] == [row.rpartition(",")[0] for row in b]  # the last cell is seconds


def die_at(monkeypatch, moments):
    """Let some steps of training, counted from 1 over all lives, be interrupted."""
    steps, original = [], SGD.step

    def mortal(self, *arguments):
        steps.append(self)
        if len(steps) in moments:
            raise KeyboardInterrupt
        return original(self, *arguments)

    monkeypatch.setattr(SGD, "step", mortal)


def die_once_a_phase(monkeypatch, name):
    """Let a part of the trainer be interrupted at its first call in each phase."""
    phases, original = [], getattr(Trainer, name)

    def mortal(self, *arguments):
        if (phase := self.method.phase) not in phases:
            phases.append(phase)
            raise KeyboardInterrupt
        return original(self, *arguments)

    monkeypatch.setattr(Trainer, name, mortal)


def live_and_die(train, out: Path, **values) -> int:
    """Start the run until it is done.  Returns how often it died; what it leaves on disk each time is bounded."""
    deaths = 0
    while (code := train(out.name, **EVERY_STEP, **values)) == 130:
        deaths += 1
        left = checkpoints(out)
        assert left == ["unfinished.pt"] or len(left) <= 2, left
        assert all(name == "unfinished.pt" or name.startswith("phase") for name in left)
    assert code == 0
    assert checkpoints(out) == ["phase02.pt"]
    return deaths


@pytest.mark.parametrize(
    ("method", "workers"),
    long_but([("icarl", 1), *((method, 0) for method in ("bic", "ewc", "der", "foster", "podnet", "coil"))]),
)
def test_death_in_training(train, tmp_path, monkeypatch, capsys, method, workers):
    """Each life gets through one step: every place in all phases, stages and epochs, and between them, is taken up."""
    values = {"model_name": method, "num_workers": workers}
    assert train("whole", **values, **NEVER) == 0
    die_at(monkeypatch, range(2, 1000, 2))
    assert live_and_die(train, tmp_path / "killed", **values) >= 8
    said = capsys.readouterr().out
    for phase in range(3):
        assert f"going on in phase {phase}" in said
    if method in ("bic", "foster", "podnet"):
        assert "going on in phase 1, stage 2" in said
        assert "going on in phase 2, stage 2" in said
    assert_ends_alike(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.long
@pytest.mark.parametrize("every", [EVERY_STEP, NEVER], ids=["every step", "never"])
def test_death_after_training(train, tmp_path, monkeypatch, every):
    """In each phase while exemplars are chosen, while it is evaluated, and before and after its checkpoint."""
    assert train("whole", **NEVER) == 0
    for name in ("choose_exemplars", "evaluate", "save_phase", "_log_results"):
        die_once_a_phase(monkeypatch, name)
    folder, deaths = tmp_path / "killed" / "seed1993" / "checkpoints", 0
    while train("killed", **every) == 130:
        deaths += 1
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f".{2**22 + 1}-half.tmp").touch()  # what SIGKILL leaves of a checkpoint
    assert deaths == 12
    assert checkpoints(tmp_path / "killed") == ["phase02.pt"]
    assert_ends_alike(tmp_path / "whole", tmp_path / "killed")


def test_a_checkpoint_is_written_before_the_one_before_it_is_deleted(train, monkeypatch):
    events, save, unlink = [], checkpoint.save, Path.unlink

    def noted(word, original):
        def call(path, *arguments, **options):
            original(path, *arguments, **options)
            if path.name.startswith("phase"):
                events.append((word, path.name))

        return call

    monkeypatch.setattr(checkpoint, "save", noted("saved", save))
    monkeypatch.setattr(Path, "unlink", noted("deleted", unlink))
    assert train("out", **NEVER) == 0
    saved, deleted = [[(word, f"phase0{phase}.pt") for phase in range(3)] for word in ("saved", "deleted")]
    assert events == [saved[0], saved[1], deleted[0], saved[2], deleted[1]]


@pytest.mark.long
def test_a_stale_place_is_not_taken_up(train, tmp_path, monkeypatch, capsys):
    """Killed when the phase's checkpoint was there and the one within the phase not yet away."""
    assert train("whole", **NEVER) == 0
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        assert train("killed", **EVERY_STEP) == 130
    assert checkpoints(tmp_path / "killed") == ["phase00.pt", "unfinished.pt"]
    assert train("killed", **NEVER) == 0
    assert "going on after 1 of 3 phases" in capsys.readouterr().out
    assert checkpoints(tmp_path / "killed") == ["phase02.pt"]
    assert_ends_alike(tmp_path / "whole", tmp_path / "killed")


def test_a_place_in_another_experiment_is_refused(train, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        die_at(patch, (3,))
        assert train("out", **EVERY_STEP) == 130
    (tmp_path / "out" / "config.json").unlink()
    assert train("out", epochs=3, lrate=0.1) == 2
    said = capsys.readouterr().err
    for words in ("unfinished.pt", "epochs: 2 -> 3", "lrate: 0.05 -> 0.1", "output_dir"):
        assert words in said
    (tmp_path / "out" / "config.json").unlink()
    file = tmp_path / "out" / "seed1993" / "checkpoints" / "unfinished.pt"
    file.write_bytes(file.read_bytes()[:1000])
    assert train("out") == 2
    assert str(file) in capsys.readouterr().err


def test_the_rest_of_an_epoch():
    sampler = EpochBatchSampler(23, 4, 1, 2)
    sampler.set_epoch(5)
    whole = list(sampler)
    for step in range(len(sampler) + 1):
        sampler.set_epoch(5, step)
        assert list(sampler) == whole[step:]
        assert len(sampler) == 6


def test_the_clock_is_one_for_all_processes_and_is_seldom_asked(monkeypatch):
    now, said = 0.0, []
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now)

    def all_reduce(values, reduce_op):
        """What the second process gets is what the first, which is asked first, has said."""
        said.append(values.tolist())
        return torch.tensor(said[-1] if len(said) % 2 else said[-2])

    fabrics = [SimpleNamespace(world_size=2, global_rank=r, device="cpu", all_reduce=all_reduce) for r in (0, 1)]
    first, second = (checkpoint.StepClock(100, fabric) for fabric in fabrics)
    second.start = -1000.0  # a clock that goes wrong
    over = []
    for step in range(1, 10101):
        now = 0.05 * step
        answers = first.look(), second.look()
        assert answers[0] == answers[1]
        if answers[0][0]:
            over.append(step)
            first.restart()
            second.restart()
    assert over == pytest.approx([2000, 4000, 6000, 8000, 10000], abs=3 * 20)
    assert len(said) < 2 * 550
    alone = SimpleNamespace(world_size=1)
    never = checkpoint.StepClock(0, alone)
    assert not any(never.look(last=True)[0] for _ in range(10))
    stage = checkpoint.StepClock(100, alone)
    now += 61
    assert [stage.look(last=last)[0] for last in (False, True)] == [False, True]


@pytest.mark.long
@pytest.mark.parametrize(
    ("ending", "workers"),
    [(signal.SIGTERM, 1), (signal.SIGINT, 0), (signal.SIGUSR1, 1)],
)
def test_a_signal_is_answered_by_a_checkpoint(train, tmp_path, ending, workers):
    """The command itself, in the middle of a phase's training: the place is kept, and the end is as if undisturbed.

    Its workers get the signal too, as from a terminal or from SLURM.
    """
    values = {"num_workers": workers, "cache": "none", "epochs": 12, "increment": 4, **NEVER}
    assert train("whole", **values) == 0
    words = ["main.py", "--config", tmp_path / "config.json", f"output_dir={tmp_path / 'killed'}"]
    process = forks.Command(words, new_session=True)
    epochs = tmp_path / "killed" / "seed1993" / "epochs.csv"
    while process.poll() is None and not (epochs.exists() and len(epochs.read_text().splitlines()) > 4):
        time.sleep(0.01)
    os.killpg(process.pid, ending)
    (said,) = [line for line in process.communicate()[1].splitlines() if "stopped" in line]
    assert process.returncode == 128 + ending
    unfinished = tmp_path / "killed" / "seed1993" / "checkpoints" / "unfinished.pt"
    assert re.search(rf"stopped; phase \d .* is kept up to epoch \d+, step \d of \d, in {unfinished}; the same", said)
    assert unfinished.exists()
    assert train("killed", **values) == 0
    assert_ends_alike(tmp_path / "whole", tmp_path / "killed")


def test_sigkill_within_a_phase(train, tmp_path):
    """The command itself, killed when it has kept a place within phase 1."""
    values = {"cache": "none", "epochs": 3, "init_epoch": 1, "increment": 4, **EVERY_STEP}
    assert train("whole", **values) == 0
    process = forks.Command(["main.py", "--config", tmp_path / "config.json", f"output_dir={tmp_path / 'killed'}"])
    folder = tmp_path / "killed" / "seed1993" / "checkpoints"
    while process.poll() is None and not {"phase00.pt", "unfinished.pt"} <= {file.name for file in folder.glob("*")}:
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert checkpoints(tmp_path / "killed") == ["phase00.pt", "unfinished.pt"]
    assert train("killed", **values) == 0
    assert_ends_alike(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["icarl"])
def test_sigkill_at_twenty_random_moments(tmp_path, method):
    """The command itself, with a process that reads images, killed from outside: several runs, till 20 deaths."""
    make_digits(tmp_path / "data")
    config = {
        **{"dataset": "MNIST", "model_name": method, "num_workers": 1, "batch_size": 12, "memory_per_class": 4},
        **{"real_per_class": 2, "syn_per_class": 8, "augmentations_per_image": 2, "augmentation_prob": 0.2},
        **{"init_epoch": 12, "epochs": 12, "init_lr": 0.05, "lrate": 0.05, "checkpoint_every": 1e-9},
    }

    def begin(out: Path) -> subprocess.Popen:
        file = write_config(tmp_path / "data", out, **config)
        command = [sys.executable, "main.py", "--config", str(file)]
        home = Path(__file__).parents[1]
        return subprocess.Popen(command, cwd=home, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def started(out: Path, process: subprocess.Popen, before: int) -> None:
        """Wait until the log grows: the imports are over."""
        log = out / "log.txt"
        while process.poll() is None and (log.stat().st_size if log.exists() else 0) <= before:
            time.sleep(0.01)

    def size(out: Path) -> int:
        return (out / "log.txt").stat().st_size if (out / "log.txt").exists() else 0

    process = begin(tmp_path / "whole")
    started(tmp_path / "whole", process, 0)
    start = time.monotonic()
    assert process.wait() == 0
    seconds = time.monotonic() - start

    rng, deaths, runs = random.Random(0), 0, 0
    while deaths < 20:
        out, runs, code = tmp_path / f"killed{runs}", runs + 1, None
        while code != 0:
            before = size(out)
            process = begin(out)
            if deaths < 20:
                started(out, process, before)
                try:
                    process.wait(rng.uniform(0, seconds / 2))
                except subprocess.TimeoutExpired:
                    process.kill()
                    deaths += 1
            code = process.wait()
            assert code in (0, -9), code
        assert_ends_alike(tmp_path / "whole", out)
