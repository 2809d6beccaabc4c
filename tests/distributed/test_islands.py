"""Two islands train what a plain replay of their rounds trains, and faults cost neither a round nor a pack.

The replay is stock transformers and PEFT with torch's AdamW, one model an island, and the outer step's formulas in
float64. It takes from the log which packs each island had. fp32 sums in other orders differ by 1e-7 relative; over 8
steps of AdamW that stays below 1e-4 of what training has changed.
"""

import json
import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import AutoModelForCausalLM, get_scheduler

from qlora_dist.aggregate.exchange import Header, encode
from qlora_dist.coordinate.outer_address import outer_address
from qlora_dist.coordinate.report import read_status
from qlora_dist.coordinate.stop import ask_at_once
from tests.distributed import islands as faults
from tests.distributed.islands import Event, Islands, violations
from tests.distributed.test_same_training import examples_of, first_adapter, rows

__all__ = ["first_adapter"]
BATCH, SYNC, STEPS, RATE = 3, 2, 8, 1e-3
MOMENTUM = 0.9


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    return path


def a_run(folder: Path, base: Path, data: Path, adapter: Path | None = None, **aggregate: object) -> Islands:
    return Islands(
        folder, base, aggregate=aggregate,
        model={"quantization": "none"},
        run={"adapter": {"path": adapter} if adapter else {"r": 4, "lora_alpha": 8}},
        data={"train": str(data), "shuffle": False, "max_rows": None},
        train={
            "max_steps": STEPS, "global_batch_size": BATCH, "per_device_train_batch_size": 2, "learning_rate": RATE,
            "lr_scheduler_type": "linear", "warmup_steps": 2, "optim": "adamw_torch", "max_grad_norm": 0.5,
        },
    )  # fmt: skip


def run_through(run: Islands) -> dict:
    """Everybody from start to end."""
    with run:
        for name in ("coordinator", "a", "b"):
            run.start(name)
        summary = run.finish()
    assert violations(run.events()) == []
    return summary


