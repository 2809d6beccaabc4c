"""Rounds of islands: leases, quorum, deadline, lateness, and that a log says everything."""

import json
from typing import Any

import pytest

from qlora_dist.coordinate import island_messages as say
from qlora_dist.coordinate.island_messages import Decision
from qlora_dist.coordinate.ranges import Piece, as_ranges, first, split
from qlora_dist.coordinate.rounds import Rounds, Terms


class Table:
    """A coordinator's state and its log, as JSON lines."""

    def __init__(self, **terms: Any):
        self.terms = Terms(**{"packs": 100, "islands": 2, "deadline_s": 60.0, **terms})
        self.rounds, self.log = Rounds(), []
        for island in "ab":
            self.take(say.join(self.rounds, self.terms, island, island, 0.0))

    def take(self, decision: Decision) -> dict[str, Any]:
        for event in decision.events:
            self.log.append(json.dumps(event))
            self.rounds.apply(json.loads(self.log[-1]))
        return decision.answer

    def lease(self, island: str, packs: int, now: float = 0.0, session: str | None = None) -> dict[str, Any]:
        return self.take(say.lease(self.rounds, self.terms, island, session or island, packs, now))

    def send(self, island: str, lease: dict[str, Any], now: float = 1.0, **kwargs: Any) -> dict[str, Any]:
        fields = {"session": island, "trained": lease["ranges"], "tokens": 10, **kwargs}
        return self.take(say.contribute(self.rounds, self.terms, island, lease=lease["lease"], now=now, **fields))

    def commit(self, now: float = 2.0, refused: dict[int, str] | None = None) -> dict[str, Any]:
        refused = refused or {}
        counted = [one.lease for one in self.rounds.collect() if one.lease not in refused]
        return self.take(say.commit(self.rounds, self.terms, self.rounds.round, counted, refused, "everyone", now))


def test_ranges_are_cut_and_put_together() -> None:
    assert as_ranges([(4, 6), (0, 2), (2, 4), (8, 9)]) == [(0, 6), (8, 9)]
    with pytest.raises(ValueError, match="overlaps"):
        as_ranges([(0, 3), (2, 4)])
    inside, outside = split([Piece(0, 10, 1), Piece(20, 30, 2)], [(3, 5), (8, 22)])
    assert inside == [(3, 5, 1), (8, 10, 1), (20, 22, 2)]
    assert outside == [(0, 3, 1), (5, 8, 1), (22, 30, 2)]
    assert first([Piece(0, 3), Piece(7, 20)], 5) == [(0, 3, 0), (7, 9, 0)]


def test_a_round_of_two_islands_of_different_size() -> None:
    table = Table()
    a, b = table.lease("a", 10), table.lease("b", 30)
    assert (a["ranges"], b["ranges"]) == ([[0, 10]], [[10, 40]])
    assert (a["round"], a["version"], a["seconds_left"]) == (0, 0, 60.0)
    table.send("a", a)
    assert table.rounds.due(table.terms, 2.0) is None
    assert "still open" in table.lease("a", 10)["wait"]
    table.send("b", b)
    assert table.rounds.due(table.terms, 2.0) == "everyone"
    assert [(one.island, one.tokens) for one in table.rounds.collect()] == [("a", 10), ("b", 10)]
    assert table.commit() == {"committed": True}
    assert (table.rounds.round, table.rounds.trained) == (1, [(0, 40)])
    assert table.lease("a", 10)["version"] == 1


def test_nothing_is_leased_before_the_islands_are_there() -> None:
    table = Table(islands=3, start_timeout_s=30.0)
    assert table.lease("a", 10, now=29.0)["wait"] == "2 of 3 islands have joined"
    assert table.lease("a", 10, now=30.0)["ranges"] == [[0, 10]]


def test_a_message_that_is_sent_again_changes_nothing() -> None:
    table = Table()
    first_time, again = table.lease("a", 10), table.lease("a", 10)
    assert first_time == again
    assert table.send("a", first_time) == table.send("a", first_time) == {"accepted": True, "reason": None, "round": 0}
    table.send("b", table.lease("b", 5))
    table.commit()
    events = len(table.log)
    assert table.send("a", first_time) == {"accepted": True, "reason": None, "round": 0}
    assert table.take(say.commit(table.rounds, table.terms, 0, [1], {}, "everyone", 3.0)) == {"committed": False}
    assert table.take(say.join(table.rounds, table.terms, "a", "a", 4.0)) == {"version": 1}
    assert len(table.log) == events


