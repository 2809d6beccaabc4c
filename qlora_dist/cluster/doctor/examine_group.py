"""The lines of what several ranks found out together, or on GPUs: see `examine`."""

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from qlora_dist.cluster.doctor.lines import Facts, Line, Node, Verdict, apart, gib, named, on
from qlora_dist.cluster.doctor.machine import BUSY_BYTES
from qlora_dist.cluster.doctor.wanted import Wanted

# NVML's bits that say that a GPU is slower than it could be for a reason that somebody can mend.
THROTTLED = {0x8: "hardware slowdown", 0x20: "too hot", 0x40: "too hot (hardware)", 0x80: "power brake"}
SLOW = 0.85
# Seconds: what other nodes wrote looks old or young by that much in `status`; munge and signed requests refuse minutes.
CLOCK_S = (5.0, 1.0)
STORAGE_CLOCK_S = 5.0
LAG_S = 2.0
WRITE_MS = 500.0
# 1e9 bytes a second of bus bandwidth, below which something is wrong rather than slow: (one node, between nodes).
LEAST_GB_S = {"gloo": (0.05, 0.05), "nccl": (5.0, 2.0)}


def gpus(nodes: Sequence[Node], wanted: Wanted, complete: bool = True) -> Iterator[Line]:
    """GPUs: whether there are enough that work, and what slows them."""
    if wanted.device == "cpu":
        yield Line("gpu", "skipped", "launch.device is cpu")
        return
    ranks = [(node, facts) for node in nodes for facts in node.ranks]
    works = [(node, facts) for node, facts in ranks if facts.get("torch", {}).get("device")]
    broken = [*_broken(nodes)]
    yield from broken
    if not works:
        if wanted.device == "cuda" and not broken:
            yield Line("gpu", "fail", "launch.device is cuda, and there is no NVIDIA GPU", "set launch.device=cpu")
        elif not broken:
            yield Line("gpu", "skipped", "no NVIDIA GPU: workers compute on the CPU")
        return
    without = [node.label for node in nodes if not any(node is other for other, _ in works)]
    if without and not broken:
        yield Line("gpu", "warn", f"no GPU{on(without, nodes)}", "leave that node out, or give its container the GPUs")
    if complete and not broken and wanted.workers is not None and len(works) < wanted.workers:
        yield Line(
            "gpu", "fail", f"{len(works)} GPU(s) that work, for launch.num_workers={wanted.workers}",
            "lower launch.num_workers, or bring more",
        )  # fmt: skip
    names = [facts["torch"]["name"] for _, facts in works]
    drivers = sorted({gpu["driver"] for node in nodes for gpu in node.machine.get("gpus", {}).get("gpus", ())})
    cuda = named({str(facts["torch"]["cuda"]) for _, facts in works})
    kinds = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    yield Line("gpu", "ok", f"{kinds}; driver {named(drivers) if drivers else 'unknown'}, CUDA {cuda}")
    yield from _settings(nodes)
    yield from _memory(works, nodes, wanted)
    yield from _load(works, nodes)


def _broken(nodes: Sequence[Node]) -> Iterator[Line]:
    for node in nodes:
        found = node.machine.get("gpus", {})
        there = len(found.get("gpus", ())) or found.get("devices", 0)
        torch = node.first.get("torch", {})
        if there and "error" in found:
            yield Line(
                "gpu", "fail", f"nvidia-smi{on([node.label], nodes)}: {found['error']}",
                "mend the driver (restart the machine); in a container, give it the driver's tools (--gpus all)",
            )  # fmt: skip
        if there and "torch" in torch and torch["cuda"] is None:
            yield Line(
                "gpu", "fail", f"torch {torch['torch']}{on([node.label], nodes)} is built without CUDA",
                f"install a build with CUDA, for the {there} GPU(s) there",
            )  # fmt: skip
        for facts in node.ranks:
            error = facts.get("torch", {}).get("error")
            if error is not None and "torch" in facts["torch"] and there:
                yield Line(
                    "gpu", "fail", f"rank {facts['rank']}{on([node.label], nodes)}: {error}",
                    "let every rank see all GPUs of its node (--gpus-per-node, not --gpus-per-task)"
                    if "local rank" in error
                    else f"update the driver to one for CUDA {torch['cuda']}, or install a torch for an older CUDA",
                )  # fmt: skip


