"""Exit codes and last words of commands."""

import subprocess
import sys
from pathlib import Path

import pytest

from utils import cli
from utils.errors import UserError

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


def shell(command):
    return subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)


def test_a_reader_that_leaves_early_is_no_error():
    done = shell(f"{sys.executable} main.py --help-config | head -1; echo ${{PIPESTATUS[0]}}")
    assert (done.stdout.splitlines()[1], done.stderr) == ("0", "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_line():
    done = shell(f"{sys.executable} main.py --help-config > /dev/full")
    assert (done.returncode, done.stderr) == (2, "error: No space left on device\n")
