"""One process at a time in a run directory: a lock that ends with its process, however it ends."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from align.errors import InputError

# In the environment of the processes that a holder starts: the directory.
_HELD = "ALIGN_HELD_RUN"


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[dict[str, str]]:
    """Hold a directory, which is made if it is not there, and unmade if it is still empty then.

    Yields:
        What belongs in the environment of processes that are to hold it with us, and after us
        should we be killed; they also have to inherit our open files.

    Raises:
        InputError: another process holds it, or it lies behind a link that leads nowhere.
    """
    for path in (directory, *directory.parents):
        if path.is_symlink() and not path.exists():
            raise InputError(
                f"{path}: is a link to nothing, or to itself; remove it, or choose another name or"
                " run.root"
            )
    inherited = {_HELD: str(directory.resolve())}
    if inherited.items() <= os.environ.items():
        yield inherited
        return
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
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
    os.set_inheritable(descriptor, True)
    try:
        yield inherited
    finally:
        with contextlib.suppress(OSError):
            for path in missing:
                path.rmdir()
        os.close(descriptor)
