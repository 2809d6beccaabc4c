"""`qlora-dist doctor`: the run folder, where it may not be read and where a rank is killed in it."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch.distributed import HashStore

from qlora_dist.cluster.doctor import start
from qlora_dist.cluster.doctor.folder import folder_facts
from qlora_dist.cluster.doctor.machine import _exists, existing, places
from qlora_dist.cluster.doctor.meeting import Meeting
from qlora_dist.cluster.doctor.outside import plain
from qlora_dist.cluster.doctor.wanted import Wanted
from tests.unit.doctor_facts import Facts


@pytest.fixture
def closed() -> Iterator[Path]:
    """A folder that this user may not read; root, who may read all, becomes another user meanwhile."""
    # Not tmp_path: nobody else may enter what it lies in.
    folder, root = Path(tempfile.mkdtemp(prefix="qd")), os.geteuid() == 0
    folder.chmod(0)
    if root:
        os.seteuid(65534)
    yield folder
    if root:
        os.seteuid(0)
    folder.rmdir()


def alone() -> Meeting:
    return Meeting(HashStore(), 0, [0], 5.0)


def test_a_folder_that_may_not_be_read_is_a_finding(closed: Path) -> None:
    run_dir = closed / "deep" / "run"
    assert existing(run_dir) == closed
    assert "Permission denied" in folder_facts(run_dir, alone(), lambda _: None)["error"]
    # What would lose all other facts of the machine.
    assert places(Wanted(str(run_dir)))["run folder"] == closed
    assert not _exists(f"{run_dir}/rows.jsonl")
    with pytest.raises(PermissionError) as refused:
        os.listdir(closed)
    assert plain(refused.value) == f"Permission denied: {closed}"


def test_a_folder_is_told_of_before_it_is_made_and_goes_after(tmp_path: Path) -> None:
    told: list[tuple[Facts, bool]] = []

    def tell(facts: Facts) -> None:
        told.append((facts, Path(facts["probe"]).exists()))

    assert folder_facts(tmp_path / "run", alone(), tell)["turns"] == [0, 1, 2, 3, 4]
    ((facts, there),) = told
    assert Path(facts["probe"]).parent == tmp_path
    assert not there
    assert not list(tmp_path.iterdir())


# Stands in the place of Python, whose imports take seconds.
DIES = """#!/bin/sh
cat > /dev/null
echo '{"begun": "folder"}'
echo '{"probe": "/shared/.doctor-1"}'
echo '{"folder": {}, "begun": "STAGE"}'
kill -9 $$
"""


@pytest.mark.parametrize(
    ("stage", "left"), [("folder", "; it leaves /shared/.doctor-1 there, to be removed"), ("gloo", "")]
)
def test_a_rank_that_dies_in_the_folder_names_what_it_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, left: str
) -> None:
    program = tmp_path / "python"
    program.write_text(DIES.replace("STAGE", stage))
    program.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(program))
    settings = start.settings_of(Wanted("/shared/run"), 5.0, 0, 1, 0, "a", ("127.0.0.1", 1), spread=False)
    (facts,) = start.run_ranks([settings])
    assert (facts["stuck"], facts["why"]) == (stage, f"it died of SIGKILL{left}")
    assert "probe" not in facts
