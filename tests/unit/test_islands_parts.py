"""Parts of islands in training: settings that do not go together, leased orders, addresses, files over the service."""

import json
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from qlora_dist.cluster.islands import Child, Group, device_slices, island_config
from qlora_dist.cluster.launch import launch
from qlora_dist.cluster.outer import coordinate, listens_at, reached_at
from qlora_dist.config.errors import UserError
from qlora_dist.config.load import load_config
from qlora_dist.coordinate import island_messages as say
from qlora_dist.coordinate.client import CoordinatorError, HttpClient, Unreachable
from qlora_dist.coordinate.island_messages import Decision
from qlora_dist.coordinate.outer_address import keep_token, outer_address, own_token, refuse_finished
from qlora_dist.coordinate.rounds import Rounds, Terms
from qlora_dist.coordinate.service import CoordinatorService
from qlora_dist.data.order import GlobalOrder, LeasedOrder, Position
from qlora_dist.train.island import Island
from tests.distributed.islands import violations

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


@pytest.mark.parametrize(
    ("overrides", "code"),
    [
        (["aggregate.coordinator=host:1"], "island-by-halves"),
        (["aggregate.island=a"], "island-by-halves"),
        (["aggregate.method=svd", "aggregate.robust=median"], "svd-with"),
        (["aggregate.method=svd", "aggregate.overlap=true"], "svd-with"),
        (["aggregate.method=svd", "aggregate.freeze=A"], "svd-with"),
        (["aggregate.method=svd", "adapter.use_dora=true"], "svd-with"),
        (["aggregate.noise=1.0"], "noise-without-clip-norm"),
        (["aggregate.noise=1.0", "aggregate.clip_norm=1.0", "aggregate.robust=trimmed"], "noise-with-robust"),
        (["aggregate.overlap=true", "aggregate.sync_every=1"], "overlap-every-step"),
        (["aggregate.outer_learning_rate=0"], "setting-value"),
        (["aggregate.outer_momentum=1"], "setting-value"),
        (["aggregate.islands=2", "eval.load_best_model_at_end=true"], "islands-with-best"),
        (["aggregate.islands=0"], "setting-value"),
    ],
)
def test_settings_that_do_not_go_together(overrides: list[str], code: str) -> None:
    with pytest.raises(UserError) as told:
        load_config(QUICKSTART, overrides)
    assert told.value.code == code


def test_only_islands_without_a_coordinator_are_started_here() -> None:
    assert not load_config(QUICKSTART).aggregate.here
    assert load_config(QUICKSTART, ["aggregate.islands=2"]).aggregate.here
    apart = ["aggregate.islands=2", "aggregate.coordinator=host:1", "aggregate.island=a"]
    assert not load_config(QUICKSTART, apart).aggregate.here


def test_the_leases_of_all_islands_together_are_the_order() -> None:
    """Whatever the ranges: batches skip what lies between, and cross the ends of epochs."""
    order = GlobalOrder(num_packs=7, global_batch_size=3, seed=5)
    whole = [int(order.packs_at(np.array([n]))[0]) for n in range(21)]
    assert [sorted(whole[n : n + 7]) for n in (0, 7, 14)] == [list(range(7))] * 3, "each epoch has every pack"
    position, first = Position(), []
    while len(first) < 21:
        packs, position = order.batch_at(position)
        first += packs.tolist()
    assert first == whole, "it is the order of a run without islands"
    for ranges in ([[0, 21]], [[5, 9]], [[1, 4], [6, 15], [20, 21]]):
        leased = LeasedOrder.of(order, ranges, islands=2)
        position, packs, sizes = leased.start, [], []
        for _ in range(leased.num_steps):
            batch, position = leased.batch_at(position)
            packs += batch.tolist()
            sizes.append(len(batch))
        assert packs == [whole[n] for start, end in ranges for n in range(start, end)]
        assert all(size == 3 for size in sizes[:-1])
        assert sizes[-1] >= 1