def replay(base: Path, adapter: Path, events: list[Event], method: str) -> dict[str, torch.Tensor]:
    """The final adapter, float64."""
    examples = examples_of(base)
    models, optimizers = {}, {}
    factor = get_scheduler("linear", torch.optim.SGD([torch.zeros(1)], lr=1.0), 2, STEPS).lr_lambdas[0]
    for name in "ab":
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        models[name] = PeftModel.from_pretrained(plain, adapter, is_trainable=True).train()
        trained = [p for p in models[name].parameters() if p.requires_grad]
        optimizers[name] = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    shared = {n: t.double() for n, t in get_peft_model_state_dict(models["a"]).items()}
    momentum = {n: torch.zeros_like(t) for n, t in shared.items()}
    leases = {e["lease"]: e for e in events if e["kind"] == "leased"}
    for event in (e for e in events if e["kind"] == "round_committed"):
        mean = {n: torch.zeros_like(t) for n, t in shared.items()}
        tokens_of = {entry["lease"]: entry["tokens"] for entry in event["counted"]}
        for lease, tokens in tokens_of.items():
            name, start, end = leases[lease]["island"], *leases[lease]["pieces"][0][:2]
            model, optimizer = models[name], optimizers[name]
            set_peft_model_state_dict(model, {n: t.float() for n, t in shared.items()})
            for step, first in enumerate(range(start, end, BATCH)):
                batch = [examples[pack % len(examples)] for pack in range(first, min(end, first + BATCH))]
                bear_loss = sum(int((labels[:, 1:] != -100).sum()) for _, labels in batch)
                for ids, labels in batch:
                    logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
                    loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
                    (loss / bear_loss).backward()
                trained = [p for p in model.parameters() if p.requires_grad]
                torch.nn.utils.clip_grad_norm_(trained, 0.5)
                for group in optimizer.param_groups:
                    group["lr"] = RATE * factor(event["round"] * SYNC + step)
                optimizer.step()
                optimizer.zero_grad()
            now = get_peft_model_state_dict(model)
            for n in mean:
                mean[n] += tokens / sum(tokens_of.values()) * (now[n].double() - shared[n])
        for n, change in mean.items():
            if method == "diloco":
                momentum[n] = MOMENTUM * momentum[n] - change
                change = -0.7 * (-change + MOMENTUM * momentum[n])
            shared[n] = shared[n] + change
    return shared


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("method", "strategy"),
    [
        ("diloco", "ddp"),
        pytest.param("mean", "none", marks=SLOW),
        pytest.param("diloco", "fsdp", marks=SLOW),
        pytest.param("mean", "zero2", marks=SLOW),
        pytest.param("diloco", "zero3", marks=SLOW),
    ],
)
def test_two_islands_train_what_a_replay_of_their_rounds_trains(
    method: str, strategy: str, tiny_model: Path, first_adapter: Path, data: Path, tmp_path: Path
) -> None:
    """The first island is of two workers where the strategy is one for several."""
    aggregate = {"method": method, "sync_every": SYNC, "outer_momentum": MOMENTUM}
    with a_run(tmp_path, tiny_model, data, first_adapter, **aggregate) as run:
        run.start("coordinator")
        run.start("a", workers=1 if strategy == "none" else 2, shard={"strategy": strategy})
        run.start("b")
        summary = run.finish()
    assert violations(run.events()) == []
    assert (summary["rounds"], summary["steps"], summary["complete"]) == (STEPS // SYNC, 2 * STEPS, True)
    assert summary["packs_trained"] == 2 * STEPS * BATCH
    events = run.events()
    assert all(len(e["counted"]) == 2 and e["why"] == "everyone" for e in events if e["kind"] == "round_committed")
    expected = replay(tiny_model, first_adapter, events, method)
    final = safetensors.torch.load_file(run.run_dir / "adapter" / "adapter_model.safetensors")
    start = safetensors.torch.load_file(first_adapter / "adapter_model.safetensors")
    assert final.keys() == expected.keys() == start.keys()
    apart = sum(float((final[n].double() - expected[n]).square().sum()) for n in final) ** 0.5
    moved = sum(float((start[n].double() - expected[n]).square().sum()) for n in final) ** 0.5
    assert apart < 1e-4 * moved


def test_a_compressed_overlapped_run_trains_every_pack_once(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    run = a_run(tmp_path, tiny_model, data, sync_every=SYNC, exchange_bits=4, overlap=True, method="diloco")
    summary = run_through(run)
    assert summary["packs_trained"] == 2 * STEPS * BATCH
    losses = [event["facts"]["metrics"]["loss"] for event in run.events("round_committed")]
    assert losses[-1] < losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"method": "svd"}, {"freeze": "A", "exchange_bits": 8}, {"robust": "median"}])
def test_the_other_settings(settings: dict, tiny_model: Path, data: Path, tmp_path: Path) -> None:
    run = a_run(tmp_path, tiny_model, data, sync_every=SYNC, **settings)
    assert run_through(run)["packs_trained"] == 2 * STEPS * BATCH
    begun = run.events("islands_begun")[0]
    start = safetensors.torch.load_file(run.run_dir / "islands" / "a" / "adapter" / "adapter_model.safetensors")
    final = safetensors.torch.load_file(run.run_dir / "adapter" / "adapter_model.safetensors")
    assert start.keys() == final.keys()
    if settings.get("freeze") == "A":
        assert begun["parameters"] == sum(t.numel() for n, t in final.items() if "lora_B" in n)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero2", "zero3", "fsdp"])
