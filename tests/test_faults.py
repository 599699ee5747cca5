"""Full disks, little shared memory, several jobs at once: real commands in real processes, through main.py."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

import main
from compress import quality, run
from exps.report import __main__ as report
from exps.report import gallery
from tests import processes
from tests.folders import make_dataset, save_picture
from tests.little_config import KEYS, phases
from utils.curate import command as curate
from utils.data.paths import DatasetPaths
from utils.memory import __main__ as memory

CONFIG = {
    **{**KEYS, "dataset": "Toy", "increment": 1, "memory_per_class": 2, "batch_size": 4},
    **{"init_lr": 0.01, "lrate": 0.01},
}


def _can_mount() -> bool:
    unshare = shutil.which("unshare")
    script = 'd=$(mktemp -d); mount -t tmpfs -o size=64k tmpfs "$d"; code=$?; umount "$d"; rmdir "$d"; exit $code'
    return bool(unshare) and subprocess.run([unshare, "-m", "sh", "-c", script], capture_output=True).returncode == 0


needs_mount = pytest.mark.skipif(not _can_mount(), reason="this user can't mount a file system of its own")


@pytest.fixture
def config(tmp_path):
    """Writes a config for the dataset Toy; -> its file."""
    make_dataset(tmp_path / "data", "abc", train=4, test=2)

    def write(name="config", **changes):
        folders = {"data_dir": str(tmp_path / "data"), "output_dir": str(tmp_path / "out" / name)}
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps({**CONFIG, **folders, **changes}))
        return file

    return write


def in_own_mounts(script: str, folder: Path, **variables: object) -> subprocess.CompletedProcess:
    """A shell script that may mount file systems, which end with it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **{name: str(value) for name, value in variables.items()}}
    start = ["unshare", "-m", "sh", "-c", script]
    return subprocess.run(start, cwd=processes.REPOSITORY, env=environment, capture_output=True, text=True)


@pytest.mark.long
@needs_mount
@pytest.mark.parametrize("size", ["8k", "700k"])
def test_a_disk_that_is_full_while_training_loses_nothing(config, tmp_path, size):
    """With room for the config alone, and for phase 0's checkpoint."""
    (tmp_path / "out").mkdir()
    script = """
        mount -t tmpfs -o size=$SIZE tmpfs "$OUT"
        "$PYTHON" main.py --config "$CONFIG"; echo "code $?"
        mount -o remount,size=200m "$OUT"
        "$PYTHON" main.py --config "$CONFIG" 2>&1; echo "code $?"
    """
    done = in_own_mounts(script, tmp_path, SIZE=size, OUT=tmp_path / "out", PYTHON=sys.executable, CONFIG=config())
    assert [line for line in done.stdout.splitlines() if line.startswith("code")] == ["code 2", "code 0"], done.stdout
    assert "No space left" in done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ")] == done.stderr.splitlines()[-1:]
    assert "Traceback" not in done.stderr + done.stdout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_log_that_can_not_be_written_is_said_once(config, tmp_path, capfd):
    (tmp_path / "out" / "config").mkdir(parents=True)
    (tmp_path / "out" / "config" / "log.txt").symlink_to("/dev/full")
    assert main.main(["--config", str(config())]) == 0
    said = capfd.readouterr()
    assert "Traceback" not in said.err
    assert said.out.count(f"{tmp_path / 'out' / 'config' / 'log.txt'} can't be written (No space left on device)") == 1
    assert main.main(["--config", str(config(output_dir=str(tmp_path / "next")))]) == 0, "the next log replaces it"


@contextmanager
def no_room():
    """Whatever is written to a file fails, as on a full disk."""
    limit, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.long