def _settings(nodes: Sequence[Node]) -> Iterator[Line]:
    rows = [(node, gpu) for node in nodes for gpu in node.machine.get("gpus", {}).get("gpus", ())]
    drivers = {node.label: gpu["driver"] for node, gpu in rows}
    if len(set(drivers.values())) > 1:
        yield Line("gpu", "warn", f"driver {apart(drivers)}", "install one driver on all nodes")
    for node, gpu in rows:
        if gpu["mig"] == "Enabled":
            text = f"GPU {gpu['index']}{on([node.label], nodes)} is cut up by MIG, over which NCCL does not work"
            yield Line("gpu", "warn", text, "turn MIG off there (`nvidia-smi -mig 0`), or use one worker")
        if gpu["ecc_errors"].isdigit() and int(gpu["ecc_errors"]) > 0:
            text = f"GPU {gpu['index']}{on([node.label], nodes)} had {gpu['ecc_errors']} uncorrected memory error(s)"
            yield Line(
                "gpu", "warn", text, "reset it (`nvidia-smi --gpu-reset`); where they come again, have it replaced"
            )


def _memory(works: Sequence[tuple[Node, Facts]], nodes: Sequence[Node], wanted: Wanted) -> Iterator[Line]:
    budget = None if wanted.memory_budget_gib is None else wanted.memory_budget_gib * 2**30
    fine = True
    for node, facts in works:
        torch = facts["torch"]
        free, total = torch["free"], torch["total"]
        text = f"{gib(free)} of {gib(total)} free on {torch['device']}{on([node.label], nodes)}"
        if budget is not None and free < budget:
            fine = False
            yield Line(
                "gpu memory", "fail", f"{text}, for train.memory_budget_gib={wanted.memory_budget_gib:g}",
                "end what else runs on it (nvidia-smi shows it), or lower the budget",
            )  # fmt: skip
        elif total - free > BUSY_BYTES:
            fine = False
            yield Line("gpu memory", "warn", f"{text}: others use it", "end what else runs on it (nvidia-smi shows it)")
    if fine:
        least = min(works, key=lambda work: work[1]["torch"]["free"])[1]["torch"]
        yield Line("gpu memory", "ok", f"{gib(least['free'])} of {gib(least['total'])} free on each GPU")


def _load(works: Sequence[tuple[Node, Facts]], nodes: Sequence[Node]) -> Iterator[Line]:
    if any("skipped" in facts.get("load", {}) for _, facts in works):
        yield Line("gpu load", "skipped", "others use a GPU; `doctor` again when they are through")
        return
    measured = [(node, facts) for node, facts in works if "tflops" in facts.get("load", {})]
    for node, facts in works:
        if "error" in facts.get("load", {}):
            text = f"{facts['torch']['device']}{on([node.label], nodes)}: {facts['load']['error']}"
            yield Line("gpu load", "fail", text, "leave that GPU out (CUDA_VISIBLE_DEVICES) and have it looked at")
    if not measured:
        return
    speeds = [facts["load"]["tflops"] for _, facts in measured]
    median, fine = statistics.median(speeds), True
    for node, facts in measured:
        if facts["load"]["tflops"] < SLOW * median:
            fine = False
            text = f"{facts['torch']['device']}{on([node.label], nodes)}: {facts['load']['tflops']:.0f} TFLOP/s"
            yield Line(
                "gpu load", "warn", f"{text}, the median is {median:.0f}: it will keep the others waiting",
                "see its clocks and temperature (`nvidia-smi -q -d PERFORMANCE,CLOCK`), or leave its node out",
            )  # fmt: skip
        for index, bits in enumerate(facts["load"].get("reasons", ())):
            if reasons := [name for bit, name in THROTTLED.items() if bits & bit]:
                fine = False
                text = f"GPU {index}{on([node.label], nodes)} is held back: {named(reasons)}"
                yield Line("gpu load", "warn", text, "see to its cooling and power supply, or leave its node out")
    if fine:
        rows = [row for _, facts in measured for row in facts["load"].get("clocks", ())]
        clocks = sorted({int(row[0]) for row in rows if row[0].isdigit()})
        speed = f", SM clock {clocks[0]}-{clocks[-1]} MHz" if clocks else ""
        text = f"{min(speeds):.0f} to {max(speeds):.0f} TFLOP/s of dense matrix products{speed}, not held back"
        yield Line("gpu load", "ok", text)


