"""What the coordinator decides when an island speaks or time passes. Pure: each function returns events to append.

The caller holds the log's lock, passes the state after all events and the time in seconds, appends the events in
their order (each is then applied), and only then gives the answer. The rules stand in `rounds.py`. Every message may be
sent again: an answer that was lost changes nothing.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from qlora_dist.coordinate.log import Event
from qlora_dist.coordinate.ranges import Piece, as_ranges, count, first, split
from qlora_dist.coordinate.rounds import Contribution, Lease, Rounds, Terms


class Decision(NamedTuple):
    """Events to append, in order, and the answer to whoever asked."""

    events: list[Event]
    answer: dict[str, Any]


def join(rounds: Rounds, terms: Terms, island: str, session: str, now: float, **facts: Any) -> Decision:
    """An island is there, or is there again: a new process takes the place of the one before, whose lease ends.

    Args:
        session: a random string that one process of the island uses, and no other ever did.
        facts: JSON for the log: host, GPUs, workers.

    Returns:
        {"version": the current adapter, from which it starts}.
    """
    known = rounds.islands.get(island)
    if known is not None and known.present and known.session == session:
        return Decision([], {"version": rounds.round})
    ended = _end(rounds, terms, _leases_of(rounds, island))
    event = {"kind": "island_joined", "time": now, "island": island, "session": session, **ended, "facts": facts}
    return Decision([event], {"version": rounds.round})


def leave(rounds: Rounds, terms: Terms, island: str, session: str, reason: str, now: float) -> Decision:
    """An island ends, or the coordinator knows that it has died; its lease ends, what it contributed counts."""
    if _stranger(rounds, island, session) is not None:
        return Decision([], {})
    ended = _end(rounds, terms, _leases_of(rounds, island))
    return Decision([{"kind": "island_left", "time": now, "island": island, "reason": reason, **ended}], {})


def lease(
    rounds: Rounds, terms: Terms, island: str, session: str, packs: int, now: float, sending: int | None = None
) -> Decision:
    """An island asks for `packs` packs for the open round (or the next, see `Terms.overlap`).

    An overdue lease that it still holds ends with this: it has given up on it.

    Args:
        sending: under `Terms.overlap` a lease that the island has trained and whose contribution is on its way: it goes
            on meanwhile, with packs for the round after that one. There is one such lease at most.

    Returns:
        {"lease": id | None, "round": the round it is for, "version": the current adapter, "ranges": [[start, end)],
        "seconds_left": until the round closes without this island (None: it is not open yet), "done": True when there
        is nothing left to train, "wait": why there is no lease at the moment | None, "refused": sentence | None}. There
        may be fewer packs than asked for.
    """
    if packs < 1:
        raise ValueError(f"a lease has at least one pack, not {packs}")
    if (refused := _stranger(rounds, island, session)) is not None:
        return Decision([], _granted(rounds, None, refused=refused))
    if rounds.finished(terms.packs):
        return Decision([], _granted(rounds, None, done=True))
    mine = {c.round for c in rounds.contributions.values() if c.island == island}
    holds = _leases_of(rounds, island)
    if terms.overlap and sending is not None:
        mine |= {one.round for one in holds if one.id == sending}
        holds = [one for one in holds if one.id != sending]
    held = holds[0] if holds else None
    if held is not None and held.round >= rounds.round:
        return Decision([], _granted(rounds, held, left_s=_left_s(rounds, terms, held, now)))
    if (wait := _not_started(rounds, terms, now)) is not None:
        return Decision([], _granted(rounds, None, wait=wait))
    ahead = int(rounds.round in mine)
    if ahead and (not terms.overlap or rounds.round + 1 in mine):
        return Decision([], _granted(rounds, None, wait=f"round {rounds.round + 1} is still open"))
    ended = _end(rounds, terms, [held] if held is not None else [])
    returned = [Piece(*piece) for piece in ended["returned"]]
    pieces = first(rounds.free(terms.packs, returned), packs)
    if not pieces:
        return Decision([], _granted(rounds, None, wait="all packs are leased; some may come back"))
    new = Lease(rounds.next_lease, island, rounds.round + ahead, [p._replace(leases=p.leases + 1) for p in pieces], now)
    event = {"kind": "leased", "time": now, "lease": new.id, "island": island, "round": new.round}
    return Decision(
        [{**event, "pieces": _json(new.pieces), **ended}],
        _granted(rounds, new, left_s=_left_s(rounds, terms, new, now)),
    )


def contribute(
    rounds: Rounds,
    terms: Terms,
    island: str,
    session: str,
    lease: int,
    trained: Sequence[Sequence[int]],
    tokens: int,
    now: float,
    refused: str | None = None,
    **facts: Any,
) -> Decision:
    """An island has trained a part of its lease; the file of its change is on the disk already.

    Args:
        trained: the ranges of the lease that the change stands for; the rest goes back to the pool.
        tokens: loss-bearing tokens that it was trained on: its weight.
        refused: why what was sent cannot be used (`aggregate.safety.refuse`); its packs go back to the pool.
        facts: JSON to find the file again: its name, size, checksum.

    Returns:
        {"accepted": bool, "reason": sentence | None, "round": the round that counts it, or counted it | None}.

    Raises:
        ValueError: `trained` is empty or not a part of the lease, or `tokens` is below 1.
    """
    if lease in rounds.counted:
        return Decision([], {"accepted": True, "reason": None, "round": rounds.counted[lease]})
    if lease in rounds.contributions:
        counts = max(rounds.round, rounds.contributions[lease].round)
        return Decision([], {"accepted": True, "reason": None, "round": counts})
    held = rounds.leases.get(lease)
    reason = _stranger(rounds, island, session)
    if reason is None and (held is None or held.island != island):
        reason = f"lease {lease} of island {island} has ended, and its packs went back"
    if reason is not None or held is None:
        fresh = lease not in rounds.refused
        event = {"kind": "contribution_refused", "time": now, "island": island, "lease": lease, "reason": reason}
        return Decision([event] if fresh else [], {"accepted": False, "reason": reason, "round": None})
    if refused is not None:
        event = {"kind": "contribution_refused", "time": now, "island": island, "lease": lease, "reason": refused}
        answer = {"accepted": False, "reason": refused, "round": None}
        return Decision([{**event, **_end(rounds, terms, [held])}], answer)
    wanted = as_ranges(trained)
    inside, outside = split(held.pieces, wanted)
    if not wanted or count(inside) != count(wanted) or tokens < 1:
        raise ValueError(f"{wanted} with {tokens} tokens is no part of lease {lease}: {as_ranges(held.pieces)}")
    # What was not begun has not failed either.
    back = {"returned": _json(piece._replace(leases=piece.leases - 1) for piece in outside), "dropped": []}
    event = {"kind": "contributed", "time": now, "island": island, "lease": lease, "round": held.round}
    event |= {"trained": [list(part) for part in wanted], "tokens": tokens, **back, "facts": facts}
    counts = max(rounds.round, held.round)
    return Decision([event], {"accepted": True, "reason": None, "round": counts})


def reject(rounds: Rounds, terms: Terms, lease: int, reason: str, now: float) -> Decision:
    """A contribution that was accepted turns out to be of no use; its packs go back to the pool."""
    found = rounds.contributions.get(lease)
    if found is None:
        return Decision([], {})
    event = {"kind": "contribution_refused", "time": now, "island": found.island, "lease": lease, "reason": reason}
    return Decision([{**event, **_end(rounds, terms, [found])}], {})


def commit(
    rounds: Rounds,
    terms: Terms,
    round: int,
    counted: Iterable[int],
    refused: Mapping[int, str],
    why: str,
    now: float,
    **facts: Any,
) -> Decision:
    """Close a round whose files (the new adapter, the outer state) are on the disk.

    Args:
        counted: the leases whose contributions are in it: those of `Rounds.collect` that were not refused.
        refused: lease -> why its contribution was left out; its packs go back to the pool.
        why: what `Rounds.due` said.
        facts: JSON to find the files again.

    Returns:
        {"committed": False where another coordinator has committed it already, or has closed the rounds}.

    Raises:
        ValueError: nothing is counted, or something that was not collected.
    """
    counted = sorted(counted)
    if round != rounds.round or rounds.closed:
        return Decision([], {"committed": False})
    collected = {contribution.lease: contribution for contribution in rounds.collect()}
    if not counted or not {*counted, *refused} <= collected.keys() or {*counted} & refused.keys():
        raise ValueError(f"round {round} cannot count {counted} and refuse {sorted(refused)} of {sorted(collected)}")
    following = round + 1
    lapsed = {
        contribution.lease: f"it is {following - contribution.round} rounds late, at most {terms.late_rounds} are taken"
        for contribution in collected.values()
        if contribution.lease not in counted and following - contribution.round > terms.late_rounds
    }
    over = [held for held in rounds.leases.values() if following - held.round > terms.late_rounds]
    left_out = {**lapsed, **refused}
    given_back: list[Lease | Contribution] = [*over, *(collected[lease] for lease in left_out)]
    event = {
        "kind": "round_committed",
        "time": now,
        "round": round,
        "why": why,
        "counted": [_counted(rounds, terms, collected[lease]) for lease in counted],
        "refused": [
            {"lease": lease, "island": collected[lease].island, "reason": left_out[lease]} for lease in sorted(left_out)
        ],
        "missed": rounds.awaited(terms.packs),
        **_end(rounds, terms, given_back),
        "facts": facts,
    }
    return Decision([event], {"committed": True})


def discount(rounds: Rounds, terms: Terms, contribution: Contribution) -> float:
    """What the change of a contribution is multiplied by in the open round: 1 where it is in time."""
    return float(terms.late_discount ** rounds.late(contribution))


def tick(rounds: Rounds, terms: Terms, now: float) -> Decision:
    """Time passes: where nothing else is left to lease, leases that came to nothing end, so that others can go on.

    A lease ends (late_rounds + 1) * deadline_s seconds after it was granted. Where there are other packs to train
    nobody needs these back, and the rounds that pass end it.
    """
    if rounds.free(terms.packs) or rounds.closed:
        return Decision([], {})
    limit_s = (terms.late_rounds + 1) * terms.deadline_s
    over = [held for held in rounds.leases.values() if now >= held.time + limit_s]
    return Decision([{"kind": "leases_ended", "time": now, **_end(rounds, terms, over)}] if over else [], {})


def resume(rounds: Rounds, now: float) -> Decision:
    """A coordinator starts over a log: times that islands had are counted from now."""
    begun = rounds.opened is not None or bool(rounds.leases)
    return Decision([{"kind": "rounds_resumed", "time": now}] if begun else [], {})


def close(rounds: Rounds, terms: Terms, reason: str, now: float) -> Decision:
    """End the rounds for good: what is not in a committed round is dropped, and reported.

    Returns:
        {"dropped": [[start, end)] of the whole run}.
    """
    if rounds.closed:
        return Decision([], {"dropped": [list(part) for part in rounds.dropped]})
    open_: list[Lease | Contribution] = [*rounds.leases.values(), *rounds.contributions.values()]
    left = as_ranges([*rounds.free(terms.packs), *(piece for one in open_ for piece in one.pieces)])
    event = {"kind": "rounds_closed", "time": now, "reason": reason, "dropped": [list(part) for part in left]}
    event["ended"] = sorted([*rounds.leases, *rounds.contributions])
    dropped = as_ranges([*rounds.dropped, *left])
    return Decision([event], {"dropped": [list(part) for part in dropped]})


def _stranger(rounds: Rounds, island: str, session: str) -> str | None:
    known = rounds.islands.get(island)
    if known is None or not known.present:
        return f"island {island} has not joined, or has left"
    return None if known.session == session else f"another process speaks for island {island} now"


def _not_started(rounds: Rounds, terms: Terms, now: float) -> str | None:
    present = sum(island.present for island in rounds.islands.values())
    waited_s = now - (rounds.first_joined if rounds.first_joined is not None else now)
    if rounds.next or present >= terms.islands or waited_s >= terms.start_timeout_s:
        return None
    return f"{present} of {terms.islands} islands have joined"


def _leases_of(rounds: Rounds, island: str) -> list[Lease]:
    return [held for held in rounds.leases.values() if held.island == island]


def _end(rounds: Rounds, terms: Terms, ones: Sequence[Lease | Contribution]) -> dict[str, Any]:
    """The fields of an event that ends leases or takes contributions out: whose, and where their packs go."""
    pieces = sorted(piece for one in ones for piece in one.pieces)
    dropped = [piece for piece in pieces if piece.leases >= terms.most_leases]
    return {
        "ended": sorted(one.id if isinstance(one, Lease) else one.lease for one in ones),
        "returned": _json(piece for piece in pieces if piece.leases < terms.most_leases),
        "dropped": [list(part) for part in as_ranges(dropped)],
    }


def _json(pieces: Iterable[Piece]) -> list[list[int]]:
    return [list(piece) for piece in pieces]


def _counted(rounds: Rounds, terms: Terms, contribution: Contribution) -> dict[str, Any]:
    return {
        "lease": contribution.lease,
        "island": contribution.island,
        "tokens": contribution.tokens,
        "packs": count(contribution.pieces),
        "late": rounds.late(contribution),
        "scale": discount(rounds, terms, contribution),
    }


def _left_s(rounds: Rounds, terms: Terms, lease: Lease, now: float) -> float | None:
    if lease.round != rounds.round:
        return None
    return max(0.0, terms.deadline_s - (now - (now if rounds.opened is None else rounds.opened)))


def _granted(
    rounds: Rounds,
    lease: Lease | None,
    left_s: float | None = None,
    wait: str | None = None,
    done: bool = False,
    refused: str | None = None,
) -> dict[str, Any]:
    return {
        "lease": None if lease is None else lease.id,
        "round": None if lease is None else lease.round,
        "version": rounds.round,
        "ranges": [] if lease is None else [list(part) for part in as_ranges(lease.pieces)],
        "seconds_left": left_s,
        "done": done,
        "wait": wait,
        "refused": refused,
    }
