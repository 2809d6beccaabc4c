"""What a run does about a node that Ray will take away: the decisions, for given answers of Ray and the coordinator.

The same on a real cluster: tests/cluster/test_preemption.py.
"""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray import cloudpickle
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision
from ray.train.v2.api.config import ScalingConfig

from qlora_dist.cluster import preemption
from qlora_dist.cluster.nodes import Node
from qlora_dist.cluster.output import LAUNCHER_LOG, logs_folder
from qlora_dist.cluster.preemption import GRACE_S, Evacuation, FixedPolicy

WORKER = {"CPU": 1.0}


class Answers:
    """What Ray and the coordinator say, and what the coordinator was told; it passes for the coordinator's client."""

    def __init__(self) -> None:
        self.leaving: dict[str, float | None] = {}
        self.nodes = [node("a", 0), node("b", 0)]
        self.held_step: int | None = None
        self.resize_asked = False
        self.told: list[tuple[str, dict[str, Any]]] = []
        self.before: Callable[[str], None] = lambda what: None

    def leaving_nodes(self) -> dict[str, float | None]:
        self.before("leaving_nodes")
        return dict(self.leaving)

    def live_nodes(self) -> list[Node]:
        self.before("live_nodes")
        return list(self.nodes)

    def call(self, method: str, **arguments: Any) -> dict[str, Any]:
        self.before(method)
        if method == "resize_state":
            return {"asked": self.resize_asked, "held_step": self.held_step}
        self.told.append((method, arguments))
        self.resize_asked = method == "request_resize"
        return {"asked": self.resize_asked}


def node(name: str, free: int) -> Node:
    return Node(name, f"10.0.0.{ord(name) - 96}", 1, {"CPU": 4.0}, {"CPU": float(free)})


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Answers:
    made = Answers()
    monkeypatch.setattr(preemption, "leaving_nodes", made.leaving_nodes)
    monkeypatch.setattr(preemption, "live_nodes", made.live_nodes)
    monkeypatch.setattr(preemption, "LOOK_S", 0.0)
    monkeypatch.setattr(preemption, "ANSWER_S", 1.0)
    return made


def evacuation(answers: Any, run_dir: Path, least: int, most: int) -> Evacuation:
    return Evacuation(answers, run_dir, least, most, WORKER)


def said(run_dir: Path) -> str:
    return (logs_folder(run_dir) / LAUNCHER_LOG).read_text()


def test_nothing_is_asked_while_no_node_of_the_run_leaves(answers: Answers, tmp_path: Path) -> None:
    looks = evacuation(answers, tmp_path, 1, 2)
    answers.leaving = {"c": None}
    assert looks.look(["a", "b"]) is None
    assert not looks.asked
    assert not answers.told


def test_with_room_the_group_moves_once_it_holds_still(answers: Answers, tmp_path: Path) -> None:
    looks = evacuation(answers, tmp_path, 1, 2)
    answers.leaving = {"b": time.time() + 120}
    assert looks.look(["a", "b"]) is None
    ((method, arguments),) = answers.told
    assert (method, arguments["workers"]) == ("request_resize", 1)
    assert "Ray is taking node 10.0.0.2 away in 1" in arguments["reason"]
    assert "going on with 1 worker(s) elsewhere" in said(tmp_path)
    assert looks.asked
    assert looks.look(["a", "b"]) is None, "it does not hold still yet"
    answers.held_step = 7
    assert looks.look(["a", "b"]) == 1
    assert not looks.asked
    assert len(answers.told) == 1


def test_free_room_counts_up_to_the_most_and_not_where_nodes_leave(answers: Answers, tmp_path: Path) -> None:
    answers.nodes = [node("a", 1), node("b", 0), node("c", 4), node("d", 4)]
    answers.leaving = {"b": None, "d": None}
    evacuation(answers, tmp_path, 1, 16).look(["a", "b", "b"])
    evacuation(answers, tmp_path, 1, 3).look(["a", "b", "b"])
    assert [arguments["workers"] for _, arguments in answers.told] == [6, 3]


def test_without_room_it_holds_still_until_there_is(answers: Answers, tmp_path: Path) -> None:
    looks = evacuation(answers, tmp_path, 1, 1)
    answers.leaving, answers.held_step = {"b": time.time() + 30}, 7
    assert looks.look(["b"]) is None
    assert answers.told[0][1]["workers"] == 1
    assert "no room for the run without it yet" in said(tmp_path)
    assert looks.look(["b"]) is None
    assert looks.asked
    answers.nodes = [node("a", 0), node("b", 0), node("c", 1)]
    assert looks.look(["b"]) == 1
    assert len(answers.told) == 1


def test_a_drain_that_was_cancelled_lets_the_run_go_on(answers: Answers, tmp_path: Path) -> None:
    looks = evacuation(answers, tmp_path, 1, 1)
    answers.leaving, answers.held_step = {"b": time.time() + 30}, 7
    looks.look(["b"])
    answers.leaving = {}
    assert looks.look(["b"]) is None
    assert [method for method, _ in answers.told] == ["request_resize", "cancel_resize"]
    assert not looks.asked


