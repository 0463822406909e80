"""Who is there? Before `jax.distributed`, which aborts without a name when a process is missing.

Process 0 listens where its coordinator will; every process, it too, knocks there and hands in a
card. When all have come, or time is up, each gets the roll: every card, and how far its clock is
from that of process 0. So the port, the name and the way there are tried as training will use them.
"""

import contextlib
import dataclasses
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from launch.doctor.findings import Deadline, Finding, ok, wrong

GREETING = "sleepnet doctor"
MOST_CLOCK_SECONDS = 5.0
PAUSE = 0.3  # seconds between two knocks, or two looks at the time


class RollCallError(RuntimeError):
    """The coordinator was not reached; seen and advice are for a finding."""

    def __init__(self, seen: str, advice: str):
        super().__init__(seen)
        self.seen, self.advice = seen, advice


@dataclasses.dataclass(frozen=True)
class Card:
    """What a process says of itself."""

    process: int
    processes: int
    host: str
    pid: int
    facts: dict[str, str]  # must be equal everywhere: versions, the config's digest
    clock: float = 0.0  # seconds ahead of process 0
    doubt: float = 0.0  # seconds by which that may be wrong
    sees: bool | None = None  # process 0's mark in the workdir; None: it has no workdir

    @property
    def name(self) -> str:
        return f"process {self.process} ({self.host}, pid {self.pid})"


def card(process: int, processes: int, facts: dict[str, str]) -> Card:
    return Card(process, processes, socket.gethostname(), os.getpid(), facts)


class Host:
    """Process 0's side: listens from `with` on, until its block ends.

    Args:
      seconds: how long to wait for all, by the clock `now`.
    """

    def __init__(
        self,
        address: str,
        processes: int,
        seconds: float,
        now: Callable[[], float] = time.monotonic,
    ):
        self.token = secrets.token_hex(8)
        self._processes, self._deadline = processes, Deadline(seconds, now)
        self._port = split(address)[1]
        self._cards: list[Card] = []
        self._news = threading.Condition()

    def __enter__(self):
        try:
            self._listener = (
                socket.create_server(("", self._port), family=socket.AF_INET6, dualstack_ipv6=True)
                if socket.has_dualstack_ipv6()
                else socket.create_server(("", self._port))
            )
        except OSError as error:
            raise RollCallError(
                f"cannot listen on port {self._port}: {error.strerror}",
                "an earlier run may be alive on it: stop it, or give every process another port",
            ) from None
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()
        return self

    def __exit__(self, *_):
        """Leaves the port free for the coordinator itself, once all have their roll."""
        self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        for thread in self._threads:
            thread.join(timeout=2)
        self._listener.close()

    def _accept(self):
        with contextlib.suppress(OSError):  # closed
            while True:
                connection, _ = self._listener.accept()
                serving = threading.Thread(target=self._serve, args=(connection,), daemon=True)
                self._threads.append(serving)
                serving.start()

    def _serve(self, connection: socket.socket):
        with contextlib.suppress(OSError, ValueError, TypeError), connection:
            connection.settimeout(self._deadline.left() + 5)
            file = connection.makefile("rw")
            _say(file, {"greeting": GREETING, "token": self.token})
            file.readline()  # it has looked for our mark, and can tell its time without delay
            asked = time.time()
            _say(file, {"time": "?"})
            told = json.loads(file.readline())
            heard = time.time()
            ahead, doubt = told["clock"] - (asked + heard) / 2, (heard - asked) / 2
            with self._news:
                self._cards.append(Card(**{**told, "clock": ahead, "doubt": doubt}))
                self._news.notify_all()
                while not self._all_here() and (left := self._deadline.left()):
                    self._news.wait(min(left, PAUSE))
                roll = list(self._cards)
            _say(file, {"roll": [dataclasses.asdict(card) for card in roll]})

    def _all_here(self):
        return {card.process for card in self._cards} >= set(range(self._processes))


def attend(
    address: str, own: Card, seconds: float, sees: Callable[[str], Any]
) -> tuple[str, list[Card]]:
    """The token of process 0 and the cards of all who came, by process.

    Args:
      sees: whether this process sees the mark of that token in the workdir.

    Raises:
      RollCallError: nobody was reached, or someone else.
    """
    deadline = Deadline(seconds)
    with _knock(address, deadline) as connection:
        connection.settimeout(5 + deadline.left())  # process 0 may be slow, too
        file = connection.makefile("rw")
        try:
            greeting = json.loads(file.readline())
            if greeting["greeting"] != GREETING:
                raise ValueError
        except (OSError, ValueError, TypeError, KeyError):
            raise RollCallError(
                f"{address} is answered by a program that is no doctor",
                "an earlier run may be alive on it: stop it, or give every process another port",
            ) from None
        connection.settimeout(seconds + 10)
        try:
            own = dataclasses.replace(own, sees=sees(greeting["token"]))
            _say(file, {"ready": True})
            file.readline()
            _say(file, dataclasses.asdict(dataclasses.replace(own, clock=time.time())))
            roll = [Card(**told) for told in json.loads(file.readline())["roll"]]
        except (OSError, ValueError):
            raise RollCallError(
                f"process 0 at {address} was lost during the roll call",
                "see what process 0 says, and run all again",
            ) from None
    return greeting["token"], sorted(roll, key=lambda card: card.process)


