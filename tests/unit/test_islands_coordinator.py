"""The coordinator of islands in this process: what a stranger, a second coordinator or a dead island could do to it."""

import io
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qlora_dist.aggregate.changes import Tensors
from qlora_dist.aggregate.coordinator import OuterCoordinator
from qlora_dist.aggregate.exchange import Header, encode
from qlora_dist.aggregate.round_files import digest
from qlora_dist.aggregate.round_report import RoundReport
from qlora_dist.cli import stop
from qlora_dist.config.aggregate_section import AggregateConfig
from qlora_dist.config.errors import UserError
from qlora_dist.config.load import load_config, to_yaml
from qlora_dist.coordinate.report import outcome
from qlora_dist.coordinate.rundir import open_run
from qlora_dist.coordinate.stop import ask_at_once
from qlora_dist.data.order import GlobalOrder
from qlora_dist.train.arrivals import Arrivals
from qlora_dist.train.island import Island
from qlora_dist.train.island_loop import IslandLoop
from qlora_dist.train.loop import Taken

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
BASE, A, B = "f" * 64, "q.lora_A.weight", "q.lora_B.weight"
ADAPTER = {A: torch.ones(2, 3), B: torch.zeros(4, 2)}
NUMBERS = ("steps", "loss", "first_loss", "last_loss", "exchange_seconds", "exposed_seconds", "seconds_per_step")
MOVED = ("bytes_sent", "bytes_received", "session_bytes_sent", "session_bytes_received", "session_steps")
TOLD = dict.fromkeys((*NUMBERS, *MOVED), 1)


class Metrics:
    def write(self, step: int, **values: Any) -> None:
        """Kept by nobody."""


def coordinator(run_dir: Path, *overrides: str) -> OuterCoordinator:
    train = ["train.max_steps=4", "train.global_batch_size=2", "train.per_device_train_batch_size=1"]
    settings = ["aggregate.islands=2", "train.warmup_steps=0", *train]
    config = load_config(QUICKSTART, [*settings, f"output_dir={run_dir}", *overrides])
    open_run(run_dir, to_yaml(config))
    return OuterCoordinator(config, run_dir, RoundReport(Metrics(), run_dir, 2, {}))  # type: ignore[arg-type]


def send(to: OuterCoordinator, name: str, tensors: Tensors, header: Header) -> str:
    data = encode(tensors, header, 32)
    to.take(name, io.BytesIO(data), len(data))  # type: ignore[arg-type]
    return name


def begun(run_dir: Path, *overrides: str, identity: dict[str, Any] | None = None) -> OuterCoordinator:
    """Two islands have begun and joined, each with a lease."""
    one = coordinator(run_dir, *overrides)
    start = digest(ADAPTER)
    assert one.handle("begin", island="a", start=start)["send"]
    file = send(one, "start", {A: ADAPTER[A]}, Header("adapter", "a", 0, 0, 0, BASE))
    what = {"file": file, "zeros": {B: [4, 2]}, "identity": identity or {}, "num_packs": 8}
    what |= {"adapter_config": "{}", "compute": ""}
    assert one.handle("begin", island="a", start=start, **what)["begun"]
    for name in "ab":
        one.handle("join", island=name, session=name, facts={})
    for name in "ab":
        assert one.handle("lease", island=name, session=name, packs=2)["lease"] == "ab".index(name) + 1
    return one


def contribute(to: OuterCoordinator, island: str, told: Any = TOLD) -> dict[str, Any]:
    lease = "ab".index(island) + 1
    change = {name: torch.full_like(tensor, 0.1) for name, tensor in ADAPTER.items()}
    file = send(to, f"{lease}-x", change, Header("change", island, 0, lease, 5, BASE))
    trained = [[2 * lease - 2, 2 * lease]]
    return to.handle(
        "contribute", island=island, session=island, lease=lease, trained=trained, tokens=5, file=file, told=told
    )