def test_where_the_coordinator_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QLORA_DIST_TOKEN", raising=False)
    outer, island = tmp_path / "outer", tmp_path / "island"
    outer.mkdir()
    island.mkdir()
    (outer / "coordinator.json").write_text(json.dumps({"url": "http://h:1", "token": "t", "key": "k"}))
    assert outer_address(str(outer), island) == ("http://h:1", "t")
    with pytest.raises(UserError, match="QLORA_DIST_TOKEN"):
        outer_address("host:7070", island)
    with pytest.raises(UserError, match=r"no HOST:PORT"):
        outer_address("nowhere", island)
    monkeypatch.setenv("QLORA_DIST_TOKEN", "secret")
    token = own_token("host:7070", island)
    assert token == "secret"
    assert own_token(str(outer), island) is None, "it is in the coordinator's folder"
    keep_token(token, island)
    monkeypatch.delenv("QLORA_DIST_TOKEN")
    assert outer_address("host:7070", island) == ("http://host:7070", "secret"), "as a worker on another node finds it"
    assert outer_address("https://host:7070", island)[0] == "https://host:7070"
    assert (island / "outer.json").stat().st_mode & 0o077 == 0


def test_an_island_that_comes_when_everything_is_trained_is_told_so(tmp_path: Path) -> None:
    """It would try to reach a coordinator that has ended, for as long as one may be away."""
    (tmp_path / "coordinator.json").write_text(json.dumps({"url": "http://h:1", "token": "t", "key": "k"}))
    finished = {"kind": "finished", "time": 1.0, "step": 4, "summary": {"complete": False, "adapter": "there"}}
    (tmp_path / "events.jsonl").write_text(json.dumps(finished) + "\n")
    assert outer_address(str(tmp_path), tmp_path) == ("http://h:1", "t"), "it was stopped, and may go on"
    finished["summary"] = {"complete": True, "adapter": "there"}
    (tmp_path / "events.jsonl").write_text(json.dumps(finished) + "\n")
    with pytest.raises(UserError, match="take the adapter in there"):
        outer_address(str(tmp_path), tmp_path)
    # One that was paused meanwhile is told so, too, at its next message.
    client = HttpClient("http://127.0.0.1:9", "t", before_again=lambda: refuse_finished(str(tmp_path)))
    with pytest.raises(UserError, match="take the adapter in there"):
        client.call("lease")


class Shelf:
    """Files in memory and on disk."""

    def __init__(self, folder: Path):
        self.folder = folder

    def handle(self, method: str, **kwargs: object) -> dict:
        return {}

    def take(self, name, stream, size: int) -> None:
        if size > 1000:
            raise ValueError("too large")
        (self.folder / name).write_bytes(stream.read(size))

    def give(self, name: str) -> Path | None:
        return self.folder / name if (self.folder / name).exists() else None


