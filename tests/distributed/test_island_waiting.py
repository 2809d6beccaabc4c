"""An island waits for a coordinator that is away: its other ranks live, and it heeds a stop and a hold meanwhile."""

import time
from concurrent.futures import Future
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from qlora_dist.train import island_waiting
from qlora_dist.train.island_waiting import IslandWaiting, all_wait, aside
from tests.distributed.gloo import in_group

TIMEOUT_S, AWAY_S = 1.5, 2.2


def ranks_wait(rank: int) -> str:
    group = dist.new_group(timeout=timedelta(seconds=TIMEOUT_S))
    island_waiting.MEET_S = 0.1

    def agree(value: Any) -> Any:
        box = [value]
        dist.broadcast_object_list(box, src=0, group=group, device=torch.device("cpu"))
        return box[0]

    def away() -> str:
        time.sleep(AWAY_S)
        return "there again"

    return all_wait(aside(away) if rank == 0 else None, agree)


@pytest.mark.timeout(60)
def test_no_rank_waits_in_a_collective_for_as_long_as_the_coordinator_is_away() -> None:
    assert in_group(2, ranks_wait, timeout_s=40) == ["there again"] * 2


def waiting(monkeypatch: pytest.MonkeyPatch, **asked: bool) -> Any:
    monkeypatch.setattr(island_waiting, "MEET_S", 0.01)
    loop: Any = object.__new__(IslandWaiting)
    loop.agree, loop.progress, loop.asked_to_stop = lambda value: value, SimpleNamespace(step=3), False
    loop.heartbeat = SimpleNamespace(
        **{"stop_asked": False, "hold_asked": False} | asked, at=lambda step, phase: None
    )  # fmt: skip
    loop.exchange = loop.stop_time = loop.hold_time = None
    loop.saved = []
    loop.save = lambda: loop.saved.append(time.monotonic())
    return loop


def test_a_stop_is_heeded_while_the_coordinator_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    loop, never = waiting(monkeypatch, stop_asked=True), Future[int]()
    began = time.monotonic()
    assert loop.wait_for(never, after_stop_s=0.2) is None
    assert loop.asked_to_stop
    assert [at - began < 0.2 for at in loop.saved] == [True], "at once, and once"
    assert 0.2 <= time.monotonic() - began < 5
    assert loop.wait_for(never) is None, "what is asked later is not waited for"
    never.set_result(5)
    assert loop.wait_for(never) == 5, "what is there is taken"


def test_a_hold_is_heeded_once_what_was_trained_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    loop, answer, held = waiting(monkeypatch, hold_asked=True), Future[int](), []
    loop.exchange = SimpleNamespace(sent=Future())

    def hold() -> None:
        held.append(loop.exchange.sent.done())
        loop.heartbeat.hold_asked = False
        answer.set_result(7)

    loop.save_and_hold = hold
    aside(lambda: (time.sleep(0.1), loop.exchange.sent.set_result(True)))
    assert loop.wait_for(answer) == 7
    assert held == [True]
    loop, answer, held = waiting(monkeypatch, hold_asked=True), Future[int](), []
    monkeypatch.setattr(island_waiting, "HOLD_S", 0.1)
    loop.exchange, loop.save_and_hold = SimpleNamespace(sent=Future()), hold
    assert loop.wait_for(answer) == 7
    assert held == [False], "a coordinator that is away is not waited for"


def test_what_went_wrong_is_raised_where_it_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = waiting(monkeypatch)
    loop.island = "the island"
    with pytest.raises(KeyError, match="the island"):
        loop.ask(lambda island: {}[island])
