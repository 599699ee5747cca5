"""What all commands share: exit codes, one line for an error, signals, odd terminals, threads that give way to others.

Exit codes: 0 done, 1 some inputs failed (the command has listed them), 2 the command, the config or the data is wrong,
130 ended by Ctrl-C, 143 by SIGTERM, as schedulers send it, 138 by SIGUSR1 (`sbatch --signal=USR1@120`).
"""

import argparse
import logging
import os
import re
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TextIO

from utils.errors import Stopped, UserError
from utils.files import check_folder

log = logging.getLogger(__name__)

PATIENCE = 10.0
"""Seconds within which a second signal is taken for the first one's echo: torchrun passes on what all have had."""

NOTICES = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
"""Signals that ask a command to end."""


class Signals:
    """Those of NOTICES.  Each raises `Stopped` at once, but while `delayed` holds, the first one is only noted."""

    received: int | None = None
    _delayed = False
    _since = 0.0

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Handle them.  In another thread than the main one, where Python does not allow it, do nothing."""
        before, self.received = {}, None
        try:
            for number in NOTICES:
                before[number] = signal.signal(number, self._handle)
        except ValueError:
            pass
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler if self.received is None else self._leave)

    @contextmanager
    def delayed(self) -> Iterator[None]:
        """Let a piece of work reach a point where it can be kept; it looks at `received` and raises `Stopped`."""
        self._delayed = True
        try:
            yield
        finally:
            self._delayed = False
        if self.received is not None:
            raise Stopped(self.received)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._since = number, time.monotonic()
        if not self._delayed or time.monotonic() - self._since > PATIENCE:
            raise Stopped(number)

    def _leave(self, number: int, frame: FrameType | None) -> None:
        """A further signal while the process ends: whoever is impatient gets no traceback of what it still does."""
        if time.monotonic() - self._since > PATIENCE:
            os._exit(128 + number)


signals = Signals()
"""Those of this process."""


def run(command: Callable[[], int | None], *, stopped: str = "the same command goes on where it stopped") -> int:
    """Call a command and return its exit code; None counts as 0.

    UserError and OSError (a full disk, a file that may not be read) become one line on stderr, of one process where
    several run the command together; other exceptions are bugs.  stopped: what to say after a signal, unless the
    exception has an attribute `going_on`.
    """
    _tolerate_odd_streams()
    _share_the_cores()
    try:
        with signals.caught():
            code = _exit_code(command)
        sys.stdout.flush()
        return code
    except UserError as error:
        return _refuse(error)
    except KeyboardInterrupt as stop:
        words = ["\nstopped", getattr(stop, "note", ""), getattr(stop, "going_on", stopped)]
        return _end(128 + getattr(stop, "number", signal.SIGINT), "; ".join(word for word in words if word))
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _stdout_is_closed():
            return 0
        return _refuse(f"{error.strerror or error}" + (f": {os.fsdecode(error.filename)}" if error.filename else ""))
    except Exception as error:
        if not _runs_together():
            raise
        from utils import devices

        if (end := devices.ended_by_another(error)) is None:
            raise
        code, message = end
        if message:
            print(visible(f"error: {message}"), file=sys.stderr)
        return code


def program(script: str) -> str:
    """What help calls a command: the name that pip installed it by, where it was started so, else its script's."""
    name = Path(sys.argv[0]).stem
    return name if name.startswith("escort") else script


SPINS = "20000"
"""How often a thread of torch on a CPU looks whether the others have finished, before it sleeps."""


def _share_the_cores() -> None:
    """Let torch's threads give way to other programs: GNU's OpenMP lets a thread that waits spin for milliseconds, and
    where another program has its core, a small network takes ten times as long (docs/benchmarks.md).

    To be called before torch is imported.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)


def _tolerate_odd_streams() -> None:
    """A closed stream (>&-), which Python leaves out, leads nowhere; names that the terminal's encoding does not know
    are printed escaped."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  (until the process ends)
            setattr(sys, name, stream)
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _exit_code(command: Callable[[], int | None]) -> int:
    """What a command returns, or leaves with: argparse has printed its help, or what is wrong."""
    try:
        return command() or 0
    except SystemExit as leave:
        return leave.code if isinstance(leave.code, int) else 0 if leave.code is None else 2


def _refuse(message: object) -> int:
    log.debug("ended with an error", exc_info=True)
    return _end(2, f"error: {message}")