@pytest.mark.parametrize("name", ["model.name", "data.train", "train.global_batch_size"])
def test_an_island_that_said_hello_before_anything_had_begun_is_compared_with_what_has(
    name: str, tmp_path: Path
) -> None:
    """Else it would train packs of another order, or have each of them refused until all are dropped."""
    one = begun(tmp_path, identity={name: 1})
    client: Any = SimpleNamespace(call=one.handle)
    island = Island(client, "c", BASE, torch.device("cpu"))
    arguments: Any = {"num_packs": 8, "config": b"{}", "compute": ""}
    island.begin(ADAPTER, {name: 1}, **arguments)
    if name == "train.global_batch_size":
        island.begin(ADAPTER, {name: 2}, **arguments)
        return
    with pytest.raises(UserError, match=f"another {name} than"):
        island.begin(ADAPTER, {name: 2}, **arguments)
    assert "c" not in one.decisions.run.rounds.islands


@pytest.mark.parametrize("name", ["../events.jsonl", "/etc/hostname", "", ".hidden", "a/b", 7])
def test_no_message_names_a_file_elsewhere(name: Any, tmp_path: Path) -> None:
    one = begun(tmp_path)
    arguments = {"island": "a", "session": "a", "lease": 1, "trained": [[0, 2]], "tokens": 5, "told": TOLD}
    with pytest.raises(ValueError, match="no name of a file"):
        one.handle("contribute", file=name, **arguments)
    assert (tmp_path / "events.jsonl").stat().st_size
    new = coordinator(tmp_path / "new")
    with pytest.raises(ValueError, match="no name of a file"):
        new.handle("begin", island="a", start="", file=name)


@pytest.mark.parametrize(
    "told",
    [
        {}, None, TOLD | {"loss": None}, TOLD | {"session_steps": "1"}, TOLD | {"steps": True},
        TOLD | {"steps": math.inf}, TOLD | {"bytes_sent": math.nan}, TOLD | {"loss": 10**400},
    ],
)  # fmt: skip
def test_figures_that_no_report_could_be_made_of_are_refused_before_they_are_in_the_log(
    told: Any, tmp_path: Path
) -> None:
    one = begun(tmp_path)
    answer = contribute(one, "b", told)
    assert not answer["accepted"]
    assert "figure" in answer["reason"]
    with pytest.raises(ValueError, match="figure"):
        one.handle("leave", island="b", session="b", reason="", told={})
    assert contribute(one, "a")["accepted"]
    one._close_round("deadline", one.decisions.run.rounds.collect())
    assert one.decisions.run.rounds.counted == {1: 0}


def test_numbers_beyond_any_run_are_refused(tmp_path: Path) -> None:
    new = coordinator(tmp_path / "new")
    with pytest.raises(ValueError, match="too many for an adapter"):
        new.take("start", io.BytesIO(), 1 << 40)  # type: ignore[arg-type]
    file = send(new, "start", {A: ADAPTER[A]}, Header("adapter", "a", 0, 0, 0, BASE))
    what = {"file": file, "zeros": {B: [4, 2]}, "identity": {}, "num_packs": 8, "adapter_config": "{}", "compute": ""}
    for wrong in ({"num_packs": 1 << 50}, {"num_packs": 0}, {"num_packs": 1.5}, {"zeros": {B: [1 << 40, 1 << 40]}},
                  {"zeros": {B: [-4, -2]}}):  # fmt: skip
        with pytest.raises(ValueError, match=r"is to be a number from 1 to|a shape in zeros"):
            new.handle("begin", island="a", start=digest(ADAPTER), **(what | wrong))
    one = begun(tmp_path / "run")
    with pytest.raises(ValueError, match="too many for a message of 14 elements"):
        one.take("x", io.BytesIO(), 1 << 30)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="packs is to be a number"):
        one.handle("lease", island="a", session="a", packs=1 << 40)
    arguments = {"island": "a", "session": "a", "lease": 1, "trained": [[0, 2]], "file": "x", "told": TOLD}
    with pytest.raises(ValueError, match="tokens is to be a number"):
        one.handle("contribute", tokens=1 << 60, **arguments)