def test_a_full_disk_is_one_line_of_every_tool(config, tmp_path, capsys):
    assert main.main(["--config", str(config())]) == 0
    out, data, file = tmp_path / "out" / "config", ["--data-dir", str(tmp_path / "data")], tmp_path / "new"
    form = ["--dataset", "Toy", "--form", "webp:10"]
    assert run.main([*data, *form, "--resolution", "low"]) == 0
    exemplars = DatasetPaths(tmp_path / "data", "Toy")
    for label in "abc":
        save_picture(exemplars.kept(exemplars.images(label)[0]).with_suffix(".webp"))
    images = f"--images={tmp_path / 'data' / 'Toy' / 'test' / 'a'}"
    for tool, arguments in (
        (main.main, ["predict", str(out), images, f"--output={file}", "--device=cpu"]),
        (main.main, ["evaluate", str(out), f"--output={file}", "--device=cpu"]),
        (main.main, ["export", str(out), f"--output={file}", "--device=cpu"]),
        (report.main, [str(out), f"--plot={file}"]),
        (report.main, [str(out), f"--html={file}"]),
        (gallery.main, [*data, "--dataset=Toy", "--copies=0", str(file)]),
        (quality.main, [*data, *form, "--images=2", "--epochs=1", f"--json={file}"]),
        (memory.main, ["extract", str(out / "seed1993" / "memory" / "phase01.memory"), f"--to={file}"]),
        (run.main, [*data, "--dataset=Toy", "--form=webp:20", "--resolution=low"]),
        (curate.main, ["folder", "--dataset=New", *data, f"--source={tmp_path / 'data' / 'Toy' / 'train'}"]),
    ):
        capsys.readouterr()
        with no_room():
            code = tool(arguments)
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert (code, len(said)) == (2, 1), arguments
        assert str(tmp_path) in said[0], said
        assert not file.is_file()


@pytest.mark.long
@needs_mount
def test_a_small_shared_memory_goes_on_without_workers(config, tmp_path):
    script = 'mount -t tmpfs -o size=16k tmpfs /dev/shm; exec "$PYTHON" main.py --config "$CONFIG"'
    file = config(cache="none", num_workers=2)
    done = in_own_mounts(script, tmp_path, PYTHON=sys.executable, CONFIG=file)
    assert done.returncode == 0, done.stderr
    assert "--shm-size" in done.stdout


@pytest.mark.parametrize("command", [main.main, run.main])
def test_a_slurm_job_without_srun_is_told_at_once(command, config, monkeypatch, capsys):
    for name, value in {"SLURM_NTASKS": "8", "SLURM_JOB_NAME": "job", "SLURM_JOB_ID": "1", "SLURM_PROCID": "0"}.items():
        monkeypatch.setenv(name, value)
    file = config()
    where = f"--data-dir={file.parent / 'data'}"
    of_compress = [where, "--dataset=Toy", "--resolution=low", "--form=webp:9"]
    assert command(["--config", str(file)] if command is main.main else of_compress) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: SLURM's job has 8 tasks")
    assert "srun" in said
    assert said.count("\n") == 1


@pytest.mark.long
def test_two_jobs_of_two_processes_share_a_phase_0_cache(config, tmp_path):
    """Started at once: neither waits for the other, and nothing half done is left."""
    jobs = []
    for name in ("one", "two"):
        file = config(name, phase0_cache=str(tmp_path / "cache"), increment=2)
        launched = processes.torchrun(processes.REPOSITORY / "main.py", "--config", file)
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        jobs.append(processes.start(launched, os.environ, **streams))
    for job in jobs:
        said, _ = job.communicate(timeout=300)
        assert job.returncode == 0, said
    assert [file.suffix for file in (tmp_path / "cache").iterdir()] == [".pt"]
    one, two = ([phase["cnn"] for phase in phases(tmp_path / "out" / name)] for name in ("one", "two"))
    assert one == two


def test_prompts_that_are_cut_are_told(paths, compress, caplog):
    long = {"sushi": "raw fish on rice, " * 20, "apple pie": "apple pie"}
    (paths.root / "class_names.json").write_text(json.dumps(long))
    assert compress("--dry-run")[0] == 0
    assert "1 prompts have more than 75 tokens and are cut, such as that of class 'sushi'" in caplog.text
    caplog.clear()
    template = "a picture, " * 30 + "{label}"
    assert compress("--dry-run", "--prompt-template", template)[0] == 0
    assert "shorten --prompt-template (90 tokens)" in caplog.text
    assert "class_names.json" not in caplog.text