def test_the_quorum_closes_a_round_and_the_rest_is_late() -> None:
    table = Table(quorum=0.5, late_discount=0.25)
    a, b = table.lease("a", 10), table.lease("b", 10)
    table.send("a", a)
    assert table.rounds.due(table.terms, 1.0) == "quorum"
    table.commit()
    assert table.rounds.report(100)["islands"] == {"a": "idle", "b": "overdue"}
    assert table.lease("a", 10)["ranges"] == [[20, 30]], "the late island's packs are still its own"
    assert table.send("b", b) == {"accepted": True, "reason": None, "round": 1}
    (late,) = table.rounds.collect()
    assert say.discount(table.rounds, table.terms, late) == 0.25
    assert table.lease("b", 10)["version"] == 1, "who was late starts from the current adapter"


def test_a_quorum_is_a_share_of_whole_islands_whatever_floats_make_of_it() -> None:
    table = Table(quorum=0.28, islands=25, packs=1000)
    names = [f"island {number}" for number in range(23)]
    for name in names:
        table.take(say.join(table.rounds, table.terms, name, name, 0.0))
    for number, name in enumerate(["a", "b", *names][:7], 1):
        assert table.rounds.due(table.terms, 1.0) is None
        table.send(name, table.lease(name, 10))
        assert number == len(table.rounds.collect())
    assert table.rounds.due(table.terms, 1.0) == "quorum", "0.28 of 25 islands are 7"


def test_the_deadline_closes_a_round_with_what_there_is_and_never_with_nothing() -> None:
    table = Table()
    a, b = table.lease("a", 10, now=100.0), table.lease("b", 10, now=110.0)
    assert table.rounds.due(table.terms, 1000.0) is None
    table.send("a", a)
    assert table.rounds.due(table.terms, 159.0) is None
    assert table.rounds.due(table.terms, 160.0) == "deadline"
    table.commit(now=160.0)
    # b is not waited for a second time ...
    table.send("a", table.lease("a", 10, now=161.0), now=162.0)
    assert table.rounds.due(table.terms, 163.0) == "everyone"
    # ... until it works again.
    assert b["lease"] in table.rounds.leases
    table.lease("b", 10, now=164.0)
    assert table.rounds.due(table.terms, 165.0) is None


@pytest.mark.parametrize("late_rounds", [0, 1, 2])
def test_the_packs_of_a_lease_go_back_when_it_is_too_late(late_rounds: int) -> None:
    table = Table(late_rounds=late_rounds, quorum=0.5)
    b = table.lease("b", 10)
    for _ in range(late_rounds + 1):
        assert b["lease"] in table.rounds.leases
        table.send("a", table.lease("a", 10))
        table.commit()
    assert b["lease"] not in table.rounds.leases
    answer = table.send("b", b)
    assert (answer["accepted"], answer["round"]) == (False, None)
    assert "has ended" in answer["reason"]
    assert table.lease("a", 10)["ranges"] == [[0, 10]]


def test_an_accepted_contribution_that_missed_its_collection_counts_late_or_goes_back() -> None:
    for late_rounds in (0, 1):
        table = Table(late_rounds=late_rounds)
        a, b = table.lease("a", 10), table.lease("b", 10)
        table.send("a", a)
        collected = [one.lease for one in table.rounds.collect()]
        table.send("b", b)  # while the files of the round are being written
        table.take(say.commit(table.rounds, table.terms, 0, collected, {}, "deadline", 2.0))
        assert [one.lease for one in table.rounds.collect()] == ([b["lease"]] if late_rounds else [])
        assert table.rounds.free(100)[0] == ((20, 100, 0) if late_rounds else (10, 20, 1))


def test_a_new_process_of_an_island_shuts_out_the_old_one() -> None:
    table = Table()
    old = table.lease("a", 10)
    table.take(say.join(table.rounds, table.terms, "a", "new", 5.0))
    assert "another process" in table.send("a", old)["reason"]
    assert "another process" in table.lease("a", 10)["refused"]
    new = table.lease("a", 10, session="new")
    assert (new["ranges"], new["lease"]) == ([[0, 10]], 2), "its packs went back"


def test_who_leaves_is_not_waited_for_and_what_it_sent_counts() -> None:
    table = Table()
    table.send("a", table.lease("a", 10))
    table.lease("b", 10)
    table.take(say.leave(table.rounds, table.terms, "b", "b", "its node went away", 1.0))
    table.take(say.leave(table.rounds, table.terms, "a", "a", "its node went away", 1.0))
    assert table.rounds.due(table.terms, 1.0) == "everyone"
    table.commit()
    assert table.rounds.trained == [(0, 10)]
    assert table.rounds.pool == [(10, 20, 1)]
    assert "has left" in table.lease("b", 10)["refused"]


def test_a_part_of_a_lease_counts_and_the_rest_goes_back() -> None:
    table = Table(most_leases=1)
    lease = table.lease("a", 10)
    table.send("a", lease, trained=[[0, 4]])
    assert table.rounds.pool == [(4, 10, 0)], "what was not begun has not failed"
    with pytest.raises(ValueError, match="no part of lease"):
        table.send("b", table.lease("b", 5), trained=[[0, 5]])


