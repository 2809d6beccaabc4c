"""Metrics for Prometheus: scraped over HTTP from a real run, and from a coordinator whose ranks are made up."""

import socket
import threading
import time
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from qlora_dist.cluster.launch import launch
from qlora_dist.coordinate.log import EventLog
from qlora_dist.coordinate.rundir import EVENTS_FILE, open_run, read_run
from qlora_dist.coordinate.state import Coordinator
from qlora_dist.track.prometheus import serving
from tests.single import small_config

Samples = dict[tuple[str, ...], float]


def free_port() -> int:
    with socket.create_server(("", 0)) as probe:
        return int(probe.getsockname()[1])


def scrape(port: int) -> Samples:
    """(name, label value, ...) -> value, labels in the order of their names, without the run's."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    samples: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = [value for name, value in sorted(sample.labels.items()) if name != "run"]
            samples[(sample.name.removeprefix("qlora_dist_"), *labels)] = sample.value
    return samples


def test_a_real_run_is_scraped_while_it_trains(tiny_model: Path, tmp_path: Path) -> None:
    port, seen, over = free_port(), [], threading.Event()
    config = small_config(
        tmp_path, tiny_model, train={"max_steps": 40}, checkpoint={"save_steps": 10},
        track={"prometheus_port": port, "tensorboard": False, "report": False},
    )  # fmt: skip

    def look() -> None:
        while not over.is_set():
            try:
                seen.append(scrape(port))
            except OSError:
                time.sleep(0.02)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        assert launch(config, tmp_path) == 0
    finally:
        over.set()
        thread.join()
    last = seen[-1]
    host = socket.gethostname()
    assert last[("checkpoints_committed_total",)] == 4
    assert last[("last_committed_step",)] == 40
    assert last[("restarts_total",)] == last[("stragglers",)] == 0
    assert last[("rank_memory_bytes", host, "0")] > 1e6
    assert last[("rank_seconds_since_heartbeat", host, "0")] < 60
    told = [one for one in seen if ("tokens_per_second",) in one]
    assert told, "the heartbeat has told of the speed while it ran"
    assert told[-1][("tokens_per_second",)] == told[-1][("rank_tokens_per_second", host, "0")] > 0
    assert 0 < told[-1][("step",)] <= told[-1][("max_steps",)] == 40
    assert told[-1][("loss",)] > 0
    with pytest.raises(OSError, match="refused"):
        scrape(port)


def test_ranks_nodes_and_stragglers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_run(tmp_path, "a: 1\n")
    c = Coordinator(tmp_path, status_every_s=1e9)
    c.start_job()
    for rank in range(4):
        c.join("a", rank, 4, f"n{rank // 2}", 100 + rank)
    now = [time.monotonic()]
    monkeypatch.setattr("qlora_dist.coordinate.state.time.monotonic", lambda: now[0])
    for beat in range(12):
        now[0] += 1.0
        for rank in range(4):
            seconds = (0.9 if rank == 3 else 0.3) * beat
            metrics = {"busy": [seconds, beat, 100 * beat], "tokens_per_second": 10.0 * rank, "memory_bytes": 5}
            c.heartbeat(1, rank, beat, "compute", **metrics)
    now[0] += 7.0
    c.heartbeat(1, 0, 12, "compute")
    port = free_port()
    with serving(port, c):
        seen = scrape(port)
    assert [seen[("rank_tokens_per_second", f"n{rank // 2}", str(rank))] for rank in range(4)] == [0, 10, 20, 30]
    assert [seen[("node_tokens_per_second", host)] for host in ("n0", "n1")] == [10, 50]
    assert seen[("tokens_per_second",)] == 60
    assert seen[("straggler", "n1", "3")] == pytest.approx(3.0)
    assert seen[("stragglers",)] == seen[("running",)] == 1
    assert seen[("rank_busy_seconds", "n1", "3")] == pytest.approx(0.9)
    ages = [seen[("rank_seconds_since_heartbeat", f"n{rank // 2}", str(rank))] for rank in range(4)]
    assert ages == pytest.approx([0, 7, 7, 7])
    assert ("loss",) not in seen
    assert ("last_committed_step",) not in seen


def test_a_port_that_is_taken_is_a_notice_and_the_run_goes_on(tiny_model: Path, tmp_path: Path) -> None:
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        config = small_config(tmp_path, tiny_model, track={"prometheus_port": port, "report": False})
        assert launch(config, tmp_path) == 0
    notices = [e["message"] for e in EventLog(tmp_path / EVENTS_FILE).read_new() if e["kind"] == "notice"]
    (notice,) = [notice for notice in notices if "prometheus" in notice]
    assert f"track.prometheus_port: {port} cannot be served" in notice
    assert "set a port that is free" in notice


def test_every_sample_says_of_which_run_it_is(tmp_path: Path) -> None:
    open_run(tmp_path, "a: 1\n")
    port = free_port()
    with serving(port, Coordinator(tmp_path)), urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        lines = [line for line in answer.read().decode().splitlines() if not line.startswith("#")]
    assert lines
    assert all(f'run="{read_run(tmp_path).run_id}"' in line for line in lines)