def test_files_go_over_the_service_and_every_byte_is_counted(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    service = CoordinatorService(shelf, "token", files=shelf)
    try:
        client = HttpClient(service.url, "token")
        client.put_file("a.b-c", b"x" * 700)
        assert 700 < client.sent < 1000
        before = client.received
        assert client.get_file("a.b-c") == b"x" * 700
        assert 700 < client.received - before < 1000
        assert client.get_file("nothing") is None
        assert client.get_file("..") is None
        with pytest.raises(CoordinatorError, match="too large"):
            client.put_file("big", b"x" * 1001)
        with pytest.raises(UserError, match="token"):
            HttpClient(service.url, "wrong").put_file("a", b"")
        with pytest.raises(UserError, match="token"):
            HttpClient(service.url, "wrong").get_file("a.b-c")
    finally:
        service.stop()


def test_whoever_sends_what_is_refused_reads_why(tmp_path: Path) -> None:
    """Also where the body is larger than what sockets hold: it is read to its end."""
    shelf = Shelf(tmp_path)
    service = CoordinatorService(shelf, "token", files=shelf)
    try:
        client = HttpClient(service.url, "token", patience_s=0.0)
        for name, told in (("big", "big: too large"), (".hidden", "there is no such file here")):
            with pytest.raises(CoordinatorError, match=told):
                client.put_file(name, bytes(32 << 20))
        with pytest.raises(UserError, match="token"):
            HttpClient(service.url, "wrong", patience_s=0.0).put_file("big", bytes(32 << 20))
        with pytest.raises(CoordinatorError, match="413"):
            client.call("note", text="x" * (32 << 20))
    finally:
        service.stop()


def take(rounds: Rounds, decision: Decision) -> dict:
    for event in decision.events:
        rounds.apply(event)
    return decision.answer


def test_an_island_that_sends_goes_on_with_the_next_round_and_holds_two_leases_at_most() -> None:
    terms, rounds = Terms(packs=40, islands=1, overlap=True), Rounds()
    take(rounds, say.join(rounds, terms, "a", "s", 0.0))
    first = take(rounds, say.lease(rounds, terms, "a", "s", 4, 0.0))
    ahead = take(rounds, say.lease(rounds, terms, "a", "s", 4, 0.0, sending=first["lease"]))
    assert (first["round"], ahead["round"]) == (0, 1)
    again = take(rounds, say.lease(rounds, terms, "a", "s", 4, 0.0, sending=first["lease"]))
    assert again["lease"] == ahead["lease"], "an answer that was lost changes nothing"
    assert set(rounds.leases) == {first["lease"], ahead["lease"]}
    plain = Terms(packs=40, islands=1)
    assert take(rounds, say.lease(rounds, plain, "a", "s", 4, 0.0, sending=first["lease"]))["lease"] == first["lease"]


def test_a_contribution_that_turns_out_to_be_useless_gives_its_packs_back() -> None:
    terms, rounds = Terms(packs=8, islands=1), Rounds()
    take(rounds, say.join(rounds, terms, "a", "s", 0.0))
    lease = take(rounds, say.lease(rounds, terms, "a", "s", 4, 0.0))["lease"]
    take(rounds, say.contribute(rounds, terms, "a", "s", lease, [[0, 4]], 9, 0.0))
    take(rounds, say.reject(rounds, terms, lease, "its file is gone", 0.0))
    assert rounds.collect() == []
    assert rounds.report(8)["packs_free"] == 8
    assert not take(rounds, say.contribute(rounds, terms, "a", "s", lease, [[0, 4]], 9, 0.0))["accepted"]
    assert say.reject(rounds, terms, lease, "again", 0.0).events == []


def test_where_islands_cannot_be_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """One sentence and exit code 2, before anything is made."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    folder = tmp_path / "run"
    assert launch(load_config(QUICKSTART, ["aggregate.islands=2", f"output_dir={folder}"]), folder) == 2
    assert "aggregate.islands is 2" in capsys.readouterr().err
    with pytest.raises(UserError, match="nothing to coordinate"):
        coordinate(load_config(QUICKSTART, [f"output_dir={folder}"]), folder, "127.0.0.1", None)
    assert not folder.exists()


def test_each_island_gets_gpus_of_its_own_where_there_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(QUICKSTART, ["aggregate.islands=2", "launch.device=auto"])
    monkeypatch.setattr("torch.cuda.device_count", lambda: 5)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert device_slices(config) == ["0,1", "2,3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b,GPU-c,GPU-d,GPU-e")
    assert device_slices(config) == ["GPU-a,GPU-b", "GPU-c,GPU-d"]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    assert device_slices(config) == [None, None], "they share what there is"


def test_islands_on_a_ray_clusters_nodes_reach_the_coordinator() -> None:
    assert listens_at(load_config(QUICKSTART, ["aggregate.islands=2"])) == "127.0.0.1"
    elsewhere = load_config(QUICKSTART, ["aggregate.islands=2", "launch.backend=ray", "launch.address=10.0.0.1:6379"])
    assert listens_at(elsewhere) == "0.0.0.0"


def test_a_name_of_slurms_that_nobody_knows_is_no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    monkeypatch.setattr("socket.gethostbyname", lambda name: "10.0.0.7")
    assert reached_at() == "n1"

    def unknown(name: str) -> str:
        raise socket.gaierror(f"{name} is not known")

    monkeypatch.setattr("socket.gethostbyname", unknown)
    assert reached_at() == socket.gethostname()


def test_an_islands_own_configuration(tmp_path: Path) -> None:
    config = load_config(QUICKSTART, ["aggregate.islands=2", "aggregate.sync_every=7"])
    island = island_config(config, tmp_path, 1)
    assert island.run_dir == tmp_path / "islands" / "1"
    assert (island.aggregate.coordinator, island.aggregate.island) == (str(tmp_path), "1")
    assert not island.aggregate.here
    assert island.aggregate.sync_every == 7
    assert (island.eval.sample_prompts, island_config(config, tmp_path, 0).eval.sample_prompts) == (0, 3)


def a_log() -> list[dict]:
    """Two rounds of one contribution each, over four packs."""

    def round_(number: int, lease: int) -> dict:
        facts = {"before": f"f{number}", "folder": f"f{number + 1}"}
        return {"kind": "round_committed", "round": number, "counted": [{"lease": lease}], "facts": facts}

    return [
        {"kind": "islands_begun", "folder": "f0", "packs": 4},
        {"kind": "contributed", "lease": 1, "trained": [[0, 2]]},
        round_(0, 1),
        {"kind": "contributed", "lease": 2, "trained": [[2, 4]]},
        round_(1, 2),
    ]


def test_what_must_hold_of_a_log_is_seen_where_it_does_not() -> None:
    """The check that the runs with faults end with."""
    assert violations(a_log()) == []
    lost, twice, again, missing = a_log(), a_log(), a_log(), a_log()
    lost[4]["facts"]["before"] = "f0"
    assert "does not follow" in violations(lost)[0]
    twice[4]["counted"] = [{"lease": 1}, {"lease": 2}]
    assert "counted twice" in violations(twice)[0]
    again[3]["trained"] = [[1, 3]]
    assert "a pack is counted twice" in violations(again)[0]
    missing[3]["trained"] = [[2, 3]]
    assert "of 4 packs only" in violations(missing)[0]
    missing.append({"kind": "leases_ended", "dropped": [[3, 4]]})
    assert violations(missing) == []


@pytest.mark.parametrize(("codes", "asked"), [((143, 138), 1), ((143, 1), 1), ((143, None), 0), ((1, 0), 0)])
def test_a_run_whose_last_islands_were_stopped_from_outside_ends(
    codes: tuple, asked: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where others of them have failed for good; else its coordinator would wait for ever."""
    requests: list[Path] = []
    monkeypatch.setattr("qlora_dist.cluster.islands.ask_at_once", lambda run_dir, reason: requests.append(run_dir))
    group = object.__new__(Group)
    group.run_dir, group.forwarded = tmp_path, set()
    group.decisions = SimpleNamespace(run=SimpleNamespace(stop=None, finished=None), catch_up=lambda max_age_s: None)
    group.islands = [Child(str(number), load_config(QUICKSTART), code=code) for number, code in enumerate(codes)]
    group.pass_on_stop()
    assert len(requests) == asked


@pytest.mark.parametrize(
    "gone", [Unreachable("nobody"), UserError("islands-done", coordinator="runs/a", adapter="runs/a/adapter")]
)
def test_an_island_that_is_done_needs_no_coordinator_to_end(gone: Exception) -> None:
    def call(method: str, **arguments: Any) -> None:
        raise UserError("coordinator-token", url="there") if method == "evaluated" and wrong else gone

    client: Any = SimpleNamespace(call=call, sent=0, received=0)
    island, wrong = Island(client, "a", "base", torch.device("cpu"), joined=True), False
    assert not island.evaluated(3, 1.0)
    assert not island.leave("everything is trained")
    wrong = True
    with pytest.raises(UserError, match="token"):
        island.evaluated(3, 1.0)
