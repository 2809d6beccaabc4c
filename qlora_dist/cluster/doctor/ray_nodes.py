"""An examination of every node of a Ray cluster: a task a node, that takes no CPU of anybody's."""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from qlora_dist.cluster.actor import NAMESPACE
from qlora_dist.cluster.doctor.start import ranks_here, run_ranks, settings_of, total_s
from qlora_dist.cluster.doctor.wanted import Wanted
from qlora_dist.cluster.network import free_port
from qlora_dist.cluster.nodes import Node, live_nodes
from qlora_dist.cluster.ray_address import not_joined

Facts = dict[str, Any]
# For a worker process of a node to start, with Python's imports from a shared filesystem.
START_S = 60.0


def examine_cluster(wanted: Wanted, source: str, ports: list[Facts], limit_s: float) -> list[Facts]:
    """The facts of every rank on every node of the cluster at `wanted.address`, and which nodes did not answer.

    Args:
        source: the setting that the address is from.
        ports: what this machine says of them.

    Raises:
        UserError: the cluster cannot be joined.
    """
    assert wanted.address is not None
    with joined(wanted.address, source):
        # This one first: others are compared with it.
        here = ray.get_runtime_context().get_node_id()
        living = sorted(live_nodes(), key=lambda node: (node.node_id != here, node.address))
        answers = on_nodes(living, [(_count, (wanted,))] * len(living), START_S)
        found = [{"node": node["NodeManagerAddress"], "absent": "Ray has lost it"} for node in _lost(living)]
        there = [(node, answer) for node, answer in zip(living, answers, strict=True) if not isinstance(answer, str)]
        found += [_absent(node, a) for node, a in zip(living, answers, strict=True) if isinstance(a, str)]
        world_size = sum(answer["ranks"] for _, answer in there)
        calls, rank = [], 0
        for node, answer in there:
            meeting = (there[0][1]["address"], there[0][1]["port"])
            settings = [
                settings_of(wanted, limit_s, rank + local, world_size, local, node.address, meeting, len(there) > 1)
                for local in range(answer["ranks"])
            ]
            rank += answer["ranks"]
            calls.append((run_ranks, (settings,)))
        answers = on_nodes([node for node, _ in there], calls, total_s(limit_s) + START_S)
        found += told([node for node, _ in there], answers, here, ports)
    return sorted(found, key=lambda facts: facts.get("rank", world_size))


def told(nodes: Sequence[Node], answers: Sequence[list[Facts] | str], here: str, ports: list[Facts]) -> list[Facts]:
    """The facts of all ranks; `ports` are those of the node whose id is `here`, and of no other where it is away."""
    found: list[Facts] = []
    for node, answer in zip(nodes, answers, strict=True):
        if isinstance(answer, str):
            found.append(_absent(node, answer))
            continue
        if node.node_id == here:
            answer[0]["ports"] = ports
        found += answer
    return found


def on_nodes(nodes: Sequence[Node], calls: Sequence[tuple[Any, tuple[Any, ...]]], limit_s: float) -> list[Any]:
    """What a call on each node returns, or the sentence of why it does not, after `limit_s` seconds at most."""
    refs = []
    for node, (function, arguments) in zip(nodes, calls, strict=True):
        affinity = NodeAffinitySchedulingStrategy(node.node_id, soft=False)
        task: Any = ray.remote(function)
        refs.append(task.options(num_cpus=0, max_retries=0, scheduling_strategy=affinity).remote(*arguments))
    done, _ = ray.wait(refs, num_returns=len(refs), timeout=limit_s) if refs else ([], [])
    return [_answer(ref) if ref in done else f"it did not answer within {limit_s:.0f} s" for ref in refs]


def _answer(ref: Any) -> Any:
    try:
        return ray.get(ref)
    except ray.exceptions.RayError as error:
        # A node whose qlora-dist is older, or missing, cannot load the task.
        cause = getattr(error, "cause", None) or error
        lines = [line for line in str(cause).splitlines() if line.strip()]
        return next((line for line in reversed(lines) if "Error" in line), lines[0]).strip()[:200]


def _count(wanted: Wanted) -> Facts:
    return {"ranks": ranks_here(wanted) or 1, "address": ray.util.get_node_ip_address(), "port": free_port()}


def _absent(node: Node, why: str) -> Facts:
    return {"node": node.address, "absent": why}


def _lost(living: Sequence[Node]) -> list[dict[str, Any]]:
    """Nodes that Ray counts as alive and that do not answer; those that it knows to be dead left some time ago."""
    answering = {node.node_id for node in living}
    return [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in answering]


@contextlib.contextmanager
def joined(address: str, source: str) -> Iterator[None]:
    """A connection to a Ray cluster.

    Raises:
        UserError: it cannot be joined.
    """
    try:
        # What Ray tells of the tasks would stand in the table.
        ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise not_joined(address, source, error) from error
    try:
        yield
    finally:
        ray.shutdown()
