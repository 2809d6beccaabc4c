"""Fixtures that all tests share."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
from pathlib import Path

import pytest

from tests.tiny import make_tiny_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random fp32 Llama of 2 layers, hidden size 64, and its tokenizer."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> None:
    """In CI a skipped cluster test is a failure: CI installs what those tests need."""
    skipped = call.excinfo is not None and call.excinfo.errisinstance(pytest.skip.Exception)
    if skipped and "tests/cluster/" in item.nodeid and os.environ.get("QLORA_DIST_NO_CLUSTER_SKIPS"):
        pytest.fail(f"{item.nodeid} was skipped: {call.excinfo.value}", pytrace=False)
