"""What all commands share: exit codes, one line for an error, Ctrl-C, and odd terminals.

Exit codes: 0 done, 1 some inputs failed (the command has listed them), 2 the command, the config or the data is wrong,
130 interrupted.
"""

import argparse
import logging
import os
import select
import sys
from collections.abc import Callable, Sequence

from utils.errors import UserError

log = logging.getLogger(__name__)


def run(command: Callable[[], int | None], *, stopped: str = "the same command goes on where it stopped") -> int:
    """Call a command and return its exit code; None counts as 0.

    UserError and OSError (a full disk, a file that may not be read) become one line on stderr; other exceptions are
    bugs and pass through.  stopped: what to say after Ctrl-C.
    """
    tolerate_odd_names()
    try:
        code = command() or 0
        sys.stdout.flush()
        return code
    except SystemExit as leave:  # argparse has said what is wrong
        return leave.code if isinstance(leave.code, int) else 0 if leave.code is None else 2
    except UserError as error:
        return _refuse(error)
    except KeyboardInterrupt:
        print(f"\nstopped; {stopped}", file=sys.stderr)
        return 130
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _stdout_is_closed():
            return 0
        return _refuse(f"{error.strerror or error}" + (f": {os.fsdecode(error.filename)}" if error.filename else ""))


def _refuse(message: object) -> int:
    log.debug("ended with an error", exc_info=True)
    print(f"error: {message}", file=sys.stderr)
    return 2


def _stdout_is_closed() -> bool:
    """Whether the reader of our output has left, as in `... | head -1`; Python must not try to write to it again."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    if not poll.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def tolerate_odd_names() -> None:
    """Print a name that the terminal's encoding does not know escaped, instead of ending the command."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def options_as_overrides(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> list[str]:
    """The arguments, with `--key value` and `--key=value` of keys that are no options of the parser as `key=value`.

    None takes sys.argv.  Raises UserError for an option without a value.
    """
    known = {option for action in parser._actions for option in action.option_strings}
    waiting = list(sys.argv[1:] if argv is None else argv)
    arguments = []
    while waiting:
        argument = waiting.pop(0)
        name, equals, value = argument.partition("=")
        if argument.startswith("--") and len(argument) > 2 and name not in known:
            if not equals:
                if not waiting or waiting[0].startswith("--"):
                    raise UserError(f"{name} needs a value, as in {name} VALUE.")
                value = waiting.pop(0)
            argument = f"{name[2:].replace('-', '_')}={value}"
        arguments.append(argument)
    return arguments
