"""What an examination comes to: a line for each thing looked at, and the nodes that the facts are of."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Facts = dict[str, Any]
Verdict = Literal["ok", "warn", "fail", "skipped"]
FEW = 4


@dataclass(frozen=True)
class Line:
    """One line of the table.

    Attributes:
        verdict: `fail`: a run would not start, not go on, or not do what its configuration says. `warn`: it would be
            slower, or may meet trouble. `skipped`: there is nothing to look at, `found` says why.
        mend: what to do about it; empty where nothing is to be done.
    """

    check: str
    verdict: Verdict
    found: str
    mend: str = ""


@dataclass(frozen=True)
class Node:
    """A machine: the facts of its first rank, which also looked at the machine, and of all its ranks."""

    label: str
    first: Facts
    ranks: Sequence[Facts] = field(default_factory=list)

    @property
    def machine(self) -> Facts:
        """What `doctor.machine` found; empty where it did not come so far."""
        found: Facts = self.first.get("machine", {})
        return {} if "error" in found else found


def nodes_of(found: Sequence[Facts]) -> list[Node]:
    """The machines that answered, in the order of their ranks; named by their host where that tells them apart."""
    groups: dict[str, list[Facts]] = {}
    for facts in found:
        if "absent" not in facts:
            groups.setdefault(facts["node"], []).append(facts)
    firsts = {name: min(ranks, key=lambda facts: facts["local_rank"]) for name, ranks in groups.items()}
    hosts = {name: str(first.get("machine", {}).get("host", name)) for name, first in firsts.items()}
    times = Counter(hosts.values())
    return [Node(hosts[n] if times[hosts[n]] == 1 else n, firsts[n], ranks) for n, ranks in groups.items()]


def named(labels: Iterable[str]) -> str:
    """Some names, for a sentence."""
    labels = list(dict.fromkeys(labels))
    shown = labels if len(labels) <= FEW + 1 else [*labels[:FEW], f"{len(labels) - FEW} more"]
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"


def on(labels: Sequence[str], nodes: Sequence[Node]) -> str:
    """ " on a and b", or nothing where there is one machine."""
    return "" if len(nodes) == 1 else f" on {named(labels)}"


def apart(values: Mapping[str, object]) -> str:
    """Who has which value, the commonest first: "1.2 on a and c, 1.1 on b"."""
    holders: dict[object, list[str]] = {}
    for label, value in values.items():
        holders.setdefault(value, []).append(label)
    ordered = sorted(holders.items(), key=lambda item: -len(item[1]))
    return ", ".join(f"{value} on {named(labels)}" for value, labels in ordered)


def gib(size: float) -> str:
    """Bytes as GiB, or MiB where they are few."""
    return (
        f"{size / 2**30:,.0f} GiB"
        if size >= 10 << 30
        else (f"{size / 2**30:.1f} GiB" if size >= 1 << 30 else f"{size / 2**20:.0f} MiB")
    )
