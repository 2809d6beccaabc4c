"""Prometheus metrics of a run, served by the process that hosts its coordinator and made of its status when asked."""

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from qlora_dist.config.errors import UserError
from qlora_dist.coordinate.state import Coordinator

Status = dict[str, Any]
Values = Mapping[tuple[str, ...], float]
# Name after `qlora_dist_`, key of the status, help.
OF_RUN = (
    ("step", "step", "The optimizer step that the run works on."),
    ("max_steps", "max_steps", "Optimizer steps of the whole run."),
    ("loss", "loss", "Training loss of the last logged step."),
    ("tokens_per_second", "tokens_per_second", "Non-padding tokens a second, all ranks."),
    ("seconds_left", "seconds_left", "Estimated seconds to the last step."),
)
OF_RANK = (
    ("rank_tokens_per_second", "tokens_per_second", "Non-padding tokens a second of a rank."),
    ("rank_memory_bytes", "memory_bytes", "Memory of a rank: the GPU's peak, on a CPU the process."),
    ("rank_busy_seconds", "busy_s", "Seconds of a step that a rank spends outside collectives."),
    ("rank_seconds_since_heartbeat", "age_s", "Seconds since a rank was last heard of."),
)


class RunCollector(Collector):
    """The metrics of one run, each with the label `run`.

    Args:
        status: gives what `Coordinator.status` does.
    """

    def __init__(self, status: Callable[[], Status]):
        self._status = status

    def collect(self) -> Iterator[Metric]:
        """A metric that has no value yet is left out."""
        status = self._status()
        run = status["run_id"]
        for name, key, what in OF_RUN:
            if status[key] is not None:
                yield _gauge(name, what, {(): status[key]}, run)
        ranks = status["ranks"]
        for name, key, what in OF_RANK:
            values: Values = {(str(r["rank"]), r["host"]): r[key] for r in ranks if r.get(key) is not None}
            yield _gauge(name, what, values, run, ("rank", "host"))
        nodes: dict[tuple[str, ...], float] = defaultdict(float)
        for rank in ranks:
            nodes[(rank["host"],)] += rank.get("tokens_per_second") or 0.0
        yield _gauge("node_tokens_per_second", "Non-padding tokens a second of a node's ranks.", nodes, run, ("host",))
        slow: Values = {
            (str(s["rank"]), s["host"]): s["busy_s"] / s["usual_s"] for s in status["stragglers"] if s["usual_s"]
        }
        what = "A rank that keeps the others waiting: its seconds outside collectives over those of the usual rank."
        yield _gauge("straggler", what, slow, run, ("rank", "host"))
        yield _gauge("stragglers", "Ranks that keep the others waiting.", {(): len(status["stragglers"])}, run)
        yield _gauge("running", "1 while the run trains, else 0.", {(): float(status["state"] == "running")}, run)
        yield _counter("restarts", "New worker groups since the job started.", len(status["restarts"]), run)
        yield _counter("checkpoints_committed", "Checkpoints committed in the whole run.", status["commits"], run)
        if (last := status["last_checkpoint"]) is not None:
            yield _gauge("last_committed_step", "Step of the newest checkpoint.", {(): last["step"]}, run)
            yield _gauge("last_commit_timestamp_seconds", "When it was committed.", {(): last["time"]}, run)


def _gauge(name: str, what: str, values: Values, run: str, labels: tuple[str, ...] = ()) -> GaugeMetricFamily:
    metric = GaugeMetricFamily(f"qlora_dist_{name}", what, labels=("run", *labels))
    for labelled, value in values.items():
        metric.add_metric((run, *labelled), value)
    return metric


def _counter(name: str, what: str, value: float, run: str) -> CounterMetricFamily:
    metric = CounterMetricFamily(f"qlora_dist_{name}", what, labels=("run",))
    metric.add_metric((run,), value)
    return metric


@contextlib.contextmanager
def serving(port: int | None, coordinator: Coordinator) -> Iterator[None]:
    """The metrics at `port` of all interfaces within the block; without a port nothing.

    A port that cannot be had is a notice in the run's log, and the run goes on.
    """
    close = None if port is None else serve(port, coordinator)
    try:
        yield
    finally:
        if close is not None:
            close()


def serve(port: int, coordinator: Coordinator) -> Callable[[], None] | None:
    """The same from now on; what ends it, None where the port cannot be had."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(RunCollector(coordinator.status))
    try:
        server, thread = start_http_server(port, registry=registry)
    except OSError as error:
        coordinator.note("notice", message=UserError("prometheus-port", port=port, error=error).message)
        return None

    def close() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return close
