"""The one exception type that means "the user can fix this"."""


class GradiendError(Exception):
    """Something a user gave us is wrong.

    The message says what was wrong, where (file, key or row), what is allowed and what to do next.
    Stage programs print it without a traceback and exit with status 1; every other exception is a bug of ours.
    """
