"""A planned resize: nobody ends the group before its checkpoint, and nothing but the next group makes it done."""

from pathlib import Path

import pytest

from qlora_dist.coordinate.replay import Run
from qlora_dist.coordinate.report import read_status
from qlora_dist.coordinate.state import Coordinator
from tests.unit.test_coordinate_state import commit, coordinator, join, run_dir

__all__ = ["run_dir"]


def at_work(run_dir: Path, attempt: str = "a") -> Coordinator:
    c = coordinator(run_dir)
    c.start_job()
    join(c, attempt, world_size=1)
    return c


def hold_asked(c: Coordinator, generation: int) -> bool:
    return bool(c.heartbeat(generation, 0, 1, "compute")["hold"])


def test_a_resize_waits_for_its_checkpoint_and_is_no_failure(run_dir: Path) -> None:
    c = at_work(run_dir)
    assert not hold_asked(c, 1)
    assert c.request_resize(2, "growing from 1 to 2 workers") == {"asked": True}
    assert c.request_resize(2, "growing from 1 to 2 workers") == {"asked": True}
    assert hold_asked(c, 1)
    assert c.resize_state() == {"asked": True, "held_step": None}
    # Without its checkpoint nobody may hold: what was trained would be lost with the group.
    with pytest.raises(ValueError, match="step 7 of generation 1 has no checkpoint"):
        c.held(1, 7)
    commit(c, 1, 7)
    assert c.held(1, 7) == {"recorded": True}
    assert c.resize_state() == {"asked": True, "held_step": 7}
    assert c.status()["state"] == "starting"

    # A coordinator that takes its place knows all of it.
    c = coordinator(run_dir)
    assert c.resize_state() == {"asked": True, "held_step": 7}
    join(c, "b", world_size=2)
    assert c.resize_state() == {"asked": False, "held_step": None}
    assert not hold_asked(c, 2)
    assert c.should_restart("a crash", 9, max_restarts=1)["restart"], "the resize counted as a restart"
    resized, restarted = read_status(run_dir)["restarts"]
    assert resized == {"generation": 1, "step": 7, "reason": "growing from 1 to 2 workers", "planned": True}
    assert not restarted["planned"]


def test_only_a_group_at_work_is_asked(run_dir: Path) -> None:
    c = coordinator(run_dir)
    c.start_job()
    assert c.request_resize(2, "r") == {"asked": False}
    join(c, "a")
    c.request_stop("enough")
    assert c.request_resize(2, "r") == {"asked": False}


@pytest.mark.parametrize("ended_by", ["cancel", "failure", "stop", "finish", "job", "another group"])
def test_what_calls_it_off(run_dir: Path, ended_by: str) -> None:
    c = at_work(run_dir)
    c.request_resize(2, "r")
    commit(c, 1, 3)
    if ended_by == "cancel":
        c.held(1, 3)
        c.cancel_resize("the room is gone")
        assert c.status()["state"] == "running"
    elif ended_by == "failure":
        c.should_restart("a crash", 3)
    elif ended_by == "stop":
        c.request_stop("enough")
    elif ended_by == "finish":
        c.finish(1, 3, {})
    elif ended_by == "job":
        c.start_job()
    else:
        join(c, "b")
    assert c.resize_state() == {"asked": False, "held_step": None}
    assert not hold_asked(c, 1)
    # Ranks of the old group may say so too late.
    c.held(1, 3)
    assert c.resize_state()["held_step"] is None
    assert not any(restart["planned"] for restart in read_status(run_dir)["restarts"])


def test_a_lost_node_is_not_bounded_by_max_restarts_and_the_same_loss_twice_is_the_end(run_dir: Path) -> None:
    c = at_work(run_dir)
    for number in range(4):
        join(c, f"g{number}")
        assert c.should_restart("node lost", 10 * number, max_restarts=1, counted=False)["restart"]
    assert c.should_restart("a crash", 99, max_restarts=1)["restart"]
    assert not c.should_restart("a worse crash", 100, max_restarts=1)["restart"]
    assert not c.should_restart("node lost", 30, max_restarts=1, counted=False)["restart"]


def test_workers_that_their_launcher_starts_again_belong_to_the_same_job(run_dir: Path) -> None:
    c = coordinator(run_dir)
    assert c.start_job(session="agent 1") == {"started_generation": 0}
    join(c, "a")
    assert c.start_job(session="agent 1") == {"started_generation": 0}
    assert c.start_job(session="agent 2") == {"started_generation": 1}
    assert c.start_job() == {"started_generation": 1}
    assert c.start_job() == {"started_generation": 1}


def test_logs_of_before_are_still_read() -> None:
    run = Run()
    run.apply({"kind": "job", "time": 1.0, "started_generation": 0})
    run.apply({"kind": "restart", "time": 2.0, "generation": None, "message": "m", "step": 1, "restart": True})
    assert run.session is None
    assert len(run.restarts) == 1