def test_what_was_sent_and_never_named_goes_when_its_round_is_over(tmp_path: Path) -> None:
    one = begun(tmp_path)
    contributions = tmp_path / "contributions"
    send(one, "1-never-named", {A: ADAPTER[A]}, Header("change", "a", 0, 1, 5, BASE))
    contribute(one, "a")
    one._close_round("quorum", one.decisions.run.rounds.collect())
    assert [path.name for path in contributions.iterdir()] == ["1-never-named"], "its message may be on its way"
    contribute(one, "b")
    one._close_round("everyone", one.decisions.run.rounds.collect())
    assert list(contributions.iterdir()) == []


def test_a_message_whose_file_was_removed_while_it_was_read_asks_for_it_again(tmp_path: Path) -> None:
    one = begun(tmp_path)
    examine = one._examine

    def slowly(*arguments: Any) -> Any:
        answer = examine(*arguments)
        (tmp_path / "contributions" / "1-x").unlink()
        return answer

    one._examine = slowly  # type: ignore[method-assign]
    assert contribute(one, "a")["missing"]
    assert one.decisions.run.rounds.contributions == {}


def test_losses_that_are_not_finite_are_null_in_the_log_and_in_no_mean(tmp_path: Path) -> None:
    one = begun(tmp_path)
    nothing = dict.fromkeys(("loss", "first_loss", "last_loss", "eval_loss_before"), math.nan)
    assert contribute(one, "a", TOLD | nothing)["accepted"]
    assert contribute(one, "b", TOLD | {"loss": 2.5})["accepted"]
    one.handle("evaluated", version=0, eval_loss=math.nan)
    one._close_round("everyone", one.decisions.run.rounds.collect())
    last = one.decisions.run.rounds.last
    assert last is not None
    assert (last["facts"]["metrics"]["loss"], last["facts"]["metrics"]["train_loss_before"]) == (2.5, 1)
    assert one.report.summary(one.decisions.run, tmp_path)["best_eval_loss"] is None
    for line in (tmp_path / "events.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)


def test_a_coordinator_that_was_taken_for_dead_commits_nothing(tmp_path: Path) -> None:
    """It wakes up with the old adapter, over which another one has put a round since."""
    old = begun(tmp_path)
    contribute(old, "a")
    new = coordinator(tmp_path)
    collected = new.decisions.run.rounds.collect()
    assert [one.lease for one in collected] == [1]
    new._close_round("deadline", collected)
    contribute(new, "b")
    with pytest.raises(RuntimeError, match="another coordinator"):
        old.run()
    old.decisions.catch_up()
    with pytest.raises(RuntimeError, match="another coordinator"):
        old._close_round("deadline", old.decisions.run.rounds.collect())
    assert old.decisions.run.rounds.round == 1


def test_a_round_whose_files_another_start_has_swept_away_is_not_committed(tmp_path: Path) -> None:
    old = begun(tmp_path)
    contribute(old, "a")
    facts = old.report.facts

    def while_another_starts(*arguments: Any) -> dict[str, Any]:
        coordinator(tmp_path)
        return facts(*arguments)

    old.report.facts = while_another_starts  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="another coordinator"):
        old._close_round("deadline", old.decisions.run.rounds.collect())
    assert coordinator(tmp_path).decisions.run.rounds.round == 0


def test_a_round_in_which_all_is_refused_leaves_nothing_behind(tmp_path: Path) -> None:
    one = begun(tmp_path)
    contribute(one, "a")
    (tmp_path / "contributions" / "1-x").write_bytes(b"altered")
    one.messages.clear()
    one._close_round("deadline", one.decisions.run.rounds.collect())
    assert one.decisions.run.refusals[0]["island"] == "a"
    assert list((tmp_path / "contributions").iterdir()) == []


