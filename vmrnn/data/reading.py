"""What all readers of foreign files share: one-line errors, and a limit on what a file may ask for."""

from contextlib import contextmanager
from pathlib import Path

from vmrnn.errors import Stopped, UserError

MAX_PIXELS = 2**27  # of one frame: 11,585 x 11,585


@contextmanager
def reading(path, what, trouble="cannot be read as"):
    """Turn whatever a library raises for a missing, damaged or hostile file into a UserError of one line.

    what      what the file should be, such as "a video"
    trouble   what the message says before it

    The libraries raise some twenty kinds of exceptions for damaged files, among them TypeError and IndexError.
    """
    try:
        yield
    except (UserError, Stopped):
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; name {what}") from None
    except Exception as error:
        reason = one_line(error) or type(error).__name__
        raise UserError(f"{path}: {trouble} {what} ({reason}); fetch or write it again") from error


def one_line(error):
    return " ".join(str(error).split())[:120]


def check_size(path, width, height):
    """UserError for a frame that is larger than any real one. A few bytes of a file can announce billions of pixels."""
    if not 0 < width * height <= MAX_PIXELS:
        raise UserError(f"{path}: frames of {height}x{width}; at most {MAX_PIXELS} pixels per frame can be read")


def local_path(path):
    """The absolute path of a file, which no library takes for the address of something else."""
    return str(Path(path).absolute())