def folder(nodes: Sequence[Node], wanted: Wanted) -> Iterator[Line]:
    """The run folder: seen by all, and fit for a log that several nodes append to."""
    told = {node.label: node.first["folder"] for node in nodes if "folder" in node.first}
    if not told:
        return
    # Nobody has named a folder: it is only where runs would go from here.
    worst: Verdict = "fail" if wanted.named or len(nodes) == 1 else "warn"
    several = "set output_dir to a folder on storage that all nodes share" + (
        "" if wanted.named else ", or give --folder"
    )
    errors: dict[str, list[str]] = {}
    for label, facts in told.items():
        if "error" in facts:
            errors.setdefault(facts["error"], []).append(label)
    for error, labels in errors.items():
        own = len(nodes) == 1 or labels == [nodes[0].label]
        yield Line(
            "folder", worst, f"{error}{on(labels, nodes)}", "make room or set output_dir elsewhere" if own else several
        )
    used = {label: facts for label, facts in told.items() if "won" in facts and "error" not in facts}
    if not used:
        return
    if any(facts["nodes"] < len(used) for facts in used.values()):
        text = f"{wanted.run_dir}: not compared between nodes, which did not meet"
        yield Line("folder", "warn", text, "mend what the line `nodes` says, then look again")
        return
    fine = not errors
    turns = [turn for facts in used.values() for turn in facts["turns"]]
    if len(set(turns)) < len(turns):
        fine = False
        yield Line(
            "folder", worst, f"{wanted.run_dir}: two nodes held the event log's lock at one time",
            "mount it with locks that hold between nodes: NFS without `nolock` or `local_lock`, Lustre with `-o flock`",
        )  # fmt: skip
    if sum(facts["won"] for facts in used.values()) != 1:
        fine = False
        yield Line(
            "folder", worst, f"{wanted.run_dir}: several nodes have created one file, each for the first time",
            "use a filesystem on which O_EXCL holds between nodes, such as NFSv3 or later",
        )  # fmt: skip
    unseen = [label for label, facts in used.items() if facts.get("lag_s", 0.0) is None]
    late = {label: facts["lag_s"] for label, facts in used.items() if facts.get("lag_s") is not None}
    if unseen or (late and max(late.values()) > LAG_S):
        fine = False
        labels = unseen or [label for label, lag in late.items() if lag > LAG_S]
        how = "never" if unseen else f"only after {max(late.values()):.1f} s"
        text = f"{wanted.run_dir}: a replaced file is seen {how}{on(labels, nodes)}"
        mend = "mount it with a shorter attribute cache (NFS: actimeo=1)"
        yield Line("folder", worst if unseen else "warn", text, mend)
    slowest = max(facts["write_ms"] for facts in used.values())
    if slowest > WRITE_MS:
        fine = False
        text = f"{wanted.run_dir}: {slowest:.0f} ms for a small durable write"
        yield Line("folder", "warn", text, "use faster storage: every checkpoint and every event waits for it")
    if fine:
        places = [place for node in nodes for place in node.machine.get("space", ()) if place["what"] == "run folder"]
        made = (
            ""
            if not places or Path(places[0]["path"]) == Path(wanted.run_dir)
            else f", to be made in {places[0]['path']}"
        )
        kind = named({place["kind"] for place in places}) if places else "unknown"
        seen = (
            ""
            if len(nodes) == 1
            else f", seen by all {len(nodes)} nodes; a change within {max(late.values(), default=0):.2f} s"
        )
        text = f"{wanted.run_dir} ({kind}{made}){seen}; renames and locks hold; a durable write takes {slowest:.1f} ms"
        yield Line("folder", "ok", text)


