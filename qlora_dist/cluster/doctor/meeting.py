"""How the ranks of an examination find each other, with a time limit on everything: who is missing is a finding."""

import json
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from torch.distributed import Store, TCPStore

POLL_S = 0.05
CLOCK_ROUNDS = 5


class Meeting:
    """Ranks that talk through a store.

    Args:
        store: seen by all of them.
        rank: this one.
        members: those that take part, in order.
        limit_s: seconds that one waits for another.
    """

    def __init__(self, store: Store, rank: int, members: Sequence[int], limit_s: float):
        self.store, self.rank, self.members, self.limit_s = store, rank, list(members), limit_s

    @property
    def leads(self) -> bool:
        """Whether this is the first of the members."""
        return self.rank == self.members[0]

    def tell(self, name: str, value: Any) -> None:
        """Let the others know something under a name used once."""
        self.store.set(name, json.dumps(value))

    def hear(self, name: str) -> Any:
        """What somebody told; waits for it.

        Raises:
            TimeoutError: nobody told it within `limit_s` seconds.
        """
        if not self.wait([name]):
            raise TimeoutError(f"nobody told {name} within {self.limit_s:.0f} s")
        return json.loads(self.store.get(name))

    def wait(self, names: Sequence[str]) -> bool:
        """Whether all of these are told within `limit_s` seconds."""
        deadline = time.monotonic() + self.limit_s
        # Store.wait throws away what has come and logs a traceback of its own where the time is up.
        while not self.store.check(list(names)):
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_S)
        return True

    def gather(self, name: str, value: Any) -> dict[int, Any]:
        """What each member tells under a name, by rank; without those that do not within `limit_s` seconds."""
        self.tell(f"{name}/{self.rank}", value)
        self.wait([f"{name}/{rank}" for rank in self.members])
        there = [rank for rank in self.members if self.store.check([f"{name}/{rank}"])]
        return {rank: json.loads(self.store.get(f"{name}/{rank}")) for rank in there}

    def of(self, members: Sequence[int]) -> "Meeting":
        """The same among fewer."""
        return Meeting(self.store, self.rank, members, self.limit_s)


def connect(host: str, port: int, rank: int, limit_s: float, serve: bool) -> Store:
    """A store that every rank reaches.

    Args:
        serve: be its server.

    Raises:
        RuntimeError: nobody answers there within `limit_s` seconds, or the port is taken.
    """
    return TCPStore(host, port, is_master=serve, timeout=timedelta(seconds=limit_s), wait_for_workers=False)


def meet(store: Store, rank: int, world_size: int, limit_s: float) -> Meeting:
    """Those of `world_size` ranks that come within `limit_s` seconds; rank 0 decides who that is.

    Raises:
        TimeoutError: rank 0 does not say so, or says that this rank came too late.
    """
    everyone = Meeting(store, rank, range(world_size), limit_s)
    # Rank 0 waits for the others first.
    patient = Meeting(store, rank, range(world_size), 2 * limit_s)
    if rank == 0:
        everyone.tell("members", sorted(everyone.gather("here", True)))
    else:
        everyone.tell(f"here/{rank}", True)
    members = patient.hear("members")
    if rank not in members:
        raise TimeoutError("the others had begun when this rank came")
    return Meeting(store, rank, members, limit_s)


def clocks(meeting: Meeting) -> dict[str, dict[str, float]]:
    """On the first member: how far each other member's clock is ahead, in seconds, and how exact that is.

    Cristian's algorithm: a clock read between a question and its answer is compared with the middle of the two, and of
    several rounds the fastest counts.
    """
    store, found = meeting.store, {}
    if not meeting.leads:
        for round_ in range(CLOCK_ROUNDS):
            # A wait and no polling: the server answers at once. The leader asks one rank after the other.
            store.wait([f"ping/{meeting.rank}/{round_}"], timedelta(seconds=meeting.limit_s))
            store.set(f"pong/{meeting.rank}/{round_}", repr(time.time()))
        return {}
    for rank in meeting.members[1:]:
        best = {"ahead_s": 0.0, "within_s": float("inf")}
        for round_ in range(CLOCK_ROUNDS):
            asked, begun = time.time(), time.perf_counter()
            store.set(f"ping/{rank}/{round_}", "")
            store.wait([f"pong/{rank}/{round_}"], timedelta(seconds=meeting.limit_s))
            half_s = (time.perf_counter() - begun) / 2
            if half_s < best["within_s"]:
                there = float(store.get(f"pong/{rank}/{round_}"))
                best = {"ahead_s": there - (asked + half_s), "within_s": half_s}
        found[str(rank)] = best
    return found