def _knock(address: str, deadline: Deadline) -> socket.socket:
    """A connection to the coordinator, tried until the deadline: it may come up after us."""
    host, port = split(address)
    while True:
        began = time.monotonic()
        try:
            return socket.create_connection((host, port), timeout=max(0.5, deadline.left()))
        except OSError as error:
            if deadline.left() < PAUSE:
                raise _unreached(address, error) from None
        time.sleep(max(0.0, PAUSE - (time.monotonic() - began)))


def _unreached(address: str, error: OSError) -> RollCallError:
    host, port = split(address)
    if isinstance(error, socket.gaierror):
        return RollCallError(
            f"the name {host!r} of --coordinator_address is not known here: {error.strerror}",
            "check its spelling and this machine's DNS, or give the address in numbers",
        )
    if isinstance(error, ConnectionRefusedError):
        return RollCallError(
            f"coordinator {address} refuses connections: nothing listens there",
            f"start the same command as process 0 (--process_id=0) on {host}, at the same time; "
            f"check the port {port}",
        )
    if isinstance(error, TimeoutError):
        return RollCallError(
            f"coordinator {address} does not answer: packets are lost on the way",
            f"open port {port} in the firewall between this machine and {host}; is {host} up?",
        )
    return RollCallError(
        f"coordinator {address} cannot be reached: {error.strerror or error}",
        "check the network between this machine and process 0",
    )


def findings(roll: list[Card], processes: int) -> list[Finding]:
    """Who is missing, there twice, of another launch, or lives at another time."""
    return [*_present(roll, processes), *_alike(roll), *_shared(roll), *_clocks(roll)]


def _present(roll, processes):
    ids = [card.process for card in roll]
    for card in roll:
        others = [other.name for other in roll if other.process == card.process]
        if len(others) > 1:
            return [wrong("processes", f"--process_id={card.process} is given more than once: "
                          + ", ".join(others), "give each process an id of its own")]  # fmt: skip
        if card.processes != processes:
            return [wrong("processes", f"{card.name} has --num_processes={card.processes}, and "
                          f"others have {processes}", "give all the same")]  # fmt: skip
    missing = sorted(set(range(processes)) - set(ids))
    if missing:
        named = ", ".join(map(str, missing))
        there = "; joined: " + ", ".join(card.name for card in roll)
        return [
            wrong("processes", f"{len(missing)} of {processes} have not joined: process {named}"
                  + there, f"start process {named}, or see why it ended")
        ]  # fmt: skip
    hosts = len({card.host for card in roll})
    return [ok("processes", f"all {processes} have joined, on {hosts} machine(s)")]


def _alike(roll):
    first = roll[0]
    for card in roll[1:]:
        for fact, value in card.facts.items():
            if first.facts.get(fact) != value:
                return [wrong("alike", f"{card.name} has {fact} {value}, and {first.name} has "
                              f"{first.facts.get(fact)}", "give all the same code, environment "
                              "and command")]  # fmt: skip
    return [ok("alike", "all have the same versions and config")] if len(roll) > 1 else []


def _shared(roll):
    blind = [card.name for card in roll if card.sees is False]
    first = roll[0]
    if blind and first.process == 0 and first.sees is None:
        seen = f"{first.name} cannot write to its --workdir"
        return [wrong("shared", seen, "see what it says, and run all again")]
    if blind:
        seen = f"{', '.join(blind)}: does not see what process 0 writes in its --workdir"
        remedy = "name a folder that all machines mount, such as NFS or a bucket"
        return [wrong("shared", seen, remedy)]
    if len(roll) == 1 or any(card.sees is None for card in roll):
        return []
    return [ok("shared", "all see the workdir of process 0")]


def _clocks(roll):
    if len(roll) == 1:
        return []
    off = [card for card in roll if abs(card.clock) - card.doubt > MOST_CLOCK_SECONDS]
    if off:
        told = ", ".join(
            f"that of {card.name} is {abs(card.clock):.0f} s "
            f"{'ahead of' if card.clock > 0 else 'behind'} process 0" for card in off
        )  # fmt: skip
        return [wrong("clocks", told, "set it by NTP there (chronyc makestep, or timedatectl "
                      "set-ntp true): rows, logs and checkpoints carry times")]  # fmt: skip
    widest = max(abs(card.clock) + card.doubt for card in roll)
    return [ok("clocks", f"within {max(widest, 0.001):.3f} s of process 0")]


def split(address: str) -> tuple[str, int]:
    """ "host:port" or "[::1]:port"."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def _say(file, value):
    file.write(json.dumps(value, allow_nan=False) + "\n")
    file.flush()
