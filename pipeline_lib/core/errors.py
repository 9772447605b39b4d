"""The error for a user's mistakes."""


class SparselineError(Exception):
    """Bad input, described in one sentence: what is wrong, where, and how to correct it.

    Stages print it and exit with code 2. Any other exception of a stage is a bug, and its traceback
    goes to a file (``bugs.tell``).
    """


class LostError(Exception):
    """Raised if another process of the same stage is gone. Stages print it and exit with code 4."""
