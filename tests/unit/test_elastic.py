"""How many workers a Ray run is given, for given answers of Ray and the coordinator, and where there are none.

The same on a real cluster: tests/cluster/test_two_nodes.py.
"""

import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray import cloudpickle
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision
from ray.train.v2.api.config import ScalingConfig

from qlora_dist.cluster import elastic, preemption
from qlora_dist.cluster.elastic import NodesPolicy
from qlora_dist.cluster.group_watch import RunStopped
from qlora_dist.cluster.preemption import NoAnswer
from tests.unit.test_evacuation import WORKER, Answers, node, said

GROUP: Any = SimpleNamespace(num_workers=1, workers=[SimpleNamespace(metadata=SimpleNamespace(node_id="a"))])
UNKNOWN = "what room there is for this run is not known now"


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Answers:
    made = Answers()
    monkeypatch.setattr(preemption, "leaving_nodes", made.leaving_nodes)
    monkeypatch.setattr(elastic, "live_nodes", made.live_nodes)
    # A failing question of its own would hide those of the policy.
    monkeypatch.setattr(preemption.Evacuation, "look", lambda self, placed: None)
    monkeypatch.setattr(preemption, "ANSWER_S", 1.0)
    for name in ("LOOK_S", "SETTLE_S", "PAUSE_S"):
        monkeypatch.setattr(elastic, name, 0.0)
    # Ray's own, to its autoscaler.
    monkeypatch.setattr(NodesPolicy, "_maybe_send_resource_request", lambda self: None)
    return made


def policy(answers: Any, run_dir: Path, most: int = 2, start_timeout_s: float = 100.0) -> NodesPolicy:
    scaling = ScalingConfig(num_workers=(1, most), resources_per_worker=WORKER)
    return NodesPolicy(scaling, answers, run_dir, start_timeout_s)


def running(decides: NodesPolicy) -> Any:
    return decides.make_decision_for_running_worker_group(GROUP, None)


def test_it_grows_once_the_group_holds_still(answers: Answers, tmp_path: Path) -> None:
    decides = policy(answers, tmp_path, most=4)
    answers.nodes = [node("a", 0), node("b", 2)]
    assert isinstance(running(decides), NoopDecision)
    assert [(method, arguments["workers"]) for method, arguments in answers.told] == [("request_resize", 3)]
    assert isinstance(running(decides), NoopDecision), "it does not hold still yet"
    answers.held_step = 7
    assert running(decides) == ResizeDecision(num_workers=3, resources_per_worker=WORKER)
    assert not decides._asked


def test_a_head_that_does_not_answer_holds_nobody_up(
    answers: Answers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray Train's controller looks at no worker while it waits for this policy."""
    monkeypatch.setattr(preemption, "ANSWER_S", 0.05)
    asked, answered = [], threading.Event()
    answers.before = lambda what: (asked.append(what), answered.wait(5))  # type: ignore[assignment,func-returns-value]
    answers.nodes = [node("a", 0), node("b", 1)]
    decides = policy(answers, tmp_path)
    began = time.monotonic()
    for _ in range(20):
        assert isinstance(running(decides), NoopDecision)
        assert isinstance(decides.make_decision_for_non_running_worker_group(), NoopDecision)
        assert time.monotonic() - began < 1.0, "each decision waited for it"
    assert asked == ["live_nodes"]
    assert said(tmp_path).count(f"{UNKNOWN}: no answer within 0.05 s") == 1
    monkeypatch.setattr(preemption, "ANSWER_S", 1.0)
    answered.set()
    for thread in threading.enumerate():
        if thread.name == "asks-ray":
            thread.join()
    running(decides)
    assert [method for method, _ in answers.told] == ["request_resize"]


@pytest.mark.parametrize("room_is_gone", [False, True])
@pytest.mark.parametrize("broken", ["live_nodes", "leaving_nodes", "request_resize", "resize_state", "cancel_resize"])
def test_what_raises_is_asked_again(answers: Answers, tmp_path: Path, broken: str, room_is_gone: bool) -> None:
    """No group is left holding still for a resize that nobody remembers."""
    errors = {broken: 2}

    def fail(what: str) -> None:
        if errors.get(what):
            errors[what] -= 1
            raise RuntimeError("the GCS is away\nand more")

    answers.nodes = [node("a", 0), node("b", 1)]
    answers.before = fail
    decides = policy(answers, tmp_path)
    for _ in range(20):
        running(decides)
        if answers.told:
            break
    assert [method for method, _ in answers.told] == ["request_resize"]
    answers.held_step = 7
    if room_is_gone:
        answers.nodes = [node("a", 0)]
    for _ in range(5):
        decision = running(decides)
        if not decides._asked:
            break
    assert [method for method, _ in answers.told] == ["request_resize", *["cancel_resize"] * room_is_gone]
    moved = ResizeDecision(num_workers=2, resources_per_worker=WORKER)
    assert isinstance(decision, NoopDecision) if room_is_gone else decision == moved
    assert not decides._asked


def test_a_resize_whose_answer_was_lost_is_not_forgotten(answers: Answers, tmp_path: Path) -> None:
    """The coordinator heard of it, and the workers hold still for it."""
    answers.nodes = [node("a", 0), node("b", 1)]
    decides = policy(answers, tmp_path)
    answers.resize_asked, answers.held_step = True, 7

    def lose(what: str) -> None:
        if what == "request_resize":
            raise RuntimeError("lost")

    answers.before = lose
    assert isinstance(running(decides), NoopDecision)
    answers.nodes = [node("a", 0)]
    assert isinstance(running(decides), NoopDecision)
    assert [method for method, _ in answers.told] == ["cancel_resize"]


def test_the_first_group_waits_for_an_answer_as_long_as_for_nodes(answers: Answers, tmp_path: Path) -> None:
    def fail(what: str) -> None:
        raise RuntimeError("the GCS is away")

    answers.before = fail
    decides = policy(answers, tmp_path, start_timeout_s=0.2)
    assert isinstance(decides.make_decision_for_non_running_worker_group(), NoopDecision)
    time.sleep(0.25)
    with pytest.raises(NoAnswer, match="the GCS is away"):
        decides.make_decision_for_non_running_worker_group()


def test_too_little_room_for_too_long_is_the_end(answers: Answers, tmp_path: Path) -> None:
    answers.nodes = [node("a", 0)]
    decides = policy(answers, tmp_path, start_timeout_s=0.2)
    assert isinstance(decides.make_decision_for_non_running_worker_group(), NoopDecision)
    time.sleep(0.25)
    with pytest.raises(RunStopped, match=r"launch\.num_workers"):
        decides.make_decision_for_non_running_worker_group()
    assert [method for method, _ in answers.told] == ["fail"]


def test_the_policy_travels_to_the_controller(tmp_path: Path) -> None:
    decides = policy(None, tmp_path)
    decides._patience.ask(int)
    assert cloudpickle.loads(cloudpickle.dumps(decides))._patience.ask(int, "7") == 7
