"""Logging to the screen and a file, and progress bars."""

import logging
import sys
from contextlib import suppress
from pathlib import Path

from tqdm import tqdm

from utils.cli import visible

PACKAGES = ("main", "models", "utils", "convs", "compress", "ControlNet")


class _Screen(logging.Handler):
    """Prints above a running progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(visible(self.format(record)), file=sys.stdout)


class _File(logging.FileHandler):
    """Says once that the log can't be written, as on a full disk, in place of logging's traceback for each line."""

    failed = False

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self.failed:
            self.failed = True
            tqdm.write(f"{self.baseFilename} can't be written ({error.strerror})", file=sys.stdout)

    def close(self) -> None:
        with suppress(OSError):  # what is still in the buffer, on a full disk: `handleError` has said so
            super().close()


def start(file: Path | None, *, quiet: bool = False) -> None:
    """Send this project's log records to the screen (INFO and above) and, with times, to a file (all levels, appended).

    quiet: send them nowhere, for all processes of a run but the first.  A further call replaces the earlier handlers.
    """
    handlers: list[logging.Handler] = [logging.NullHandler() if quiet else _Screen(logging.INFO)]
    if file is not None and not quiet:
        file.parent.mkdir(parents=True, exist_ok=True)
        handlers.append(_File(file, encoding="utf-8", errors="backslashreplace"))
        handlers[-1].setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for name in PACKAGES:
        logger = logging.getLogger(name)
        logger.setLevel(logging.DEBUG)
        for handler in logger.handlers[:]:
            logger.removeHandler(handler)
            handler.close()
        for handler in handlers:
            logger.addHandler(handler)


def clock(seconds: float) -> str:
    """Such as "3:25:00"."""
    return tqdm.format_interval(seconds)


def progress(total: int, description: str, *, done: int = 0, quiet: bool = False, rate: bool = True) -> tqdm:
    """A progress bar on stderr with the time left; one line every 30 seconds where stderr is no terminal.

    done: units of the total that were done before; rate: show counts and speed, which take 30 columns.
    """
    seconds = 0.2 if sys.stderr.isatty() else 30
    return tqdm(
        total=total,
        initial=done,
        desc=description,
        disable=quiet,
        leave=False,
        delay=seconds,
        mininterval=seconds,
        maxinterval=max(seconds, 10),
        dynamic_ncols=True,
        bar_format=None if rate else "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
        file=sys.stderr,
    )
