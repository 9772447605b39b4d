"""The one error that a user's mistake raises."""


class SparselineError(Exception):
    """Bad input, told in one sentence: what is wrong, where, and how to mend it.

    Stages print it and exit with code 2; anything else that escapes a stage is a bug and keeps its traceback.
    """
