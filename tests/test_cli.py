"""Exit codes and last words of commands."""

import logging
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import main
from compress import measure, quality
from compress import run as compress
from ControlNet import train as controlnet
from exps import compare, pareto
from exps.report import __main__ as report
from exps.report import gallery
from tests.conftest import long_but
from utils import cli
from utils import log as logs
from utils.curate import command as curate
from utils.errors import UserError
from utils.memory import __main__ as memory
from utils.memory.packed import ClassRecord, Exemplar, Memory, Row, packed

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


def test_control_characters_of_other_people_s_files_are_escaped(capfd):
    assert cli.run(raising(UserError("a\x1b[31mb\r\x9b2Jc\u202ed\te\nf é"))) == 2
    assert capfd.readouterr().err == "error: a\\x1b[31mb\\r\\x9b2Jc\\u202ed\te\nf é\n"
    logs.start(None)
    logging.getLogger("main").info("found %s", "\x1b[2J.png")
    logs.start(None, quiet=True)
    assert capfd.readouterr().out == "found \\x1b[2J.png\n"


def test_the_names_in_a_memory_are_escaped(tmp_path, capsys):
    form = "\x1b[31mreal"
    record = ClassRecord(0, "a", "a", [Exemplar(form, Row(None, (1, 1), 24), None)])
    (tmp_path / "m.memory").write_bytes(packed(Memory("\x1b]0;D", {form: {"\x9b": "\x07"}}, [record])))
    assert memory.main(["show", str(tmp_path / "m.memory")]) == 0
    said = capsys.readouterr().out
    assert said.startswith("\\x1b]0;D, 1 classes")
    assert "\\x1b[31mreal: 1 exemplars" in said
    assert not set(said) & {"\x1b", "\x9b", "\x07"}


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        (main.main, ["predict", ".", "--images", "x", "--output"]),
        (main.main, ["evaluate", ".", "--output"]),
        (main.main, ["export", ".", "--to", "onnx", "--output"]),
        (report.main, [".", "--html"]),
        (report.main, [".", "--plot"]),
        (gallery.main, ["--dataset=D"]),
        (quality.main, ["--dataset=D", "--json"]),
    ],
)
def test_where_an_output_can_t_be_written_is_said_first(command, arguments, tmp_path, monkeypatch, capsys):
    (tmp_path / "in the way").touch()
    for place, words in (("in the way/x.png", f"{tmp_path}/in the way is not a folder."), ("", "it is a folder.")):
        assert command([*arguments, f"{tmp_path}/{place}"]) == 2
        assert words in capsys.readouterr().err
    monkeypatch.setattr(os, "access", lambda folder, mode: folder != tmp_path)  # as of a disk that is mounted read-only
    assert command([*arguments, f"{tmp_path}/new/x.png"]) == 2
    assert (
        capsys.readouterr().err
        == f"error: {tmp_path}/new/x.png: {tmp_path}/new can't be written to: {tmp_path} is read-only.\n"
    )


MISSING = {
    "outputs/nosuch is not a run's output folder": ["predict", "outputs/nosuch", "--images", "x"],
    "no train images of dataset 'Nowhere'": ["--config", "exps/demo.json", "dataset=Nowhere"],
    "no test images of dataset 'Nowhere'": ["--config", "exps/demo.json", "dataset=Nowhere", "memory_only=true"],
}


def test_what_is_not_there_is_said_before_torch_is_imported():
    calls = f"[main.main(arguments) for arguments in {list(MISSING.values())}]"
    done = shell(shlex.join([sys.executable, "-c", f"import sys, main; print({calls}, 'torch' in sys.modules)"]))
    assert done.stdout == "[2, 2, 2] False\n"
    assert all(words in done.stderr for words in MISSING)


CLOSED = [
    (command, code, closed)
    for command, code in (("--list methods", 0), ("--show-config --config exps/config.json", 0), ("nonsense", 2))
    for closed in (">&-", "2>&-", ">&- 2>&-")
]


@pytest.mark.parametrize(("command", "code", "closed"), long_but(CLOSED, *CLOSED[::4]))  # each command and each stream
def test_closed_streams_are_written_to_nowhere(command, code, closed):
    done = shell(f"{sys.executable} main.py {command} {closed}")
    assert done.returncode == code
    assert "Traceback" not in done.stderr


def test_names_that_are_not_utf_8_may_go_to_a_closed_stream():
    script = "import os, sys; from utils import cli; sys.exit(cli.run(lambda: print(os.fsdecode(b'b\\xffrd'))))"
    done = shell(f'{sys.executable} -c "{script}" >&-')
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("command", long_but(("--help", "predict --help", "--list methods"), "--help"))
def test_commands_without_docstrings(command):
    done = shell(f"{sys.executable} -OO main.py {command}")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout


IMPATIENT = """
import atexit, os, signal, sys, time
from utils import cli
cli.PATIENCE = float(sys.argv[1])
def slow():
    print("ending", file=sys.stderr, flush=True)
    time.sleep(30)
    print("ended", file=sys.stderr, flush=True)
atexit.register(slow)
def command():
    print("begun", flush=True)
    time.sleep(30)
sys.exit(cli.run(command))
"""


def test_a_second_ctrl_c_while_the_process_ends_leaves_no_traceback():
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", IMPATIENT, "0.1"], cwd=ROOT, **pipes)
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGINT)
    lines = [process.stderr.readline() for _ in range(3)]
    assert [line.strip() for line in lines] == ["", "stopped; the same command goes on where it stopped", "ending"]
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert process.communicate() == ("", "")
    assert process.returncode == 130


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


COMMANDS = ["main.py --help-config", "main.py --help", "compress/run.py --help", "-m utils.curate --help"]
READ = [(command, unbuffered) for command in COMMANDS for unbuffered in ("", "1")]


@pytest.mark.parametrize(("command", "unbuffered"), long_but(READ, *READ[::3]))
def test_a_reader_that_leaves_early_is_no_error(command, unbuffered):
    done = shell(f"{sys.executable} {command} | true; echo ${{PIPESTATUS[0]}}", PYTHONUNBUFFERED=unbuffered)
    assert (done.stdout, done.stderr) == ("0\n", "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(
    "command", long_but(["main.py --help-config", "main.py --list methods"], "main.py --help-config")
)
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
