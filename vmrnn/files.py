"""Folders that can be written, and files that are replaced whole or not at all."""

import os
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from vmrnn.errors import UserError


def make_folder(path):
    """The folder as a Path, made if it does not exist; UserError if it cannot be written."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
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
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors report a full disk as theirs
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: cannot be written ({reason}); the previous file is untouched") from error
    finally:
        temporary.unlink(missing_ok=True)