def test_a_node_that_has_gone_is_left_to_the_failure_of_its_workers(answers: Answers, tmp_path: Path) -> None:
    looks = evacuation(answers, tmp_path, 1, 1)
    answers.leaving, answers.held_step = {"b": time.time() + 30}, 7
    looks.look(["b"])
    answers.leaving, answers.nodes = {}, [node("a", 0)]
    assert looks.look(["b"]) is None
    assert [method for method, _ in answers.told] == ["request_resize"]
    looks.forget()
    assert not looks.asked


@pytest.mark.parametrize(("late_s", "goes_on"), [(GRACE_S - 5, False), (GRACE_S + 5, True)])
def test_a_node_that_outlives_its_deadline(answers: Answers, tmp_path: Path, late_s: float, goes_on: bool) -> None:
    looks = evacuation(answers, tmp_path, 1, 1)
    answers.leaving, answers.held_step = {"b": time.time() - late_s}, 7
    looks.look(["b"])
    assert looks.look(["b"]) is None
    assert ("cancel_resize" in [method for method, _ in answers.told]) == goes_on
    # The same node is not held still for twice where there is no room.
    looks.look(["b"])
    assert [method for method, _ in answers.told].count("request_resize") == 1


def test_a_head_that_does_not_answer_holds_nobody_up(
    answers: Answers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preemption, "ANSWER_S", 0.05)
    asked, answered = [], threading.Event()
    answers.before = lambda what: (asked.append(what), answered.wait(20))  # type: ignore[assignment,func-returns-value]
    looks = evacuation(answers, tmp_path, 1, 2)
    answers.leaving = {"b": time.time() + 120}
    began = time.monotonic()
    for _ in range(20):
        assert looks.look(["a", "b"]) is None
    assert time.monotonic() - began < 1.0, "each look waited for it"
    assert asked == ["leaving_nodes"]
    assert said(tmp_path).count("is not known now: no answer within 0.05 s") == 1
    monkeypatch.setattr(preemption, "ANSWER_S", 1.0)
    answered.set()
    for thread in threading.enumerate():
        if thread.name == "asks-ray":
            thread.join()
    assert looks.look(["a", "b"]) is None
    assert looks.asked


@pytest.mark.parametrize("broken", ["leaving_nodes", "live_nodes", "request_resize", "resize_state", "cancel_resize"])
def test_what_raises_is_asked_again(answers: Answers, tmp_path: Path, broken: str) -> None:
    """In the controller an exception would be the end of the worker group."""
    errors = {broken: 2}

    def fail(what: str) -> None:
        if errors.get(what):
            errors[what] -= 1
            raise RuntimeError("the GCS is away\nand more")

    answers.before = fail
    looks = evacuation(answers, tmp_path, 1, 1)
    answers.leaving, answers.held_step = {"b": time.time() - 2 * GRACE_S}, 7
    for _ in range(5):
        assert looks.look(["b"]) is None
    assert [method for method, _ in answers.told] == ["request_resize", "cancel_resize"]
    assert said(tmp_path).count("is not known now: RuntimeError: the GCS is away\n") == 1


def test_the_policy_for_a_fixed_number_moves_the_group(
    answers: Answers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Ray's own, to its autoscaler.
    monkeypatch.setattr(FixedPolicy, "_maybe_send_resource_request", lambda self: None)
    scaling = ScalingConfig(num_workers=1, resources_per_worker=WORKER)
    policy = FixedPolicy(scaling, answers, tmp_path)  # type: ignore[arg-type]
    group: Any = SimpleNamespace(workers=[SimpleNamespace(metadata=SimpleNamespace(node_id="b"))])
    assert isinstance(policy.make_decision_for_running_worker_group(group, None), NoopDecision)
    answers.leaving, answers.held_step = {"b": None}, 7
    answers.nodes = [node("a", 1), node("b", 0)]
    assert isinstance(policy.make_decision_for_running_worker_group(group, None), NoopDecision)
    moved = policy.make_decision_for_running_worker_group(group, None)
    assert moved == ResizeDecision(num_workers=1, resources_per_worker=WORKER)
    # A group that ended meanwhile is not asked for what it was.
    policy.make_decision_for_running_worker_group(group, None)
    assert policy._evacuation.asked
    assert isinstance(policy.make_decision_for_non_running_worker_group(), ResizeDecision)
    assert not policy._evacuation.asked


def test_the_policy_travels_to_the_controller(tmp_path: Path) -> None:
    """After it has asked, too."""
    policy = FixedPolicy(ScalingConfig(num_workers=1, resources_per_worker=WORKER), None, tmp_path)  # type: ignore[arg-type]
    policy._evacuation._patience.ask(int)
    assert cloudpickle.loads(cloudpickle.dumps(policy))._evacuation._patience.ask(int, "7") == 7
