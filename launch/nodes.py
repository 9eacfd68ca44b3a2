"""Several machines for one stage: how many there are, which of them this is, and where they meet.

Every machine runs the same command, with its own number; nothing is started on another one.
"""

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from align.errors import InputError

PORT = 29500  # torchrun's own
SECONDS = 600.0  # by hand, minutes pass between the first command and the last


@dataclass(frozen=True, slots=True)
class Nodes:
    """The machines that make a stage together, and this one's number; None while none is meant."""

    count: int
    rank: int | None
    rendezvous: str
    wait: float = SECONDS

    @property
    def is_first(self) -> bool:
        """Whether this is the machine that writes and speaks for all."""
        return self.rank == 0

    def at(self, rank: int) -> "Nodes":
        """Return the same for another machine."""
        return replace(self, rank=rank)

    def options(self) -> list[str]:
        """Return what the processes of this machine are started with."""
        place = ["--node-rank", str(self.rank), "--rendezvous", self.rendezvous]
        return ["--nodes", str(self.count), *place, "--wait", f"{self.wait:g}"]


@dataclass(frozen=True, slots=True)
class Host:
    """A line of a hostfile."""

    name: str
    slots: int


def find_nodes(
    count: int | None,
    rank: int | None,
    rendezvous: str | None,
    hostfile: Path | None,
    wait: float | None,
    *,
    environ: Mapping[str, str] = os.environ,
    all_of_them: bool = False,
) -> tuple[Nodes | None, int | None]:
    """Return the machines that the options of a command mean, and a hostfile's processes on each.

    Args:
        all_of_them: no machine in particular is meant, as in a dry run.

    Raises:
        InputError: options are missing, or contradict each other or the hostfile.
    """
    slots = None
    if hostfile is not None:
        if count is not None:
            raise InputError("--nodes and --hostfile: the file says how many; leave --nodes out")
        hosts = read_hostfile(hostfile)
        count, slots = len(hosts), hosts[0].slots
        rendezvous = rendezvous or f"{hosts[0].name}:{PORT}"
        if rank is None and not all_of_them:
            rank = _own_rank(hosts, hostfile, socket.gethostname())
    elif count is None:
        given = {"--node-rank": rank, "--rendezvous": rendezvous, "--rendezvous-timeout": wait}
        for option in (option for option, value in given.items() if value is not None):
            raise InputError(f"{option}: needs --nodes or --hostfile")
    if count is None or count == 1:
        return None, slots
    if rank is None and not all_of_them:
        rank = _rank_in_slurm(environ)
    if rank is not None and rank >= count:
        raise InputError(f"--node-rank={rank}: allowed with --nodes={count}: 0 to {count - 1}")
    where = _checked(rendezvous)
    return Nodes(count, rank, where, SECONDS if wait is None else wait), slots


def _checked(rendezvous: str | None) -> str:
    if rendezvous is None:
        raise InputError("--nodes: needs --rendezvous HOST:PORT, an address of node 0")
    port = rendezvous.rpartition(":")[2]
    if not re.fullmatch(r"\S+:\d{1,5}", rendezvous) or not 0 < int(port) < 2**16:
        raise InputError(
            f"--rendezvous={rendezvous}: allowed: HOST:PORT, an address of node 0 and a port from 1"
            " to 65535"
        )
    return rendezvous


def read_hostfile(file: Path) -> list[Host]:
    """Read DeepSpeed's format: a line ``name slots=N`` for each machine, in their order.

    Raises:
        InputError: it is not such a file, or the machines differ in their slots; names the line.
    """
    hosts: list[Host] = []
    for number, line in enumerate(_read(file).splitlines(), start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = re.fullmatch(r"(\S+)\s+slots=([1-9]\d*)", text)
        if match is None:
            raise InputError(f"{file}:{number}: found `{text}`; allowed: a line `name slots=N`")
        host = Host(match[1], int(match[2]))
        if any(other.name == host.name for other in hosts):
            raise InputError(f"{file}:{number}: {host.name} stands there twice; keep one")
        if hosts and host.slots != hosts[0].slots:
            raise InputError(
                f"{file}:{number}: {host.name} has slots={host.slots}, {hosts[0].name}"
                f" slots={hosts[0].slots}; allowed: as many on each"
            )
        hosts.append(host)
    if not hosts:
        raise InputError(f"{file}: names no host; allowed: lines `name slots=N`")
    return hosts


def processes_on_each(processes: int, nodes: int) -> int:
    """Return each machine's part of the processes.

    Raises:
        InputError: they cannot be shared equally.
    """
    if processes % nodes:
        raise InputError(
            f"distributed.processes={processes}: --nodes={nodes} cannot share them equally;"
            f" allowed: multiples of {nodes}, or --nproc for the processes of each"
        )
    return processes // nodes


def _own_rank(hosts: list[Host], file: Path, name: str) -> int:
    """Return the line of this machine, by its whole name or what stands before the first dot."""
    names = [host.name for host in hosts]
    for ours in (name, name.partition(".")[0]):
        for theirs in (names, [other.partition(".")[0] for other in names]):
            if theirs.count(ours) == 1:
                return theirs.index(ours)
    raise InputError(
        f"{file}: this machine, {name}, is none of {', '.join(names)}; say which it is by"
        " --node-rank"
    )


def _rank_in_slurm(environ: Mapping[str, str]) -> int:
    if "SLURM_NODEID" not in environ:
        raise InputError("--nodes: needs --node-rank, which of them this machine is, from 0")
    return int(environ["SLURM_NODEID"])


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise InputError(f"--hostfile={file}: cannot be read: {reason}") from None
