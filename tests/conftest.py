"""Fixtures that all tests share."""

import os

# Threads cost more than they bring on 64 x 64 matrices, and gloo groups share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from tests.tiny import make_tiny_model

Report = TypeVar("Report", pytest.TestReport, pytest.CollectReport)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests and the processes they start leave the person's cache alone, unless a cache is named for them."""
    with pytest.MonkeyPatch.context() as patch:
        if "QLORA_DIST_CACHE" not in os.environ:
            patch.setenv("QLORA_DIST_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random fp32 Llama of 2 layers, hidden size 64, and its tokenizer."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """In CI a skipped cluster test is a failure: CI installs what those tests need."""
    return _no_skip_in_ci((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """The same for a file that is skipped as a whole."""
    return _no_skip_in_ci((yield))


def _no_skip_in_ci(report: Report) -> Report:
    if report.skipped and "tests/cluster/" in report.nodeid and os.environ.get("QLORA_DIST_NO_CLUSTER_SKIPS"):
        report.outcome = "failed"
        report.longrepr = f"{report.nodeid} was skipped, which CI does not allow: {report.longrepr}"
    return report
