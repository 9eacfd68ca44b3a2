"""Several machines that make a stage together: they meet, and each notices when another has failed.

Node 0 keeps a store at the address where all meet, and torchrun uses it after us. Every node says
there each second that it lives. One that has failed leaves its reason there, and one that says
nothing any more is taken for dead: the others then end their processes, which may be waiting for
those of the other machine without a word from the network.
"""

import contextlib
import json
import os
import signal
import socket
import threading
import time
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING

import psutil

from align.errors import AlignError, InputError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import TCPStore

_BEAT_SECONDS = 1.0
_GONE_SECONDS = 10.0  # without a beat; a busy machine is late by a second or two
_SECONDS_TO_END = 10.0  # that our processes have when another node has failed
_FAILURE = "failure"


@dataclass(frozen=True, slots=True)
class Place:
    """Which of how many nodes this is, where they meet, and how long each waits for the others."""

    nodes: int
    rank: int
    host: str
    port: int
    seconds: float

    def __str__(self) -> str:
        """Return the address, as the command takes it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


@dataclass
class Meeting:
    """The nodes that have met."""

    place: Place
    store: "TCPStore"
    failure: str = ""  # what another node has failed with; empty: none has
    _beaten: float = field(default_factory=time.monotonic)
    _own: str = ""  # what this node has failed with
    _lost: bool = False  # whether the store has gone
    _over: threading.Event = field(default_factory=threading.Event)

    def fail(self, reason: str) -> None:
        """Tell the others that this node has failed, unless another has before, as ``failure``."""
        if self.failure:
            return
        self._own = f"node {self.place.rank} ({socket.gethostname()}): {reason}"
        with contextlib.suppress(RuntimeError):  # the store may have gone with node 0
            self._hear(self.store.compare_set(_FAILURE, "", self._own).decode())

    def find_failure(self) -> str:
        """Return what another node has failed with, perhaps before this one; empty: none has.

        To be asked after ``fail``. It takes some seconds to be sure that the others live.
        """
        until = time.monotonic() + _GONE_SECONDS + 2 * _BEAT_SECONDS
        while not self.failure and not self._others_left() and time.monotonic() < until:
            time.sleep(_BEAT_SECONDS / 5)
        return self.failure

    def leave(self) -> None:
        """End; node 0, which keeps the store, waits a while for the others to do so."""
        self._over.set()
        if self._lost:
            return
        with contextlib.suppress(RuntimeError):
            self.store.set(_left(self.place.rank), "1")
        seconds = 3 * _BEAT_SECONDS if self.failure else _GONE_SECONDS
        until = time.monotonic() + seconds
        while self.place.rank == 0 and not self._others_left() and time.monotonic() < until:
            time.sleep(_BEAT_SECONDS / 5)

    def watch(self) -> None:
        """Begin to say that this node lives, and to look whether the others do."""
        threading.Thread(target=self._look, daemon=True).start()
        # On its own: the store of a machine that has vanished may not answer at all.
        threading.Thread(target=self._guard, daemon=True).start()

    def _look(self) -> None:
        others = [rank for rank in range(self.place.nodes) if rank != self.place.rank]
        beats = dict.fromkeys(others, (0, time.monotonic()))
        while not self._over.wait(_BEAT_SECONDS):
            try:
                self.store.add(_beat(self.place.rank), 1)
                if self.store.check([_FAILURE]):
                    self._hear(self.store.get(_FAILURE).decode())
                for rank, (before, _) in beats.items():
                    count = self.store.add(_beat(rank), 0)
                    if count != before or self.store.check([_left(rank)]):
                        beats[rank] = (count, time.monotonic())
            except RuntimeError:
                self._lose("its connection is lost")
                return
            self._beaten = time.monotonic()
            for rank, (_, since) in beats.items():
                if self._beaten - since > _GONE_SECONDS:
                    silent = f"node {rank} is gone: it has said nothing for {_GONE_SECONDS:.0f} s"
                    self.failure = self.failure or silent

    def _guard(self) -> None:
        while not self._over.wait(_BEAT_SECONDS):
            if time.monotonic() - self._beaten > _GONE_SECONDS:
                self._lose("it does not answer")
            if self.failure:
                self._end_processes()
                return

    def _end_processes(self) -> None:
        """Give our processes the time to end by themselves, as most will, then make them."""
        processes = psutil.Process().children()
        _, alive = psutil.wait_procs(processes, timeout=_SECONDS_TO_END)
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)

    def _hear(self, failure: str) -> None:
        if failure != self._own:
            self.failure = failure

    def _lose(self, why: str) -> None:
        self._lost = True
        self.failure = self.failure or f"node 0 is gone: {why}"

    def _others_left(self) -> bool:
        others = (rank for rank in range(self.place.nodes) if rank != self.place.rank)
        try:
            return self._lost or bool(self.store.check([_left(rank) for rank in others]))
        except RuntimeError:
            return True


def meet(place: Place, work: list[str]) -> Meeting:
    """Wait until all nodes have come.

    Args:
        work: what this node was started for; that of all has to be the same.

    Raises:
        InputError: two nodes have the same number, or were started for different work.
        AlignError: not all have come in time.
    """
    until = time.monotonic() + place.seconds
    ours = _reach(place, until) if place.rank else None
    store = _open(place)
    ours = ours or _reach(place, until)
    mine = json.dumps({"host": socket.gethostname(), "address": ours, "of": os.getpid()})
    if store.compare_set(_node(place.rank), "", mine).decode() != mine:
        raise InputError(f"--node-rank={place.rank}: another node has it; give each its own")
    if place.rank == 0:
        store.set("work", json.dumps(work))
    try:
        _wait_for_all(store, place, until)
        theirs = json.loads(store.get("work"))
        if theirs != work:
            raise InputError(
                f"node 0 was started for `{' '.join(theirs)}`, this one for `{' '.join(work)}`;"
                " give every node the same command"
            )
        other = json.loads(store.get(_node(0 if place.rank else 1)))["address"]
    except RuntimeError as error:
        raise AlignError(f"rendezvous at {place}: node 0 has left: {error}") from None
    # Else gloo takes the interface of the host's own name, which often is that of localhost.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", _interface_to(other))
    return Meeting(place, store)


def _wait_for_all(store: "TCPStore", place: Place, until: float) -> None:
    missing = [rank for rank in range(place.nodes) if not store.check([_node(rank)])]
    while missing and time.monotonic() < until:
        time.sleep(_BEAT_SECONDS / 5)  # not the store's own wait, which lets no signal through
        missing = [rank for rank in missing if not store.check([_node(rank)])]
    if missing:
        who = ", ".join(map(str, missing))
        raise AlignError(
            f"rendezvous at {place}: of {place.nodes} nodes these have not come within"
            f" {place.seconds:.0f} s: {who}; start the same command there, with --node-rank {who},"
            " and see that this address can be reached from there"
        )


def _reach(place: Place, until: float) -> str:
    """Return our address towards node 0, as soon as its store can be reached."""
    while True:
        try:
            with socket.create_connection((place.host, place.port), timeout=2) as connection:
                if connection.getsockname() == connection.getpeername():
                    raise OSError("nothing listens there")  # but this very connection, by chance
                return str(connection.getsockname()[0])
        except OSError as error:
            if time.monotonic() > until:
                raise AlignError(
                    f"rendezvous at {place}: node 0 does not answer within {place.seconds:.0f} s"
                    f" ({error}); start the same command on {place.host} with --node-rank 0, and"
                    " see that the port is open"
                ) from None
            time.sleep(_BEAT_SECONDS / 5)


def _open(place: Place) -> "TCPStore":
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    try:
        return TCPStore(
            place.host,
            place.port,
            is_master=place.rank == 0,
            timeout=timedelta(seconds=_GONE_SECONDS),
            wait_for_workers=False,
            multi_tenant=True,  # torchrun opens it again in this process
        )
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise AlignError(
            f"rendezvous at {place}: cannot be opened: {reason}; is {place.host} this machine, and"
            " the port free? Choose another by --rendezvous HOST:PORT"
        ) from None


def _interface_to(address: str) -> str:
    """Return the name of the network interface by which an address is reached."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as route:  # nothing is sent
        route.connect((address, 9))
        ours = str(route.getsockname()[0])
    for name, addresses in psutil.net_if_addrs().items():
        if any(one.address.partition("%")[0] == ours for one in addresses):
            return str(name)
    raise AlignError(f"no network interface here has the address {ours}, from which {address} is")


def _node(rank: int) -> str:
    return f"node/{rank}"


def _beat(rank: int) -> str:
    return f"beat/{rank}"


def _left(rank: int) -> str:
    return f"left/{rank}"