@pytest.mark.parametrize(
    "settings", [{"method": "svd"}, {"freeze": "A", "exchange_bits": 8}, {"exchange_bits": 4, "overlap": True}]
)
def test_the_other_settings_where_the_adapter_is_in_shards(
    settings: dict, strategy: str, tiny_model: Path, data: Path, tmp_path: Path
) -> None:
    """Two workers an island; what they load, reset and hand out is whole."""
    with a_run(tmp_path, tiny_model, data, sync_every=SYNC, **settings) as run:
        run.start("coordinator")
        for name in "ab":
            run.start(name, workers=2, shard={"strategy": strategy})
        summary = run.finish()
    assert violations(run.events()) == []
    assert summary["packs_trained"] == 2 * STEPS * BATCH
    losses = [event["facts"]["metrics"]["loss"] for event in run.events("round_committed")]
    assert losses[-1] < losses[0]
    theirs = [run.run_dir / "islands" / name / "adapter" / "adapter_model.safetensors" for name in "ab"]
    final = safetensors.torch.load_file(run.run_dir / "adapter" / "adapter_model.safetensors")
    for own in map(safetensors.torch.load_file, theirs):
        assert own.keys() == final.keys()
        if settings.get("exchange_bits", 32) == 32:
            assert all(torch.equal(own[name], final[name]) for name in final)


