"""Who is named as a straggler, from counts alone; and that the coordinator tells of it."""

import io
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from qlora_dist.cli import show_status
from qlora_dist.coordinate.log import EventLog
from qlora_dist.coordinate.report import read_status
from qlora_dist.coordinate.rundir import EVENTS_FILE, open_run
from qlora_dist.coordinate.state import Coordinator
from qlora_dist.coordinate.stragglers import Stragglers
from qlora_dist.track.terminal_log import show_log

STEP_S, POSITIONS = 0.5, 4096


def members(count: int) -> list[dict[str, Any]]:
    return [{"rank": rank, "host": f"n{rank // 8}", "pid": 100 + rank} for rank in range(count)]


def play(
    count: int, busy_s: Callable[[int, float], float], until_s: float, every_s: float = 1.0,
    positions: Callable[[int], int] = lambda rank: POSITIONS, step_s: float = STEP_S,
) -> list[tuple[float, dict[str, Any]]]:  # fmt: skip
    """What is told of `count` ranks, and when, whose step at time t takes `busy_s(rank, t)` outside collectives."""
    watch, told, now = Stragglers(members(count)), [], 0.0
    counts = dict.fromkeys(range(count), (0.0, 0, 0))
    while now < until_s:
        now += every_s
        steps = int(now / step_s) - int((now - every_s) / step_s)
        for rank in range(count):
            seconds, done, computed = counts[rank]
            counts[rank] = seconds + steps * busy_s(rank, now), done + steps, computed + steps * positions(rank)
            told += [(now, change) for change in watch.take(rank, now, counts[rank])]
    return told


@pytest.mark.parametrize("count", [2, 3, 8])
def test_a_slow_rank_is_named_within_seconds(count: int) -> None:
    told = play(count, lambda rank, t: 0.6 if rank == 1 else 0.3, 60)
    ((when, change),) = told
    assert (change["rank"], change["host"], change["over"]) == (1, "n0", False)
    assert when < 12
    assert "rank 1 (host n0, pid 101) keeps the others waiting: it takes 0.6 s a step" in change["message"]
    assert "2.0 times" in change["message"]
    assert ("the other rank's" if count == 2 else "the usual rank's") in change["message"]


def test_half_of_the_ranks_are_named_where_their_host_is_slow() -> None:
    told = play(16, lambda rank, t: 0.4 if rank >= 8 else 0.3, 60)
    assert sorted(change["rank"] for _, change in told) == list(range(8, 16))
    assert {change["host"] for _, change in told} == {"n1"}


def test_ranks_that_are_alike_are_not_named() -> None:
    assert not play(4, lambda rank, t: 0.3 * (1 + 0.05 * rank), 120)


def test_one_slow_round_is_not_enough() -> None:
    assert not play(4, lambda rank, t: 0.9 if rank == 2 and t % 6 < 3 else 0.3, 120)


def test_a_rank_with_more_to_compute_is_no_straggler() -> None:
    """Sequences twice as long, or micro-batches of no weight on the others: it is slow for a step, not for a token."""
    assert not play(2, lambda rank, t: 0.6 if rank else 0.3, 120, positions=lambda rank: POSITIONS * (1 + rank))
    assert not play(2, lambda rank, t: 0.3 if rank else 0.05, 120, positions=lambda rank: POSITIONS if rank else 2)


def test_milliseconds_are_nobodys_fault() -> None:
    assert not play(2, lambda rank, t: 0.004 if rank == 0 else 0.001, 60, step_s=0.005)


def test_long_steps_are_told_of_once_each() -> None:
    """A step of 15 s: a round takes as long, so that three of them are done within a minute."""
    told = play(4, lambda rank, t: 10.0 if rank == 3 else 5.0, 75, step_s=15.0)
    assert [change["rank"] for _, change in told] == [3]
    assert told[0][0] <= 60


