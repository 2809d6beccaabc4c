"""The rounds of islands: who trains which packs, what is counted in which round. Pure: no files, no clock.

State follows from the events of the run's log alone (`Rounds.apply`); the messages in `island_messages.py` decide on
the next events. The rules:

- A lease is a set of ranges of the global order for one island and one round. Packs that were given back come first.
- Round k turns adapter k into adapter k + 1. An island contributes, for its lease, the change since adapter k (the
  adapter it started from) and what of the lease it has trained; the rest goes back to the pool.
- A round closes when every island that is awaited has contributed, when `quorum` of them have, or `deadline_s` after
  its first lease with what there is, but never with nothing.
- An island that missed a round is not awaited again until it asks for a lease.
- Late: a lease that missed its round stays with its island for `late_rounds` rounds more. A contribution for it goes
  into the open round, its change multiplied by `late_discount` for each round that it is late. After that its packs go
  back to the pool and a contribution for it is refused. So no pack is trained by two islands, whoever wakes up.
- What is refused goes back to the pool; a pack that came back from `most_leases` leases is dropped, and reported.
- A contribution counts when a `round_committed` event names it, and that is written after the round's files: a
  coordinator killed before it collects the same contributions again, one killed after it has counted them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from qlora_dist.coordinate.log import Event
from qlora_dist.coordinate.ranges import Piece, Range, as_pieces, as_ranges, count, split

# Events that carry decisions on rounds, beside those of `replay.DECISIONS`.
ROUND_DECISIONS = frozenset(
    {
        "island_joined",
        "island_left",
        "leased",
        "leases_ended",
        "contributed",
        "contribution_refused",
        "round_committed",
        "rounds_resumed",
        "rounds_closed",
    }
)


@dataclass(frozen=True)
class Terms:
    """What the configuration says of rounds. Events hold what followed from it, so it may change between starts.

    Attributes:
        packs: how many packs of the global order are to be trained in all.
        islands: how many are waited for before the first lease, `start_timeout_s` seconds from the first one's joining.
        quorum: share of the awaited islands whose contributions close a round, above 0 and at most 1.
        deadline_s: seconds from a round's first lease until it closes with what there is.
        late_rounds, late_discount: see the module; 0 rounds drop whatever is late.
        most_leases: a pack is dropped after so many leases that came to nothing.
        overlap: an island that has contributed may take a lease of the next round before this one closes.
    """

    packs: int
    islands: int = 1
    quorum: float = 1.0
    deadline_s: float = 600.0
    start_timeout_s: float = 300.0
    late_rounds: int = 1
    late_discount: float = 0.5
    most_leases: int = 5
    overlap: bool = False

    def __post_init__(self) -> None:
        if self.packs < 1 or self.islands < 1 or self.most_leases < 1 or self.late_rounds < 0:
            raise ValueError(f"packs, islands and most_leases must be at least 1, late_rounds at least 0: {self}")
        if not 0 < self.quorum <= 1 or not 0 <= self.late_discount <= 1 or self.deadline_s <= 0:
            raise ValueError(f"quorum and late_discount are shares, deadline_s is above 0: {self}")


@dataclass
class Island:
    """One island: the process that speaks for it, and whether rounds wait for it."""

    session: str
    present: bool = True
    missed: bool = False


@dataclass
class Lease:
    """Packs that an island trains, and for which round. Overdue once that round is committed."""

    id: int
    island: str
    round: int
    pieces: list[Piece]
    time: float


@dataclass
class Contribution:
    """What an island has sent for a lease, accepted and not counted yet.

    Attributes:
        round: whose adapter it started from.
        pieces: what of the lease it has trained.
        facts: JSON of the transport: the file's name, size and checksum.
    """

    lease: int
    island: str
    round: int
    tokens: int
    pieces: list[Piece]
    facts: dict[str, Any]


@dataclass
class Rounds:
    """The state after the events applied so far.

    Attributes:
        round: the open round; so many are committed, and it is the version of the current adapter.
        opened: when the open round's first lease was granted; None before.
        pool: packs that were given back, to be leased again before new ones.
        next: the first pack that was never leased.
        trained, dropped: packs that are counted in a committed round, and those that never will be.
        counted: lease -> the round that counted its contribution.
        refused: leases whose contributions were refused.
    """

    round: int = 0
    opened: float | None = None
    first_joined: float | None = None
    islands: dict[str, Island] = field(default_factory=dict)
    leases: dict[int, Lease] = field(default_factory=dict)
    contributions: dict[int, Contribution] = field(default_factory=dict)
    counted: dict[int, int] = field(default_factory=dict)
    refused: set[int] = field(default_factory=set)
    pool: list[Piece] = field(default_factory=list)
    next: int = 0
    next_lease: int = 1
    trained: list[Range] = field(default_factory=list)
    dropped: list[Range] = field(default_factory=list)
    last: Event | None = None
    closed: bool = False

    def apply(self, event: Event) -> None:
        """Take in one event; kinds that are not of rounds are passed over."""
        if event["kind"] not in ROUND_DECISIONS:
            return
        for lease in event.get("ended", ()):
            self.leases.pop(lease, None)
            self.contributions.pop(lease, None)
        self.pool = as_pieces([*self.pool, *event.get("returned", ())])
        self.dropped = as_ranges([*self.dropped, *event.get("dropped", ())])
        match event["kind"]:
            case "island_joined":
                self.islands[event["island"]] = Island(event["session"])
                self.first_joined = event["time"] if self.first_joined is None else self.first_joined
            case "island_left":
                self.islands[event["island"]].present = False
            case "leased":
                self._apply_lease(event)
            case "contributed":
                lease = self.leases.pop(event["lease"])
                trained, _ = split(lease.pieces, event["trained"])
                self.contributions[lease.id] = Contribution(
                    lease.id, lease.island, lease.round, event["tokens"], trained, event["facts"]
                )
                self.islands[lease.island].missed = False
            case "contribution_refused":
                self.refused.add(event["lease"])
            case "round_committed":
                self._apply_commit(event)
            case "rounds_resumed":
                # Nobody could be heard while the coordinator was away.
                self.opened = None if self.opened is None else event["time"]
                for lease in self.leases.values():
                    lease.time = event["time"]
            case "rounds_closed":
                self.pool, self.closed = [], True

    def _apply_lease(self, event: Event) -> None:
        pieces = as_pieces(event["pieces"])
        _, self.pool = split(self.pool, pieces)
        self.next = max(self.next, pieces[-1].end)
        self.leases[event["lease"]] = Lease(event["lease"], event["island"], event["round"], pieces, event["time"])
        self.next_lease = event["lease"] + 1
        self.islands[event["island"]].missed = False
        if event["round"] == self.round and self.opened is None:
            self.opened = event["time"]

    def _apply_commit(self, event: Event) -> None:
        for entry in event["counted"]:
            contribution = self.contributions.pop(entry["lease"])
            self.counted[contribution.lease] = event["round"]
            self.trained = as_ranges([*self.trained, *contribution.pieces])
        self.refused.update(entry["lease"] for entry in event["refused"])
        for island in event["missed"]:
            self.islands[island].missed = True
        self.round = event["round"] + 1
        self.opened = event["time"] if any(lease.round == self.round for lease in self.leases.values()) else None
        self.last = event

    # What follows from it

    def free(self, packs: int, returned: Sequence[Piece] = ()) -> list[Piece]:
        """What can be leased of the first `packs` packs, in the order in which it is, if `returned` came back."""
        return [*sorted([*self.pool, *returned]), *([Piece(self.next, packs)] if self.next < packs else [])]

    def finished(self, packs: int) -> bool:
        """Whether every pack is trained or dropped, so that there is nothing to wait for."""
        return self.closed or count(self.trained) + count(self.dropped) >= packs

    def lease_of(self, island: str) -> Lease | None:
        """The one lease that an island holds."""
        return next((lease for lease in self.leases.values() if lease.island == island), None)

    def late(self, contribution: Contribution) -> int:
        """How many rounds late a contribution is, were it counted in the open round."""
        return max(0, self.round - contribution.round)

    def collect(self) -> list[Contribution]:
        """What the open round would count, in the order of the leases: what is for it, or late."""
        return [c for _, c in sorted(self.contributions.items()) if c.round <= self.round]

    def awaited(self, packs: int) -> list[str]:
        """The islands whose contribution to the open round may still come, in order."""
        here = {c.island for c in self.contributions.values() if c.round >= self.round}
        holds = {lease.island for lease in self.leases.values() if lease.round == self.round}
        to_lease = bool(self.free(packs))
        return sorted(
            name
            for name, island in self.islands.items()
            if island.present and not island.missed and name not in here and (to_lease or name in holds)
        )

    def due(self, terms: Terms, now: float) -> str | None:
        """Why the open round closes now: `everyone`, `quorum` or `deadline`; None while it stays open."""
        collected = self.collect()
        if not collected or self.closed:
            return None
        awaited = self.awaited(terms.packs)
        if not awaited:
            return "everyone"
        in_time = {c.island for c in collected if c.round == self.round}
        # 0.28 of 25 islands is 7 of them, whatever binary fractions make of it.
        if in_time and len(in_time) >= math.ceil(terms.quorum * len(in_time | set(awaited)) - 1e-9):
            return "quorum"
        if self.opened is not None and now >= self.opened + terms.deadline_s:
            return "deadline"
        return None

    def report(self, packs: int) -> dict[str, Any]:
        """Where the rounds stand, as JSON; every pack is in exactly one of the five numbers."""
        held = count(piece for lease in self.leases.values() for piece in lease.pieces)
        pending = count(piece for c in self.contributions.values() for piece in c.pieces)
        return {
            "round": self.round,
            "islands": {name: self._doing(name) for name in sorted(self.islands)},
            "packs_trained": count(self.trained),
            "packs_contributed": pending,
            "packs_leased": held,
            "packs_free": count(self.free(packs)),
            "packs_dropped": count(self.dropped),
            "dropped": [list(dropped) for dropped in self.dropped],
        }

    def _doing(self, name: str) -> str:
        island, lease = self.islands[name], self.lease_of(name)
        if not island.present:
            return "left"
        if lease is not None:
            return "overdue" if lease.round < self.round else "training"
        return "contributed" if any(c.island == name for c in self.contributions.values()) else "idle"
