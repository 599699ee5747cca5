"""The exceptions that are meant for the person at the keyboard."""


def escaped(text: object) -> str:
    """A text with its control characters escaped: those of a file of others may steer the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in str(text))


class UserError(Exception):
    """Something that the user can mend: a wrong path, a bad config, missing copies.

    The message says what is wrong, where, and what to do, in one or two lines.  The command lines print it without a
    traceback and leave with exit code 2.
    """


class Stopped(KeyboardInterrupt):
    """A signal ended the program.

    number: the signal; note: what was kept before the end, "" for nothing.
    """

    def __init__(self, number: int, note: str = ""):
        super().__init__(number)
        self.number = number
        self.note = note