def test_a_killed_island_comes_back_and_nothing_is_lost(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    with a_run(tmp_path, tiny_model, data, round_deadline_s=60) as run:
        run.start("coordinator")
        run.start("a")
        run.start("b", faults.killed)
        run.wait_killed("b")
        run.start("b")
        summary = run.finish()
    assert violations(run.events()) == []
    assert summary["packs_trained"] == 2 * STEPS * BATCH
    joined = [event for event in run.events("island_joined") if event["island"] == "b"]
    assert len(joined) == 2
    assert joined[1]["ended"], "its lease goes back when it comes back"


def test_an_island_paused_beyond_the_deadline_is_late_and_counted_less(
    tiny_model: Path, data: Path, tmp_path: Path
) -> None:
    # How many rounds the other one trains before this one wakes is the machine's business: none is too many.
    with a_run(tmp_path, tiny_model, data, round_deadline_s=3, late_rounds=99) as run:
        run.start("coordinator")
        run.start("a")
        run.start("b", faults.paused)

        def without_b() -> bool:
            return any(
                event["why"] == "deadline" and event["missed"] == ["b"] for event in run.events("round_committed")
            )

        run.wait("a round without it", without_b)
        pid = run.processes["b"].pid
        assert pid is not None
        os.kill(pid, signal.SIGCONT)
        summary = run.finish()
    assert violations(run.events()) == []
    assert summary["packs_trained"] == 2 * STEPS * BATCH
    rounds = run.events("round_committed")
    late = [entry for event in rounds for entry in event["counted"] if entry["late"]]
    assert [(entry["island"], entry["scale"]) for entry in late] == [("b", 0.5 ** late[0]["late"])]
    assert [event["why"] for event in rounds].count("deadline") == 1, "nobody waits for who waits"


def test_what_must_not_count_is_refused_and_named_and_its_packs_are_trained(
    tiny_model: Path, data: Path, tmp_path: Path
) -> None:
    with a_run(tmp_path, tiny_model, data) as run:
        run.start("coordinator")
        run.start("a", faults.sends_nan)
        run.start("b", faults.of_another_base)
        summary = run.finish()
    assert violations(run.events()) == []
    assert summary["packs_trained"] == 2 * STEPS * BATCH
    reasons = {event["island"]: event["reason"] for event in run.events("contribution_refused")}
    assert "not finite" in reasons["a"]
    assert "base model is another" in reasons["b"]


@pytest.mark.parametrize(
    "fault", [faults.dies_before_the_commit, pytest.param(faults.dies_after_the_commit, marks=SLOW)]
)
def test_a_coordinator_killed_at_a_commit_goes_on_exactly(
    fault: faults.Fault, tiny_model: Path, data: Path, tmp_path: Path
) -> None:
    with a_run(tmp_path, tiny_model, data, method="diloco") as run:
        run.start("coordinator", fault)
        run.start("a")
        run.start("b")
        run.wait_killed("coordinator")
        killed = (run.run_dir / "killed").read_text().split()
        run.start("coordinator")
        summary = run.finish()
    assert violations(run.events()) == []
    assert (summary["rounds"], summary["packs_trained"]) == (STEPS // SYNC, 2 * STEPS * BATCH)
    if killed:
        sha256, folder = killed
        again = run.events("round_committed")[1]["facts"]
        assert again["sha256"] == sha256, "the same contributions give the same adapter, bit for bit"
        assert again["folder"] != folder, "what no event had named does not count"
    steps = [json.loads(line) for line in (run.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in steps if "round" in record] == [1, 2, 3, 4]


@SLOW
def test_an_island_of_two_workers_outlives_a_coordinator_that_is_away_longer_than_collectives_wait(
    tiny_model: Path, data: Path, tmp_path: Path
) -> None:
    with a_run(tmp_path, tiny_model, data) as run:
        run.start("coordinator", faults.dies_after_the_commit)
        run.start("a", workers=2, shard={"strategy": "ddp"}, launch={"collective_timeout_s": 8.0})
        run.start("b")
        run.wait_killed("coordinator")
        time.sleep(16)
        run.start("coordinator")
        summary = run.finish()
    assert violations(run.events()) == []
    assert summary["packs_trained"] == 2 * STEPS * BATCH
    assert len(run.events("island_joined")) == 2


@SLOW
def test_an_island_stops_with_a_checkpoint_while_its_coordinator_is_gone(
    tiny_model: Path, data: Path, tmp_path: Path
) -> None:
    with a_run(tmp_path, tiny_model, data) as run:
        run.start("coordinator", faults.dies_after_the_commit)
        run.start("a", faults.has_little_time)
        run.start("b")
        run.wait_killed("coordinator")
        folder = run.run_dir / "islands" / "a"
        ask_at_once(folder, "a test")
        began = time.monotonic()
        run.processes["a"].join(60)
        assert time.monotonic() - began < 20
    status = read_status(folder)
    assert (status["state"], status["last_checkpoint"]["step"]) == ("stopped", status["step"])
    assert status["step"] >= 2 * SYNC


def test_an_island_over_other_data_is_told_so(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    with a_run(tmp_path, tiny_model, data) as run:
        run.start("coordinator")
        run.start("a")
        run.wait("the start", lambda: bool(run.events("islands_begun")))
        run.start("b", data={"max_rows": 5})
        run.processes["b"].join(120)
        told = [json.loads(x) for x in (run.run_dir / "islands" / "b" / "events.jsonl").read_text().splitlines()]
    assert any("another data.train" in event.get("message", "") for event in told if event["kind"] == "failed")


def test_a_wrong_message_is_refused_without_harm(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    """Somebody with the token who sends nonsense, a lease that is not theirs, or a file that never came."""
    from qlora_dist.coordinate.client import HttpClient

    with a_run(tmp_path, tiny_model, data) as run:
        run.config.launch.start_timeout_s = 1
        run.start("coordinator")
        run.start("a", partial(faults.paused, 1))
        run.wait("a lease", lambda: bool(run.events("leased")))
        client = HttpClient(*outer_address(str(run.run_dir), run.run_dir))
        rest = {"lease": 1, "trained": [[0, 6]], "tokens": 5, "told": {}}
        never = client.call("contribute", island="a", session="x", file="never-came", **rest)
        assert never["missing"]
        client.put_file("nonsense", b"nothing of use")
        answer = client.call("contribute", island="a", session="x", file="nonsense", **rest)
        assert not answer["accepted"]
        assert "another process speaks" in answer["reason"]
        wrong = encode({"x": torch.zeros(2)}, Header("change", "a", 0, 1, 4, "0" * 64), 32)
        client.put_file("wrong", wrong)
        assert not client.call("contribute", island="a", session="x", file="wrong", **rest)["accepted"]
        assert client.get_file("whole-99") is None
        pid = run.processes["a"].pid
        assert pid is not None
        os.kill(pid, signal.SIGCONT)
        run.finish()
    assert violations(run.events()) == []