def test_begin_and_end_are_told_once() -> None:
    told = play(4, lambda rank, t: 0.6 if rank == 2 and 20 < t < 60 else 0.3, 120)
    assert [change["over"] for _, change in told] == [False, True]
    assert 20 < told[0][0] < 35
    assert 60 < told[1][0] < 75
    assert "no longer keeps the others waiting" in told[1][1]["message"]


def test_a_rank_between_slow_and_well_stays_named() -> None:
    told = play(4, lambda rank, t: (0.6 if t < 30 else 0.345) if rank == 2 else 0.3, 120)
    assert [change["over"] for _, change in told] == [False]


def test_no_verdict_while_a_rank_is_silent() -> None:
    watch = Stragglers(members(2))
    for second in range(60):
        assert not watch.take(0, float(second), (second * 1.0, second, second * POSITIONS))
        if second < 2:
            watch.take(1, float(second), (second * 0.1, second, second * POSITIONS))
    assert not watch.named


@pytest.fixture
def run(tmp_path: Path) -> tuple[Path, Coordinator]:
    open_run(tmp_path, "a: 1\n")
    c = Coordinator(tmp_path, status_every_s=0.0)
    c.start_job()
    for rank in (0, 1):
        c.join("a", rank, 2, f"n{rank + 1}", 100 + rank)
    return tmp_path, c


def test_the_coordinator_tells_of_it(run: tuple[Path, Coordinator], monkeypatch: pytest.MonkeyPatch) -> None:
    """In the event log and the status, for who reads the run folder; `qlora-dist logs` shows the sentence."""
    folder, c = run
    now = [time.monotonic() + 1.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    for beat in range(40):
        now[0] += 1.0
        slow = beat < 20
        for rank in (0, 1):
            seconds = [0.1 * beat, 0.3 * beat if slow else 0.3 * 20 + 0.1 * (beat - 20)][rank]
            c.heartbeat(1, rank, beat, "compute", busy=[seconds, beat, beat * POSITIONS])
        if beat == 15:
            status = read_status(folder)
            (told,) = status["stragglers"]
            assert told["sentence"].startswith("rank 1 (host n2, pid 101) keeps the others waiting")
            assert [rank["busy_s"] for rank in status["ranks"]] == pytest.approx([0.1, 0.3])
            assert "busy" not in status["ranks"][0]
            shown = Console(file=io.StringIO(), width=80)
            show_status(status, shown)
            assert f"\n{told['sentence']}\n" in shown.file.getvalue()  # type: ignore[attr-defined]
    assert c.status()["stragglers"] == []
    events = [event for event in EventLog(folder / EVENTS_FILE).read_new() if event["kind"] == "straggler"]
    assert [(event["rank"], event["host"], event["over"]) for event in events] == [(1, "n2", False), (1, "n2", True)]
    console = Console(file=io.StringIO(), width=200)
    show_log(folder, console)
    lines = [line for line in console.file.getvalue().splitlines() if " slow " in line]  # type: ignore[attr-defined]
    assert ["no longer" in line for line in lines] == [False, True]
    assert all("generation" not in line for line in lines)


def test_a_run_that_is_over_has_no_stragglers(run: tuple[Path, Coordinator], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, c = run
    now = [time.monotonic() + 1.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    for beat in range(20):
        now[0] += 1.0
        for rank in (0, 1):
            c.heartbeat(1, rank, beat, "compute", busy=[(rank + 1) * 0.1 * beat, beat, beat * POSITIONS])
    assert len(read_status(folder)["stragglers"]) == 1
    c.finish(1, 20, {})
    assert read_status(folder)["stragglers"] == []


def test_times_rise(run: tuple[Path, Coordinator]) -> None:
    """A generation begins with a clean slate: a restarted rank is judged anew."""
    _, c = run
    c.heartbeat(1, 0, 1, "compute", busy=[1.0, 1, 10])
    for rank in (0, 1):
        c.join("b", rank, 2, f"n{rank + 1}", 200 + rank)
    assert c.status()["generation"] == 2
    assert [rank["busy_s"] for rank in c.status()["ranks"]] == [None, None]
    assert all(first["rank"] < second["rank"] for first, second in pairwise(c.status()["ranks"]))