def _end(code: int, message: str) -> int:
    """The exit code, when the first process that ends has said why, or the one that runs alone."""
    traceback.clear_frames(sys.exc_info()[2])  # workers of a DataLoader end with what refers to it
    try:
        sys.stdout.flush()
    except OSError:
        _give_up_stdout()
    if _runs_together():
        from utils import devices

        code, is_first = devices.end_together(code)
    else:
        is_first = os.environ.get("LOCAL_RANK", "0") == "0"  # all read the same config: one line for a machine
    if is_first:
        print(visible(message), file=sys.stderr)
    return code


def _runs_together() -> bool:
    """Whether this is one of several processes that are connected."""
    distributed = getattr(sys.modules.get("torch"), "distributed", None)
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def _stdout_is_closed() -> bool:
    """Whether the reader of our output has left, as in `... | head -1`."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    if not poll.poll(0):
        return False
    _give_up_stdout()
    return True


def _give_up_stdout() -> None:
    """Python writes what is left of the output once more when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def path(text: str) -> Path:
    """An argument that is a path, for argparse.  ~ is the home folder, which shells leave alone in --output=~/x."""
    return Path(text).expanduser()


def nb_cores() -> int:
    """CPU cores that this process may use; on macOS, all of the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def at_least(least: int) -> Callable[[str], int]:
    """A type for argparse: a whole number of `least` or more; commas and underscores may group its digits."""

    def number(text: str) -> int:
        try:
            value = int(text.replace(",", ""))
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return value

    return number


def output_file(text: str) -> Path:
    """An argument that is a file to write, for argparse.  Raises UserError, before any work, where that can't be."""
    file = path(text)
    if file.is_dir():
        raise UserError(f"{file} can't be written: it is a folder.")
    check_folder(str(file), file.absolute().parent)
    return file


# Control characters but the tab and the end of a line, and those that turn the direction of writing.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    """A text for the terminal with control characters as escapes: other people's files could clear or colour it."""
    return _CONTROLS.sub(lambda match: ascii(match[0])[1:-1], text)


FOLDED = 14
"""Characters of a table's cell that are never folded while a terminal has room for them and the first columns."""


def show_table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    notes: Sequence[str] = (),
    *,
    left: int = 1,
    file: TextIO | None = None,
) -> None:
    """Print a table, the first `left` columns flush left, and paragraphs below it, to `file` (default: stdout).

    On a terminal, cells longer than FOLDED are folded where needed, columns for which there is no room go on below with
    the first `left` ones again, and **this** is bold.  In a file or a pipe it is plain text, a line a row.
    """
    from rich import box
    from rich.cells import cell_len
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    terminal = (file := file or sys.stdout).isatty()
    console = Console(file=file, width=None if terminal else 10**6, force_terminal=terminal, force_jupyter=False)
    cells = [[Text(visible(cell)) for cell in row] for row in (header, *rows)]
    for cell in (cell for row in cells for cell in row if terminal and cell.plain.startswith("**")):
        cell.plain, cell.style = cell.plain.strip("*"), "bold"
    widths = [min(FOLDED, max(cell_len(cell.plain) for cell in column)) + 2 for column in zip(*cells, strict=True)]
    blocks: list[list[int]] = [[*range(left)]]
    for column in range(left, len(header)):
        if len(blocks[-1]) > left and sum(widths[i] for i in [*blocks[-1], column]) - 2 > console.width:
            blocks.append([*range(left)])
        blocks[-1].append(column)
    for number, block in enumerate(blocks):
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False, show_edge=False)
        for column in block:
            table.add_column(cells[0][column], justify="left" if column < left else "right", overflow="fold")
        for row in cells[1:]:
            table.add_row(*(row[column] for column in block))
        if number:
            console.print()
        console.print(table, crop=False)
    for note in notes:
        console.print(Text(visible(f"\n{note}")))


def options_as_overrides(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> list[str]:
    """The arguments, with `--key value` and `--key=value` of keys that are no options of the parser as `key=value`.

    None takes sys.argv.  Raises UserError for an option without a value.
    """
    known = {option for action in parser._actions for option in action.option_strings}
    waiting = iter(sys.argv[1:] if argv is None else argv)
    arguments = []
    for argument in waiting:
        name, equals, value = argument.partition("=")
        if argument.startswith("--") and len(argument) > 2 and name not in known:
            if not equals:
                value = next(waiting, "--")
                if value.startswith("--"):
                    raise UserError(f"{name} needs a value, as in {name} VALUE.")
            argument = f"{name[2:].replace('-', '_')}={value}"
        arguments.append(argument)
    return arguments
