"""What the system says of a file that is being written, with the file's name: Python gives it only of opening one."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import TargetError


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors of the system within are of `path`, unless they name another file.

    Raises TargetError where the file is larger than the process may write or the file system takes.
    """
    try:
        yield
    except OSError as error:
        if error.errno == errno.EFBIG:
            raise TargetError(
                f"{path}: cannot be written as large as it must be; raise the limit on the size of files (ulimit -f), "
                "or write to a file system that takes larger ones"
            ) from error
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
