"""An island meets its coordinator: nobody there, a wrong address, a stop meanwhile."""

import socket
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qlora_dist.cluster.launch import launch
from qlora_dist.config.errors import UserError
from qlora_dist.config.load import load_config, to_yaml
from qlora_dist.config.schema import RunConfig
from qlora_dist.coordinate.outer_address import keep_token
from qlora_dist.coordinate.rundir import open_run
from qlora_dist.coordinate.stop import ask_at_once
from qlora_dist.train import island_meeting, island_waiting
from qlora_dist.train.island import Island
from qlora_dist.train.island_meeting import meet_islands

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


def test_an_address_that_is_none_leaves_no_run_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    island = [f"aggregate.coordinator={tmp_path / 'nowhere'}", "aggregate.island=east"]
    config = load_config(QUICKSTART, [*island, f"output_dir={tmp_path / 'run'}"])
    assert launch(config, config.run_dir) == 2
    assert "no run folder of a coordinator" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.fixture
def nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[RunConfig, Any]:
    """An island whose coordinator does not answer, and its worker."""
    monkeypatch.setattr(island_waiting, "MEET_S", 0.05)
    monkeypatch.setattr(island_meeting, "TELL_S", 0.1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    island = [f"aggregate.coordinator=127.0.0.1:{port}", "aggregate.island=east", "aggregate.round_deadline_s=0.5"]
    config = load_config(QUICKSTART, [*island, f"output_dir={tmp_path / 'run'}"])
    open_run(config.run_dir, to_yaml(config))
    keep_token("secret", config.run_dir)
    return config, SimpleNamespace(rank=0, run_dir=config.run_dir, device=torch.device("cpu"))


def test_nobody_at_the_address_is_said_soon_and_ends_in_a_sentence(
    nobody: tuple[RunConfig, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(island_meeting, "PATIENCE_S", 0.5)
    (config, worker), said = nobody, []
    with pytest.raises(UserError, match=r"aggregate.coordinator leads nowhere: .*refused; give the address"):
        meet_islands(config, worker, {"model.name": "f"}, {}, lambda value: value, said.append)
    assert len(said) == 1
    assert "has not answered yet" in said[0]


def test_an_island_that_is_to_stop_does_not_wait_for_a_coordinator_that_nobody_has_started(
    nobody: tuple[RunConfig, Any],
) -> None:
    config, worker = nobody
    ask_at_once(config.run_dir, "SIGTERM")
    began = time.monotonic()
    met = meet_islands(config, worker, {"model.name": "f"}, {}, lambda value: value, print)
    assert time.monotonic() - began < 10
    assert met.island is not None
    assert met.aggregate == config.aggregate


def test_a_setting_that_the_coordinator_has_otherwise_is_named(
    nobody: tuple[RunConfig, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (config, worker), said = nobody, []
    theirs = config.aggregate.model_dump() | {"sync_every": 7, "method": "svd"}
    monkeypatch.setattr(Island, "hello", lambda self, identity: {"settings": theirs})
    own = config.model_copy(update={"aggregate": config.aggregate.model_copy(update={"sync_every": 9})})
    met = meet_islands(own, worker, {"model.name": "f"}, {}, lambda value: value, said.append)
    assert (met.aggregate.sync_every, met.aggregate.method) == (7, "svd")
    assert said == ["aggregate.sync_every is 7, as the coordinator has it, not 9"], "what is left at its default is not"