def clock(nodes: Sequence[Node]) -> Iterator[Line]:
    """The nodes' clocks against the first one's, and the storage's against theirs."""
    told = nodes[0].first.get("clock", {}) if nodes else {}
    mend = "set the time there by chrony or ntpd: `chronyc tracking`, `timedatectl`"
    fine = True
    if len(nodes) > 1 and ("error" in told or not told):
        fine = False
        yield Line("clock", "skipped", f"not compared: {told.get('error', 'the nodes did not meet')}")
    off = {}
    for node in nodes[1:]:
        found = told.get(str(node.first["rank"]))
        if found is None:
            continue
        # What the measurement itself may be wrong by is nobody's fault.
        sure = abs(found["ahead_s"]) - found["within_s"]
        off[node.label] = found["ahead_s"]
        if sure > CLOCK_S[1]:
            fine = False
            way = "ahead of" if found["ahead_s"] > 0 else "behind"
            text = f"{node.label} is {abs(found['ahead_s']):,.1f} s {way} {nodes[0].label}"
            yield Line("clock", "fail" if sure > CLOCK_S[0] else "warn", text, mend)
    if not fine:
        return
    storage = {n.label: n.first["folder"]["clock_s"] for n in nodes if "clock_s" in n.first.get("folder", {})}
    wrong = [label for label, ahead in storage.items() if abs(ahead) > STORAGE_CLOCK_S]
    if wrong:
        ahead = storage[wrong[0]]
        way = "ahead of" if ahead > 0 else "behind"
        whose = "this machine's" if len(nodes) == 1 else f"that of {named(wrong)}"
        yield Line("clock", "warn", f"the clock of the run folder's storage is {abs(ahead):,.1f} s {way} {whose}", mend)
    elif off:
        most = max(abs(ahead) for ahead in off.values())
        yield Line("clock", "ok", f"{len(nodes)} clocks agree within {1e3 * most:.1f} ms")
    elif storage:
        yield Line("clock", "ok", "the clock of the run folder's storage is this machine's")


def bandwidths(nodes: Sequence[Node]) -> Iterator[Line]:
    """How fast the ranks exchange data."""
    ranks = [(node, facts) for node in nodes for facts in node.ranks]
    for backend in ("gloo", "nccl"):
        told = [(node, facts) for node, facts in ranks if backend in facts]
        if not told:
            reason = "one rank" if len(ranks) == 1 else "no GPUs" if backend == "nccl" else "the ranks did not meet"
            yield Line(backend, "skipped", reason)
            continue
        if any("skipped" in facts[backend] for _, facts in told):
            yield Line(backend, "skipped", "others use a GPU; `doctor` again when they are through")
            continue
        errors = [(node, facts) for node, facts in told if "error" in facts[backend]]
        if errors:
            node, facts = errors[0]
            who = f"rank {facts['rank']}{on([node.label], nodes)}"
            more = f", and {len(errors) - 1} more" if len(errors) > 1 else ""
            yield Line(backend, "fail", f"{who}{more}: {facts[backend]['error']}", MENDS[backend])
            continue
        speed = min(facts[backend]["gb_s"] for _, facts in told)
        between = "between nodes" if len(nodes) > 1 else "within this machine"
        # NCCL's figures come in hundreds, gloo's below one.
        shown = f"{speed:.{0 if speed >= 100 else 1 if speed >= 10 else 2}f} GB/s"
        text = f"{shown} {between}, all-reduce of {len(told)} ranks"
        slow = speed < LEAST_GB_S[backend][len(nodes) > 1]
        yield Line(backend, "warn" if slow else "ok", text, SLOW_MENDS[backend] if slow else "")


MENDS = {
    "gloo": "let the nodes reach each other over TCP on all ports (firewall); where they have several interfaces "
    "set GLOO_SOCKET_IFNAME",
    "nccl": "run the same with NCCL_DEBUG=INFO: it says which interface or peer it fails at",
}
SLOW_MENDS = {
    "gloo": "set GLOO_SOCKET_IFNAME to the fastest interface that the nodes share",
    "nccl": "NCCL_DEBUG=INFO says whether it uses NVLink, PCIe, InfiniBand or sockets; NCCL_IB_HCA, NCCL_SOCKET_IFNAME "
    "choose",
}
