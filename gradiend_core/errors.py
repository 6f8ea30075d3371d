"""The one exception type that means "the user can fix this"."""

import re
import signal


class GradiendError(Exception):
    """Something a user gave us is wrong.

    The message says what was wrong, where (file, key or row), what is allowed and what to do next.
    Stage programs print it without a traceback and exit with status 1; every other exception is a bug of ours.
    """


def killed_by(number: int) -> str:
    """What to say of a process that a signal has ended."""
    name = signal.Signals(number).name
    return f"killed ({name}{', as the system does when memory runs out' if name == 'SIGKILL' else ''}). Run it again."


_NO_MEMORY = (
    "can't allocate memory",
    "cannot allocate memory",
    "out of memory",
    "std::bad_alloc",
    "can't start new thread",  # each needs memory for its stack
    "failed to launch worker thread",
    "could not create a primitive",  # oneDNN, whose reason is lost
)


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out: Python's own, or that of a library, by its text."""
    text = str(error).lower()
    # The loader of libraries gives a reason after that text when it is another one (a disk without programs). Python's
    # compiler, when a module is imported, blames the syntax tree of which it could not allocate a part.
    return (
        isinstance(error, MemoryError)
        or any(said in text for said in _NO_MEMORY)
        or text.endswith("failed to map segment from shared object")
        or re.fullmatch(r"field '\w+' is required for \w+", text) is not None
    )
