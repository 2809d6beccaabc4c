"""One rank of an examination, in a process of its own: `python -m qlora_dist.cluster.doctor.rank`, settings on stdin.

It tells what it is about to do and what it found as JSON lines on stdout, so that whoever started it can say where it
hangs and end it: a driver that does not answer and a collective that waits for ever do not stop for an exception.
"""

import contextlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from qlora_dist.cluster.doctor.machine import BUSY_BYTES, machine_facts
from qlora_dist.cluster.doctor.outside import hub_facts, plain, wandb_facts
from qlora_dist.cluster.doctor.wanted import Wanted

Facts = dict[str, Any]
Tell = Callable[[Facts], None]


def examine_here(settings: Facts, tell: Tell) -> None:
    """Everything that one rank finds out.

    Args:
        settings: rank, world_size, local_rank, host and port of the meeting, spread (over several nodes), limit_s (that
            one rank waits for another), wanted (`Wanted` as a mapping).
        tell: takes {"begun": stage} and then {stage: facts}, for each stage.
    """
    wanted = Wanted(**settings["wanted"])
    rank, leads_node = settings["rank"], settings["local_rank"] == 0
    with ThreadPoolExecutor(2) as pool:
        asked: dict[str, Future[Facts]] = {}
        if leads_node:
            with stage("machine", tell) as facts:
                facts |= machine_facts(wanted)
            asked = {"wandb": pool.submit(wandb_facts, wanted.wandb), "hub": pool.submit(hub_facts, wanted)}
        # Here and not above: a broken torch is a finding too.
        with stage("torch", tell) as facts:
            from torch.distributed import HashStore

            from qlora_dist.cluster.doctor.devices import device_facts
            from qlora_dist.cluster.doctor.meeting import Meeting, connect, meet

            facts |= device_facts(wanted.device, settings["local_rank"])
        if "error" in facts and "torch" not in facts:
            return
        device = facts.get("device")
        alone = Meeting(HashStore(), rank, [rank], settings["limit_s"])
        meeting = alone
        with stage("meeting", tell) as facts:
            if settings["world_size"] > 1:
                if settings["spread"]:
                    from qlora_dist.cluster.network import address_towards, interface_settings

                    # As the workers of a run do.
                    os.environ |= interface_settings(address_towards(settings["host"]))
                store = connect(settings["host"], settings["port"], rank, settings["limit_s"], rank == 0)
                meeting = meet(store, rank, settings["world_size"], settings["limit_s"])
            facts |= {"members": meeting.members, "interface": os.environ.get("GLOO_SOCKET_IFNAME")}
        flags = meeting.gather("leads", leads_node)
        leaders = meeting.of([member for member, leads in flags.items() if leads])
        if leads_node:
            examine_between_nodes(wanted, leaders, tell)
        examine_collectives(meeting, device, leads_node, tell)
        for name, answer in asked.items():
            tell({"begun": name})
            tell({name: answer.result()})
        meeting.tell(f"end/{rank}", True)
        if rank == 0:
            # It serves the store.
            meeting.wait([f"end/{member}" for member in meeting.members])


def examine_between_nodes(wanted: Wanted, leaders: Any, tell: Tell) -> None:
    """Clocks and the run folder, by one rank a node."""
    from qlora_dist.cluster.doctor.folder import folder_facts
    from qlora_dist.cluster.doctor.meeting import clocks

    if len(leaders.members) > 1:
        with stage("clock", tell) as facts:
            facts |= clocks(leaders)
    with stage("folder", tell) as facts:
        facts |= folder_facts(Path(wanted.run_dir), leaders, tell)


def examine_collectives(meeting: Any, device: str | None, leads_node: bool, tell: Tell) -> None:
    """Gloo, then each GPU under load, then NCCL; GPUs that others use are left alone.

    Args:
        device: this rank's GPU; None where it has none.
    """
    from qlora_dist.cluster.doctor.devices import bandwidth, load, used_bytes

    several = len(meeting.members) > 1
    if several:
        with stage("gloo", tell) as facts:
            facts |= bandwidth("gloo", meeting, "cpu")
    state = "none" if device is None else "busy" if used_bytes(device) > BUSY_BYTES else "idle"
    states = meeting.gather("gpu", state)
    if device is None or "busy" in states.values():
        if device is not None:
            tell({"load": {"skipped": "busy"}, "nccl": {"skipped": "busy"}})
        return
    with stage("load", tell) as facts:
        facts |= load(device, leads_node)
    if several and set(states.values()) == {"idle"}:
        with stage("nccl", tell) as facts:
            facts |= bandwidth("nccl", meeting, device)


@contextlib.contextmanager
def stage(name: str, tell: Tell) -> Iterator[Facts]:
    """A mapping to fill with what a stage finds; what it raises is what it found, and the next one follows."""
    facts: Facts = {}
    tell({"begun": name})
    try:
        yield facts
    except Exception as error:
        traceback.print_exc()
        facts["error"] = f"{type(error).__name__}: {plain(error)}"
    tell({name: facts})


def end_with(parent: int) -> None:
    """End this process when the one that started it has ended."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def main() -> None:
    """Read the settings, tell the findings."""
    settings = json.load(sys.stdin)
    # Whoever started this ends it before; it ends itself too where nothing of Python's runs any more.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(int(settings["total_s"]) + 10)
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    # Libraries print what they like to stdout, gloo among them.
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    writing = threading.Lock()

    def tell(facts: Facts) -> None:
        with writing:
            out.write(json.dumps(facts) + "\n")
            out.flush()

    examine_here(settings, tell)
    tell({"begun": None})
    out.close()
    # A library's threads may be waiting for what never comes.
    os._exit(0)


if __name__ == "__main__":
    main()
