"""`srun qlora-dist doctor` in an allocation of a real Slurm."""

import json
import sys

import pytest

from tests.cluster.doctor_faults import bad
from tests.slurm.cluster import Slurm


@pytest.mark.slow
def test_every_node_of_an_allocation_by_srun(slurm: Slurm, tmp_path):
    doctor = f"{sys.executable} -m qlora_dist.cli doctor --folder {tmp_path}/run --json"
    script = tmp_path / "job.sh"
    script.write_text(f"#!/bin/bash\nsrun --mpi=none {doctor} > {tmp_path}/told.json\n")
    job = slurm.submit("--nodes=2", "--ntasks-per-node=1", f"--output={tmp_path}/out", str(script))
    assert slurm.wait(job, 120)["JobState"] == "COMPLETED", (tmp_path / "out").read_text()
    told = json.loads((tmp_path / "told.json").read_text())
    assert not [name for name in bad(told) if name.startswith("fail")]
    verdicts = {line["check"]: (line["verdict"], line["found"]) for line in told["lines"]}
    assert verdicts["nodes"] == ("ok", "2 node(s), 2 rank(s): n1 and n2")
    assert "seen by all 2 nodes" in verdicts["folder"][1]
    base = 10000 + int(job) % 220 * 100
    assert verdicts["ports"][0] == "ok"
    for number in (base, base + 10, base + 11):
        assert f"{number} (" in verdicts["ports"][1]
