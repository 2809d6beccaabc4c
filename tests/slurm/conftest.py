"""The suite's own Slurm, started once."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Slurm, slurm_works


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    """Two nodes, n1 and n2, on this host."""
    if not slurm_works():
        pytest.skip("needs root, slurm-wlm and munge")
    # Not tmp_path: munge's socket lies in it, whose path may have 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="qs"))
    made = Slurm(folder)
    try:
        made.start()
        yield made
    finally:
        made.close()
        shutil.rmtree(folder, ignore_errors=True)
