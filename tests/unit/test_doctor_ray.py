"""`qlora-dist doctor` on Ray, without a cluster; with one see tests/cluster."""

from qlora_dist.cluster.doctor.ray_nodes import told
from qlora_dist.cluster.nodes import Node
from tests.unit.doctor_facts import Facts

NODES = [Node(name, f"10.0.0.{number}", 1, {}, {}) for number, name in enumerate(("aa", "bb"))]


def test_ports_are_those_of_the_node_that_was_looked_at() -> None:
    def answers() -> list[list[Facts] | str]:
        return [[{"rank": 0}], [{"rank": 1}, {"rank": 2}]]

    ports = [{"port": 29400}]
    assert told(NODES, answers(), "aa", ports) == [{"rank": 0, "ports": ports}, {"rank": 1}, {"rank": 2}]
    assert told(NODES, answers(), "bb", ports) == [{"rank": 0}, {"rank": 1, "ports": ports}, {"rank": 2}]
    # This machine's node is one that Ray has lost, or did not answer.
    assert told(NODES, answers(), "cc", ports) == [{"rank": 0}, {"rank": 1}, {"rank": 2}]
    lost = told(NODES, ["no answer", [{"rank": 0}]], "aa", ports)
    assert lost == [{"node": "10.0.0.0", "absent": "no answer"}, {"rank": 0}]