def test_a_run_that_is_asked_to_stop_does_not_wait_for_ever_for_a_dead_island(tmp_path: Path) -> None:
    one = begun(tmp_path, "aggregate.round_deadline_s=0.2")
    one.handle("leave", island="a", session="a", reason="asked to stop", told=TOLD)
    ask_at_once(tmp_path, "a test")
    one.run()
    assert one.decisions.run.state() == "stopped"


def test_a_stop_after_everything_was_trained_has_stopped_nothing(tmp_path: Path) -> None:
    one = begun(tmp_path, "train.max_steps=1")
    for island in "ab":
        contribute(one, island)
    one._close_round("everyone", one.decisions.run.rounds.collect())
    ask_at_once(tmp_path, "SIGTERM")
    for island in "ab":
        answer = one.handle("lease", island=island, session=island, packs=2)
        assert (answer["done"], answer["stop"]) == (True, False)
        one.handle("leave", island=island, session=island, reason="", told=TOLD)
    one.run()
    told = outcome(one.decisions.run)
    assert (told["state"], told["message"], told["summary"]["complete"]) == ("finished", None, True)


class Direct:
    """A client of a coordinator in this process."""

    def __init__(self, to: OuterCoordinator):
        self.to = to

    def call(self, method: str, **arguments: Any) -> dict[str, Any]:
        return self.to.handle(method, **arguments)

    def get_file(self, name: str) -> bytes | None:
        path = self.to.give(name)
        return None if path is None else path.read_bytes()


def test_a_restarted_island_keeps_the_moments_of_the_version_that_its_checkpoint_is_of(tmp_path: Path) -> None:
    """Under svd coordinates change from version to version; to the one that is there they did not."""
    one = begun(tmp_path, "aggregate.method=svd")
    for island in "ab":
        contribute(one, island)
        one._close_round("quorum", one.decisions.run.rounds.collect())

    def reset(moments_of: int | None) -> list[str]:
        island = Island(Direct(one), "a", BASE, torch.device("cpu"))  # type: ignore[arg-type]
        received = island.fetch(moments_of)
        assert received is not None
        assert received.version == 2
        return received.reset

    last = one.decisions.run.rounds.last
    assert last is not None
    assert (reset(2), reset(1)) == ([], last["facts"]["reset"])
    assert reset(0) == reset(None) == [A, B]


@pytest.mark.parametrize(("version", "kept", "all_reset"), [(3, 3, 0), (4, 3, 0), (5, 3, 1)])
def test_what_an_island_that_enters_again_asks_for(version: int, kept: int, all_reset: int) -> None:
    """`load_newest` learns of which version the moments are; older than the round before they start from zero."""
    asked: list[int | None] = []
    told: list[str] = []
    loop: Any = object.__new__(IslandLoop)
    joined = {"islands": 2, "packs": 8, "total_steps": 4}
    loop.island = SimpleNamespace(
        begin=lambda *_: None,
        join=lambda *_, **facts: dict(joined),
        version=-1,
        encoder=SimpleNamespace(load_state_dict=dict),
    )
    loop.resumed = SimpleNamespace(state={"island": {"version": kept}}, extra={})
    loop.full_adapter, loop.notice, loop.agree = dict, told.append, lambda value: value
    loop.ask, loop.asked_to_stop = lambda question: question(loop.island), False
    loop.adapter_config_json, loop.identity, loop.whole_order = b"{}", {}, GlobalOrder(8, 2)
    loop.config, loop.aggregate = load_config(QUICKSTART), AggregateConfig()
    loop.world_size, loop.device, loop.progress = 1, torch.device("cpu"), SimpleNamespace(step=6)
    loop.strategy = SimpleNamespace(
        full_state=lambda: SimpleNamespace(optimizer={}), load_full_state=lambda state: None
    )

    def load_newest(moments_of: int | None) -> None:
        asked.append(moments_of)
        loop.version = version

    loop.load_newest = load_newest
    assert loop.enter()
    assert asked == [kept]
    assert len(told) == all_reset


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_the_learning_rate_follows_the_share_of_packs_whatever_an_islands_batch(batch: int) -> None:
    """Two islands, 10 steps of 2 packs each: 40 packs; half of them were leased before."""
    loop = object.__new__(IslandLoop)
    loop.whole_order, loop.islands, loop.packs, loop.total_steps = GlobalOrder(40, batch), 2, 40, 10
    loop.rate_at = float
    loop.set_schedule({"before": 20, "present": 2}, 7, None)  # type: ignore[arg-type]
    assert loop.schedule(7) == 5.0
    assert loop.schedule(8) == 5.0 + 2 * batch * 10 / 40
    assert loop.schedule(100) == 10.0


