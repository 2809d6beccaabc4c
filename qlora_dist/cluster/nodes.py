"""The nodes of the Ray cluster: which of them live, and how many workers fit on them."""

import socket
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import ray
from ray._private.state import available_resources_per_node

# A raylet on a network answers in milliseconds; one that is starved of CPU may need longer.
PROBE_TIMEOUT_S = 2.0


@dataclass(frozen=True)
class Node:
    """A node of the cluster.

    Attributes:
        address, port: where its raylet listens.
        total, free: resource -> amount; free is what no placement group or actor holds.
    """

    node_id: str
    address: str
    port: int
    total: Mapping[str, float]
    free: Mapping[str, float]


def live_nodes() -> list[Node]:
    """The nodes that Ray counts as alive and whose raylets accept a connection now.

    Ray itself notices a killed raylet after 16 s (five missed health checks) and would go on placing workers there.
    """
    free = available_resources_per_node()
    nodes = [
        Node(n["NodeID"], n["NodeManagerAddress"], n["NodeManagerPort"], n["Resources"], free.get(n["NodeID"], {}))
        for n in ray.nodes()
        if n["Alive"]
    ]
    with ThreadPoolExecutor(max_workers=32) as pool:
        return [node for node, answers in zip(nodes, pool.map(_accepts, nodes), strict=True) if answers]


def _accepts(node: Node) -> bool:
    try:
        socket.create_connection((node.address, node.port), timeout=PROBE_TIMEOUT_S).close()
    except OSError:
        return False
    return True


def room(per_node: Sequence[Mapping[str, float]], worker: Mapping[str, float]) -> int:
    """How many workers that need `worker` fit on nodes that have `per_node`."""
    needs = {name: amount for name, amount in worker.items() if amount > 0}
    return sum(min(int(node.get(name, 0.0) // amount) for name, amount in needs.items()) for node in per_node)
