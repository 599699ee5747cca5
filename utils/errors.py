"""The one exception that is meant for the person at the keyboard."""


class UserError(Exception):
    """Something that the user can mend: a wrong path, a bad config, missing copies.

    The message says what is wrong, where, and what to do, in one or two lines.  The command lines print it without a
    traceback and leave with exit code 2.
    """