def test_a_result_that_arrives_in_the_middle_is_no_time_of_the_steps_before() -> None:
    """A GPU's steps are taken up one late: the last one before the result still counts from the start of its own."""
    written = []
    loop: Any = object.__new__(IslandLoop)
    loop.arrivals = Arrivals(torch.device("cpu"), late=1)
    loop.arrivals.send(Taken(3, 1e-3, 10, 10, torch.ones(1).numpy()), torch.tensor([1.0, 2.0]))
    loop.unlogged, loop.losses, loop.step_seconds, loop.exposed_s, loop.evaluation_s = [], [], 0.0, 0.0, 0.0
    loop.interval_start, loop.device, loop.rank, loop.nodes, loop.total_steps = 0.0, torch.device("cpu"), 0, {}, 4
    scale = SimpleNamespace(update=lambda bad: False)
    loop.progress = SimpleNamespace(skipped_steps=0, bad_steps=0, loss_scale=scale)
    loop.config = SimpleNamespace(train=SimpleNamespace(max_bad_steps=5, logging_steps=100))
    loop.order, loop.heartbeat = SimpleNamespace(steps_per_epoch=4), SimpleNamespace(metrics={})
    loop.metrics = SimpleNamespace(write=lambda step, **values: written.append(values))
    loop.aggregate, loop.exchanging = SimpleNamespace(overlap=False), False
    loop._take_result = lambda wait_for_it: None
    loop.take_result()
    assert [values["loss"] for values in written] == [2.0]
    assert written[0]["seconds_per_step"] > 0
    assert loop.interval_start > loop.done


@pytest.mark.parametrize(
    ("first", "step", "bad_steps", "holds"), [(0, 0, 0, False), (8, 8, 0, False), (8, 9, 1, False), (8, 9, 0, True)]
)
def test_an_island_holds_still_only_where_this_attempt_has_a_checkpoint(
    first: int, step: int, bad_steps: int, holds: bool
) -> None:
    """Its own coordinator takes no other step; it may be asked while it waits for its first lease."""
    held = []
    loop: Any = object.__new__(IslandLoop)
    loop.first_step, loop.saved_step = first, first
    loop.progress = SimpleNamespace(step=step, bad_steps=bad_steps)
    loop.log, loop.hold = lambda: None, lambda: held.append(loop.progress.step)
    loop.heartbeat = SimpleNamespace(at=lambda step, phase: None)
    loop.strategy, loop.writer = SimpleNamespace(full_state=lambda: None), None
    loop.save_and_hold()
    assert held == [step] * holds


def test_a_run_of_islands_is_asked_to_stop_in_words_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It makes no checkpoint of its own, of which `stop` would say that there is none."""
    begun(tmp_path)
    stop(tmp_path, reason="enough", wait=False)
    told = capsys.readouterr().out
    assert "its islands contribute what they have trained first" in told
    assert "checkpoint" not in told