def test_what_is_refused_goes_back_and_is_dropped_after_so_many_leases() -> None:
    table = Table(most_leases=2)
    answer = table.send("a", table.lease("a", 10), refused="island a sent numbers that are not finite")
    assert answer == {"accepted": False, "reason": "island a sent numbers that are not finite", "round": None}
    lease = table.lease("b", 10)
    assert lease["ranges"] == [[0, 10]]
    table.send("b", lease)
    table.send("a", table.lease("a", 10))
    table.commit(refused={lease["lease"]: "its change is 40 times the others'"})
    assert table.rounds.trained == [(10, 20)]
    assert table.rounds.dropped == [(0, 10)]
    assert table.rounds.report(100)["dropped"] == [[0, 10]]


def test_a_round_is_not_committed_empty_or_with_what_was_not_collected() -> None:
    table = Table()
    a = table.lease("a", 10)
    for counted in ([], [a["lease"]]):
        with pytest.raises(ValueError, match="cannot count"):
            say.commit(table.rounds, table.terms, 0, counted, {}, "everyone", 1.0)


def test_overlap_leases_the_next_round_ahead_and_counts_it_there() -> None:
    table = Table(overlap=True)
    a, b = table.lease("a", 10), table.lease("b", 10)
    table.send("a", a)
    ahead = table.lease("a", 10)
    assert (ahead["round"], ahead["version"], ahead["seconds_left"]) == (1, 0, None)
    assert table.send("a", ahead)["round"] == 1
    assert "still open" in table.lease("a", 10)["wait"], "one round ahead, no more"
    table.send("b", b)
    table.commit()
    assert table.rounds.trained == [(0, 20)]
    (next_one,) = table.rounds.collect()
    assert (next_one.island, say.discount(table.rounds, table.terms, next_one)) == ("a", 1.0)


def test_the_end_of_the_data_waits_for_nobody_who_has_nothing_to_train() -> None:
    table = Table(packs=25)
    table.send("a", table.lease("a", 20))
    table.send("b", table.lease("b", 20))
    table.commit()
    assert table.rounds.finished(25)
    assert table.lease("a", 10)["done"]
    table = Table(packs=20)
    a = table.lease("a", 20)
    assert "may come back" in table.lease("b", 10)["wait"]
    table.send("a", a)
    assert table.rounds.due(table.terms, 1.0) == "everyone"


def test_when_nothing_else_is_left_a_silent_islands_lease_ends_with_time() -> None:
    table = Table(packs=20, late_rounds=1)
    table.lease("a", 20, now=10.0)
    table.take(say.tick(table.rounds, table.terms, 129.0))
    assert table.lease("b", 20, now=129.0)["lease"] is None
    table.take(say.tick(table.rounds, table.terms, 130.0))
    assert table.lease("b", 20, now=130.0)["ranges"] == [[0, 20]]


def test_islands_are_not_late_because_the_coordinator_was_away() -> None:
    table = Table()
    a = table.lease("a", 10, now=0.0)
    table.lease("b", 10, now=0.0)
    table.send("a", a)
    table.take(say.resume(table.rounds, 1000.0))
    assert table.rounds.due(table.terms, 1059.0) is None
    assert table.rounds.due(table.terms, 1060.0) == "deadline"


def test_rounds_that_are_closed_report_what_was_never_trained() -> None:
    table = Table(packs=50)
    table.send("a", table.lease("a", 10))
    table.lease("b", 5)
    table.commit()
    table.send("a", table.lease("a", 10))  # accepted, never counted
    answer = table.take(say.close(table.rounds, table.terms, "stopped", 9.0))
    assert answer == {"dropped": [[10, 50]]}
    assert table.rounds.report(50)["packs_trained"] == 10
    assert table.lease("a", 1)["done"]
    assert table.rounds.due(table.terms, 1e6) is None


def test_the_log_says_everything() -> None:
    table = Table(quorum=0.5, overlap=True)
    a, b = table.lease("a", 10), table.lease("b", 10)
    table.send("a", a, facts_are="kept")
    table.lease("a", 7)
    table.commit()
    table.send("b", b, trained=[[10, 13]])
    again = Rounds()
    for line in [*table.log, json.dumps({"kind": "heartbeat", "ended": [1]})]:
        again.apply(json.loads(line))
    assert again == table.rounds
    assert again.last is not None
    assert again.last["counted"] == [
        {"lease": 1, "island": "a", "tokens": 10, "packs": 10, "late": 0, "scale": 1.0},
    ]


def test_terms_that_cannot_be_met_are_refused() -> None:
    for wrong in ({"quorum": 0.0}, {"packs": 0}, {"late_discount": 2.0}, {"deadline_s": 0.0}, {"late_rounds": -1}):
        with pytest.raises(ValueError, match=r"must be|shares"):
            Terms(**{"packs": 10, **wrong})
