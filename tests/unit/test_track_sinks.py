"""Sinks: after restarts each metric and step once in TensorBoard's files and in W&B's, as read back from them."""

import json
import multiprocessing
import os
import shutil
import signal
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboardX.proto.event_pb2 import Event
from wandb.proto.wandb_internal_pb2 import Record as WandbRecord

from qlora_dist.config.schema import RunConfig
from qlora_dist.coordinate.rundir import open_run
from qlora_dist.track import sinks as sinks_module
from qlora_dist.track.attempt import open_metrics
from qlora_dist.track.metrics import MetricsLog, read_metrics
from qlora_dist.track.sinks import SinkThread, join_steps, scalars
from qlora_dist.track.wandb import choose_mode
from qlora_dist.train.loop import Loop
from tests.single import small_config, train_here

Values = Counter[tuple[str, int, float]]


def tensorboard_values(run_dir: Path) -> Values:
    """(tag, step, value) of every scalar in every event file, by TFRecord framing: length, crc, event, crc."""
    found: Values = Counter()
    for path in sorted((run_dir / "tensorboard").rglob("events.out.tfevents.*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + length])
            at += 16 + length
            found.update((v.tag, event.step, v.simple_value) for v in event.summary.value)
    return found


def wandb_records(run_dir: Path) -> Iterator[WandbRecord]:
    """The records of every offline folder: LevelDB's log format, 32 KiB blocks of (crc, length, type, bytes)."""
    for path in sorted((run_dir / "wandb").glob("offline-run-*/run-*.wandb")):
        data, at, parts = path.read_bytes(), 7, b""
        while at + 7 <= len(data):
            left = 32768 - at % 32768
            if left < 7:
                at += left
                continue
            length, kind = struct.unpack_from("<HB", data, at + 4)
            if kind == 0:
                break
            parts += data[at + 7 : at + 7 + length]
            at += 7 + length
            if kind in (1, 4):
                yield WandbRecord.FromString(parts)
                parts = b""


def wandb_values(run_dir: Path) -> Values:
    found: Values = Counter()
    for record in wandb_records(run_dir):
        if record.WhichOneof("record_type") == "history":
            items = {(i.key or ".".join(i.nested_key)): json.loads(i.value_json) for i in record.history.item}
            step = items.pop("_step", record.history.step.num)
            found.update((k, step, v) for k, v in items.items() if not k.startswith("_"))
    return found


def logged(run_dir: Path) -> Values:
    return Counter((k, r["step"], v) for r in read_metrics(run_dir) for k, v in scalars(r).items())


def charted(run_dir: Path) -> Values:
    """The same with what W&B gets beside: how many restarts there were up to each step."""
    attempts = {record["step"]: record["attempt"] for record in read_metrics(run_dir)}
    return logged(run_dir) + Counter(("restarts", step, attempt - 1) for step, attempt in attempts.items())


def in_single_precision(values: Values, name: Callable[[str], str] = lambda name: name) -> Values:
    return Counter({(name(k), s, struct.unpack("f", struct.pack("f", v))[0]): n for (k, s, v), n in values.items()})


def tensorboard_tag(name: str) -> str:
    return f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"


@pytest.fixture(autouse=True)
def _no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


def tracked(run_dir: Path, model: Path, **sections: Any) -> RunConfig:
    held_out = {"eval": "bundled:home_commands", "max_eval_rows": 4}
    return small_config(run_dir, model, data=held_out, eval={"eval_steps": 3}, track={"wandb": "auto"}, **sections)


def train_and_die(config: RunConfig, last_step: int) -> None:
    """In a process of its own: be killed after `last_step`, when the sinks have steps that the next attempt repeats."""
    take_step = Loop.take_step

    def deadly(self: Loop) -> None:
        take_step(self)
        if self.progress.step == last_step:
            self.log()
            assert self.writer is not None
            while max((step for _, step, _ in tensorboard_values(config.run_dir)), default=-1) < last_step - 1:
                time.sleep(0.1)
            # A disk that is busy with something else may take longer than two steps.
            while (self.writer.poll() or (0,))[0] < last_step - last_step % 3:
                time.sleep(0.1)
            os.kill(os.getpid(), signal.SIGKILL)

    Loop.take_step = deadly  # type: ignore[method-assign]
    train_here(config)


def test_after_two_restarts_every_metric_and_step_once(tiny_model: Path, tmp_path: Path) -> None:
    """Two attempts are killed at steps 5 and 8 of 9, past checkpoints 3 and 6; a third ends the run."""
    run_dir = tmp_path / "run"
    config = tracked(run_dir, tiny_model, train={"max_steps": 9}, checkpoint={"save_steps": 3, "keep_best": 0})
    for step in (5, 8):
        process = multiprocessing.get_context("spawn").Process(target=train_and_die, args=(config, step))
        process.start()
        process.join(120)
        assert process.exitcode == -signal.SIGKILL
        assert max(record["step"] for record in read_metrics(run_dir)) == step
    assert train_here(config)["state"] == "finished"
    resumed = [e["step"] for e in map(json.loads, (run_dir / "events.jsonl").open()) if e["kind"] == "resumed"]
    assert resumed == [3, 6]
    attempts = {record["attempt"] for record in read_metrics(run_dir)}
    assert attempts == {1, 2, 3}

    expected = logged(run_dir)
    steps = {(k, s) for k, s, _ in expected}
    assert len(steps) == sum(expected.values())
    assert {s for k, s in steps if k == "loss"} == set(range(1, 10))
    assert {s for k, s in steps if k == "eval_loss"} == {0, 3, 6, 9}
    assert in_single_precision(expected, tensorboard_tag) == in_single_precision(tensorboard_values(run_dir))
    assert wandb_values(run_dir) == charted(run_dir)
    restarts = {step: value for name, step, value in wandb_values(run_dir) if name == "restarts"}
    assert [restarts[step] for step in (3, 4, 6, 7, 9)] == [0, 1, 1, 2, 2]


def test_wandb_gets_config_adapter_and_one_run_id(tiny_model: Path, tmp_path: Path) -> None:
    config = tracked(tmp_path / "run", tiny_model, train={"max_steps": 2})
    train_here(config)
    records = list(wandb_records(config.run_dir))
    (run,) = [r.run for r in records if r.WhichOneof("record_type") == "run"]
    assert run.run_id == json.loads((config.run_dir / "run.json").read_text())["run_id"]
    assert (run.project, run.display_name) == ("qlora-dist", "qlora")
    sent = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert sent["train"]["learning_rate"] == config.train.learning_rate
    artifacts = [r.request.log_artifact.artifact if r.HasField("request") else r.artifact for r in records
                 if r.WhichOneof("record_type") in ("artifact", "request")]  # fmt: skip
    names = {entry.path for artifact in artifacts for entry in artifact.manifest.contents}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names


class Broken:
    def __init__(self, when: str):
        self.when = when
        if when == "open":
            raise ConnectionError("no route to https://user:planted-secret@host")

    def write(self, row: Any) -> None:
        if self.when == "write":
            raise OSError("disk full")
        if self.when == "hang":
            time.sleep(60)

    def close(self, adapter: Path | None) -> None:
        if self.when == "close":
            raise TimeoutError("slow")


@pytest.mark.parametrize("when", ["open", "write", "close", "hang"])
def test_a_sink_that_fails_or_hangs_is_told_once_and_stops_nothing(
    when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sinks_module, "CLOSE_TIMEOUT_S", 1.0)
    told: list[str] = []
    log = MetricsLog(tmp_path, 1, 0, [SinkThread("It", lambda: Broken(when), told.append)])
    started = time.monotonic()
    for step in range(200):
        log.write(step, loss=1.0)
    assert time.monotonic() - started < 1.0
    log.close()
    assert time.monotonic() - started < 3.0
    assert len(read_metrics(tmp_path)) == 200
    (sentence,) = told
    assert sentence.startswith("It ")
    assert "planted" not in sentence


def test_without_network_an_online_run_becomes_an_offline_folder(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key, and a server that refuses connections."""
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr("qlora_dist.track.wandb.INIT_TIMEOUT_S", 3.0)
    config = tracked(tmp_path / "run", tiny_model, train={"max_steps": 3})
    started = time.monotonic()
    assert train_here(config)["state"] == "finished"
    assert time.monotonic() - started < 45
    assert wandb_values(config.run_dir) == charted(config.run_dir)
    events = [json.loads(line) for line in (config.run_dir / "events.jsonl").read_text().splitlines()]
    assert sum("W&B cannot be reached" in event.get("message", "") for event in events) == 1


def test_online_needs_a_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert [choose_mode(wanted) for wanted in ("auto", "online", "offline")] == ["offline"] * 3
    (tmp_path / "no-netrc").write_text("machine api.wandb.ai login user password 0123\n")
    assert [choose_mode(wanted) for wanted in ("auto", "online", "offline")] == ["online", "online", "offline"]
    monkeypatch.setenv("WANDB_BASE_URL", "https://elsewhere.org")
    assert choose_mode("auto") == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert choose_mode("auto") == "online"


def test_wandb_s_own_variable_turns_it_off_or_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "x")
    expected = {"online": "online", "offline": "offline", "dryrun": "offline", "disabled": "off"}
    for variable, mode in expected.items():
        monkeypatch.setenv("WANDB_MODE", variable)
        assert [choose_mode(wanted) for wanted in ("auto", "online", "off")] == [mode, mode, "off"]
    # What a run makes of it.
    run = tmp_path / "run"
    open_run(run, "name: x\n")
    config = tracked(run, tmp_path)
    said: list[str] = []
    open_metrics(config, run, 1, 0, said.append).close()
    assert said == ["WANDB_MODE=disabled, so W&B gets nothing"]
    assert not (run / "wandb").exists()


def test_records_of_one_step_become_one_row() -> None:
    records = [{"step": 0, "a": 1}, {"step": 1, "a": 2}, {"step": 1, "b": 3}, {"step": 2, "a": None}]
    assert list(join_steps(records)) == [{"step": 0, "a": 1}, {"step": 1, "a": 2, "b": 3}, {"step": 2, "a": None}]
    assert scalars({"step": 1, "time": 2, "attempt": 3, "a": None, "b": 4}) == {"b": 4}


def test_a_run_folder_that_was_copied_starts_its_sinks_anew(tiny_model: Path, tmp_path: Path) -> None:
    """Event files of a copy hold the same values once, though the folder had some already."""
    config = tracked(tmp_path / "run", tiny_model, train={"max_steps": 2, "lr_scheduler_type": "constant"})
    train_here(config)
    shutil.copytree(config.run_dir, tmp_path / "copy")
    longer = tracked(tmp_path / "copy", tiny_model, train={"max_steps": 4, "lr_scheduler_type": "constant"})
    train_here(longer)
    assert wandb_values(longer.run_dir) == charted(longer.run_dir)
    assert set(tensorboard_values(longer.run_dir).values()) == {1}
