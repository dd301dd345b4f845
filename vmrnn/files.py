"""Files that are replaced whole or not at all."""

import os
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from vmrnn.errors import UserError


@contextmanager
def replacing(path, keep=None):
    """A temporary path to write to; flushed to disk and renamed to `path` at the end, or removed on an
    error, so a reader sees the old file or the whole new one. A full disk raises UserError.

    keep: the name that the old file then takes. A program killed between the two renames leaves only
    that one.
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
