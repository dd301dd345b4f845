"""Folders that can be written, and files that are replaced whole or not at all."""

import glob
import os
import secrets
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from vmrnn.errors import UserError, first_line


def new_file(path):
    """Make an empty file beside `path` under a name that nobody can predict, and return its path.

    The name is .NAME.*.tmp. A file or a link that someone else put there is never opened.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))  # the umask applies, as with open()
    return temporary


def without_pattern(path):
    """An absolute path that names a file or a folder: of a glob the folder that it looks into."""
    path = Path(os.path.abspath(path))
    while glob.has_magic(path.name) and not path.exists():
        path = path.parent
    return path


def make_folder(path):
    """The folder as a Path, made if it does not exist; UserError if it cannot be written."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        new_file(path / "writable").unlink()
    except OSError as error:
        raise UserError(
            f"{path}: cannot write there ({error.strerror}); choose another folder with --res_dir"
        ) from error
    return path


@contextmanager
def replacing(path, keep=None):
    """A temporary path to write to. At the end it is flushed to the disk and renamed to `path`.

    path   the file to replace
    keep   the name that the old file then takes; a program killed between the two renames leaves only that one

    On an error the temporary file is removed. A reader sees the old file or the whole new one. UserError: a full disk.
    """
    path, temporary = Path(path), None
    try:
        temporary = new_file(path)
        yield temporary
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors report a full disk as theirs
        raise UserError(f"{path}: cannot be written ({first_line(error)}); the previous file is untouched") from error
    finally:
        if temporary:
            temporary.unlink(missing_ok=True)
