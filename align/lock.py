"""One process at a time in a run directory: a lock that ends with its process, however it ends."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from align.errors import InputError


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold a directory, which is made if it is not there; nothing is left in it.

    Raises:
        InputError: another process holds it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise InputError(
            f"{directory}: another process is making a stage of this run; wait until it has ended,"
            " end it, or choose another name or run.root"
        ) from None
    try:
        yield
    finally:
        os.close(descriptor)
