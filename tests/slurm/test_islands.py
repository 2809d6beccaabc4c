"""Islands as Slurm jobs of their own, as docs/aggregation.md says: a coordinator without GPUs, and a job an island."""

import json
import sys
from pathlib import Path

import pytest
import yaml

from qlora_dist.coordinate.report import read_status
from tests.cluster.faults import REPOSITORY, wait_until
from tests.distributed.islands import violations
from tests.single import small_config
from tests.slurm.cluster import Slurm
from tests.slurm.test_submit import cli


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_two_islands_and_their_coordinator_as_jobs(slurm: Slurm, tiny_model: Path, tmp_path: Path) -> None:
    """One of the islands is given notice, is requeued by its script, and returns."""
    config = small_config(
        tmp_path / "unused", tiny_model, train={"max_steps": 500}, launch={"device": "cpu"},
        aggregate={"islands": 2, "sync_every": 2, "method": "mean"}, track={"tensorboard": False},
        checkpoint={"save_steps": 1000},
    )  # fmt: skip
    path, outer = tmp_path / "islands.yaml", tmp_path / "outer"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True)))
    outer.mkdir()
    command = f"{sys.executable} -m qlora_dist.cli coordinate {path} output_dir={outer} --host 0.0.0.0"
    out = f"--output={tmp_path}/out-%x.txt"
    coordinator = slurm.submit("--job-name=coordinator", "--cpus-per-task=1", out, f"--wrap=exec {command}")
    jobs = {}
    for name in ("east", "west"):
        own = [f"output_dir={tmp_path / name}", f"aggregate.coordinator={outer}", f"aggregate.island={name}"]
        done = cli("submit", "slurm", str(path), "--print", *own)
        script = tmp_path / f"{name}.sh"
        script.write_text(done.stdout)
        jobs[name] = slurm.submit(
            f"--job-name={name}", out, str(script), LAUNCHER="torchrun", QLORA_DIST_HOME=str(REPOSITORY),
            QLORA_DIST_LOGS=str(tmp_path / "logs"), QLORA_DIST_SCRATCH=str(slurm.folder),
        )  # fmt: skip

    def rounds() -> int:
        return ((read_status(outer)["rounds"] or {}).get("round", 0)) if (outer / "run.json").exists() else 0

    said = {name: tmp_path / f"out-{name}.txt" for name in ("coordinator", *jobs)}
    wait_until(lambda: rounds() >= 3, 120)
    slurm.command("scancel", "--batch", "--signal=USR1", jobs["west"])
    wait_until(lambda: slurm.release(jobs["west"])["Restarts"] == "1", 60)
    codes = {
        name: slurm.wait(job)["ExitCode"]
        for name, job in [*sorted(jobs.items(), reverse=True), ("coordinator", coordinator)]
    }
    output = "\n".join(f"{name}: {file.read_text()}" for name, file in said.items())
    assert codes == {"east": "0:0", "west": "0:0", "coordinator": "0:0"}, output
    assert "requeued" in said["west"].read_text()
    status = read_status(outer)
    assert (status["state"], status["rounds"]["packs_trained"]) == ("finished", 500 * 2 * config.global_batch_size)
    assert (outer / "adapter" / "adapter_model.safetensors").exists()
    assert violations(_events(outer)) == []
    joined = [event["island"] for event in _events(outer) if event["kind"] == "island_joined"]
    assert sorted(joined) == ["east", "west", "west"]


def _events(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
