"""The exceptions that end a program with one line, the line of any other error, and the one check of numbers."""

import math


class UserError(ValueError):
    """A missing or damaged file, an impossible shape, a wrong option.

    The message is one line that says what, where and what to do. The programs print it and end with exit code 2
    (vmrnn.runtime.run_program). A library caller sees a ValueError.
    """


def first_line(error):
    """The first line of an error's message; the name of its type if it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def range_complaint(value, at_least=None, below=None):
    """What is wrong with a number, as the end of a sentence; None if it is finite and in [at_least, below)."""
    if isinstance(value, float) and not math.isfinite(value):
        return "must be finite"
    if (at_least is None or value >= at_least) and (below is None or value < below):
        return None
    if below == 1:
        return f"must be in [{at_least}, {below})"
    if at_least is not None and value < at_least:
        return f"must be at least {at_least}" if at_least else "must be zero or more"
    return f"must be below 2**{below.bit_length() - 1}"


class Stopped(Exception):
    """The program was asked to stop, and has saved what it needs to continue. The message says how to continue."""
