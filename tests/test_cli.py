"""Exit codes and last words of commands."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import main
from compress import gallery, measure, quality
from compress import run as compress
from ControlNet import train as controlnet
from exps import compare, pareto
from utils import cli
from utils.curate import command as curate
from utils.errors import UserError
from utils.memory import __main__ as memory
from utils.results import report

ROOT = Path(__file__).parent.parent


def raising(error):
    def command():
        raise error

    return command


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        (lambda: None, 0, ""),
        (lambda: 1, 1, ""),
        (raising(UserError("wrong: mend it")), 2, "error: wrong: mend it\n"),
        (raising(KeyboardInterrupt()), 130, "\nstopped; the same command goes on where it stopped\n"),
        (raising(OSError(28, "No space left on device", "a/b.pt")), 2, "error: No space left on device: a/b.pt\n"),
        (raising(PermissionError(13, "Permission denied", b"caf\xe9")), 2, "error: Permission denied: caf\\udce9\n"),
        (raising(SystemExit(0)), 0, ""),
        (raising(SystemExit(2)), 2, ""),
    ],
)
def test_exit_codes(command, code, said, capfd):
    assert cli.run(command) == code
    assert capfd.readouterr().err == said


def test_a_bug_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        cli.run(lambda: 1 / 0)


def shell(command, **variables):
    """PYTHONUNBUFFERED=1 writes each line at once, "" at the end."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(["bash", "-c", command], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("variables", "spins"),
    [({}, cli.SPINS), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")],
)
def test_threads_that_wait_give_way_unless_the_user_decides(variables, spins):
    """The variable is read when torch is imported: it must not be there yet."""
    code = "import os, sys, main, compress.run, exps.pareto; from utils import cli; assert 'torch' not in sys.modules; "
    code += "cli.run(lambda: print(os.environ.get('GOMP_SPINCOUNT')))"
    done = shell(
        f"env -u GOMP_SPINCOUNT -u OMP_WAIT_POLICY {' '.join(f'{k}={v}' for k, v in variables.items())} "
        f'{sys.executable} -c "{code}"'
    )
    assert (done.stdout, done.stderr) == (f"{spins}\n", "")


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    "command",
    ["main.py --help-config", "main.py --help", "compress/run.py --help", "-m utils.curate --help"],
)
def test_a_reader_that_leaves_early_is_no_error(command, unbuffered):
    done = shell(f"{sys.executable} {command} | true; echo ${{PIPESTATUS[0]}}", PYTHONUNBUFFERED=unbuffered)
    assert (done.stdout, done.stderr) == ("0\n", "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("command", ["main.py --help-config", "main.py --list methods"])
def test_a_full_disk_is_one_line(command):
    done = shell(f"{sys.executable} {command} > /dev/full", PYTHONUNBUFFERED="")
    assert (done.returncode, done.stderr) == (2, "error: No space left on device\n")


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        (main.main, ["--config=~/here"]),
        (main.main, ["--config", "exps/config.json", "data_dir=~/here"]),
        (main.main, ["--config", "exps/config.json", "--data-dir", "~/here"]),
        (main.main, ["predict", "~/here", "--images", "x"]),
        (compress.main, ["--dataset=D", "--resolution=low", "--data-dir=~/here"]),
        (quality.main, ["--dataset=D", "--data-dir=~/here"]),
        (measure.main, ["--dataset=D", "--data-dir=~/here"]),
        (gallery.main, ["--dataset=D", "--data-dir=~/here", "x.png"]),
        (report.main, ["~/here"]),
        (report.main, ["mine=~/here"]),
        (memory.main, ["show", "~/here"]),
        (curate.main, ["folder", "--dataset=D", "--source=~/here"]),
        (curate.main, ["folder", "--dataset=D", "--source=tests", "--classes=~/here"]),
        (compare.main, ["~/here", "--methods=replay"]),
        (pareto.main, ["~/here"]),
        (controlnet.main, ["~/here"]),
        (controlnet.main, ["ControlNet/models/cldm_tiny_train.yaml", "data=~/here", "output=~/training"]),
        (controlnet.main, ["ControlNet/models/cldm_tiny_train.yaml", "model=~/here", "output=~/training"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value.__module__,
)
def test_a_tilde_is_the_home_folder(command, arguments, tmp_path, monkeypatch, capsys):
    """Each tool complains of a path that is not there, by its whole name.  Shells leave ~ alone behind a "="."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert command(arguments) == 2
    assert f"{tmp_path}/here" in capsys.readouterr().err
