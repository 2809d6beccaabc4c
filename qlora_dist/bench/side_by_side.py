"""Ours and the peers' in turn: the same NF4 weights, adapter settings and batches, each run in a process of its own."""

import importlib.util
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

from qlora_dist.bench.document import Record
from qlora_dist.bench.peers import PEERS, Job, Peer
from qlora_dist.bench.spots import OURS
from qlora_dist.bench.sweep import Point, called
from qlora_dist.bench.throughput import TAIL, Task, last_words, measure, outcome
from qlora_dist.bench.watch import watched
from qlora_dist.config.errors import UserError
from qlora_dist.config.schema import RunConfig

# As long as a process may take to load the base, or to measure the rates of one size.
PREPARE_S = 240.0


@dataclass(frozen=True)
class Size:
    """A micro-batch: so many sequences of so many tokens."""

    batch: int
    length: int

    def __str__(self) -> str:
        return f"{self.batch} x {self.length}"


@dataclass(frozen=True)
class Comparison:
    """What all runs of a comparison share.

    Attributes:
        settings: the YAML file of ours.
        nf4: the folder of the quantised base.
        scratch: where the runs and their data are.
    """

    settings: Path
    config: RunConfig
    nf4: Path
    scratch: Path
    warm_up: int
    steps: int
    device: str = "cuda:0"


def parse_sizes(text: str) -> list[Size]:
    """`8x2048,2x8192` as sizes.

    Raises:
        UserError: it has another form.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"[1-9]\d*x[1-9]\d*", part) for part in parts):
        raise UserError("bench-size-form", sizes=text)
    return [Size(*map(int, part.split("x"))) for part in dict.fromkeys(parts)]


def chosen_peers(names: Sequence[str] | None) -> dict[str, Peer]:
    """The peers of these names, all where there are none.

    Raises:
        UserError: there is no such peer.
    """
    for name in names or ():
        if name not in PEERS:
            raise UserError("bench-peer-unknown", name=name, peers=", ".join(PEERS))
    return {name: PEERS[name] for name in names or PEERS}


def our_points(texts: Sequence[str]) -> list[Point]:
    """Our ways, each of overrides with blanks between them, named after them."""
    points = []
    for text in texts:
        overrides = text.split()
        if not all("=" in override for override in overrides):
            raise UserError("override-form", override=text)
        name = ", ".join(called(*override.split("=", 1)) for override in overrides)
        points.append(Point(name or "defaults", overrides))
    return points


def at_size(point: Point, size: Size) -> Point:
    """A way of ours at a size: one micro-batch a step, as the peers have it."""
    sized = [f"train.per_device_train_batch_size={size.batch}", f"data.max_length={size.length}"]
    return replace(point, overrides=[*point.overrides, *sized])


def tasks(shared: Comparison, sizes: Sequence[Size], ours: Sequence[Point], peers: dict[str, Peer]) -> list[Task]:
    """Size after size, ours and the peers' taking turns."""
    found: list[Task] = []
    for size in sizes:
        mine = [our_task(shared, at_size(point, size), size) for point in ours]
        theirs = [peer_task(shared, name, peer, size) for name, peer in peers.items()]
        found += [task for pair in zip_longest(mine, theirs) for task in pair if task is not None]
    return found


def our_task(shared: Comparison, point: Point, size: Size) -> Task:
    """One of ours: `qlora-dist train` from the same NF4 folder."""
    from_nf4 = replace(point, overrides=[*point.overrides, f"model.cache_quantized={shared.nf4}"])
    folder = shared.scratch / re.sub(r"\W+", "-", f"ours {point.name} {size}")
    folder.mkdir(exist_ok=True)
    facts = {
        "series": OURS, "title": f"{OURS}, {point.name}", "label": f"{size}, {point.name}", "peer": None,
        "size": asdict(size), "overrides": point.overrides, "note": "",
    }  # fmt: skip
    return Task(
        f"{OURS} {point.name}, {size}", facts, partial(measure, from_nf4, shared.settings, folder, shared.warm_up)
    )


def peer_task(shared: Comparison, name: str, peer: Peer, size: Size) -> Task:
    """One of a peer's."""
    facts = {
        "series": peer.title, "title": peer.title, "label": str(size), "peer": name, "size": asdict(size),
        "note": peer.note,
    }  # fmt: skip
    return Task(f"{name}, {size}", facts, partial(measure_peer, shared, name, peer, size))


def measure_peer(shared: Comparison, name: str, peer: Peer, size: Size, seconds: float) -> Record:
    """Run a peer in a process of its own; what it lacks and what went wrong are in the record."""
    missing = [package for package in peer.packages if importlib.util.find_spec(package) is None]
    if missing:
        return {"outcome": "not installed", "why": ", ".join(missing)}
    folder = shared.scratch / f"{name}-{size.batch}x{size.length}"
    folder.mkdir()
    adapter = shared.config.adapter
    job = Job(shared.nf4, batches_file(shared, size), adapter.r, adapter.lora_alpha, size.length, shared.device)
    paths = {"base": str(job.base), "batches": str(job.batches)}
    asked = {"peer": name, "job": asdict(job) | paths, "warm_up": shared.warm_up, "steps": shared.steps}
    # Some of the time is for the process to start and to end.
    asked["seconds"] = 0.85 * seconds
    (folder / "job.json").write_text(json.dumps(asked))
    result, log = folder / "result.json", folder / "log"
    command = [sys.executable, "-m", "qlora_dist.bench.peer_process", str(folder / "job.json"), str(result)]
    ended = watched(command, log, seconds, peer.environment, folder)
    record: Record = {
        "outcome": outcome(ended.code, ended.over_limit, log),
        "seconds": ended.seconds,
        "gpu_total_gib": ended.gpu_peak_gib,
        "host_peak_gib": ended.host_peak_gib,
    }
    if record["outcome"] == "ok":
        return record | json.loads(result.read_text())
    told = log.read_text(errors="replace")
    if record["outcome"] == "failed":
        record["why"] = last_words(told)
    return record | {"exit_code": ended.code, "log_tail": told[-TAIL:]}


def batches_file(shared: Comparison, size: Size) -> Path:
    """The batches that our run of this size trains on, in its order: input_ids int32 [steps, B, T]."""
    file = shared.scratch / f"batches-{size.batch}x{size.length}.safetensors"
    if not file.exists():
        write_batches(shared.config, size, shared.warm_up + shared.steps, file)
    return file


def write_batches(config: RunConfig, size: Size, steps: int, file: Path) -> None:
    """Draw the first `steps` batches as the loop does and write them."""
    import torch
    from safetensors.torch import save_file

    from qlora_dist.data.collate import collate
    from qlora_dist.data.order import GlobalOrder, Position
    from qlora_dist.data.tokens import prepare_data
    from qlora_dist.model.base import load_tokenizer
    from qlora_dist.model.resolve import resolve_base

    data = config.data.model_copy(update={"max_length": size.length})
    tokenizer = load_tokenizer(resolve_base(config.model), config.model.trust_remote_code)
    table, _ = prepare_data(data, tokenizer, config.seed)
    order = GlobalOrder(table.num_packs, size.batch, config.data.shuffle, config.seed)
    position, drawn = Position(), []
    for _ in range(steps):
        packs, position = order.batch_at(position)
        ids = collate(table, packs, int(tokenizer.pad_token_id or 0)).input_ids_BT
        # The last batch of an epoch may be short, and the peers are given whole ones.
        if ids.shape == (size.batch, size.length):
            drawn.append(ids.to(torch.int32))
    if not drawn:
        raise UserError("bench-rows-too-short", size=size)
    save_file({"input_ids": torch.stack(drawn)}, file)


def prepare_base(shared: Comparison) -> None:
    """Quantise the base into the folder that everybody loads, unless it is there, by one step of ours.

    Raises:
        UserError: that failed.
    """
    if (shared.nf4 / "config.json").exists():
        return
    folder = shared.scratch / "prepare"
    folder.mkdir()
    point = Point("prepare", [f"model.cache_quantized={shared.nf4}", "train.max_steps=1", "data.max_length=256"])
    record = measure(point, shared.settings, folder, 0, PREPARE_S)
    if record["outcome"] != "ok":
        raise UserError(
            "bench-base-failed", outcome=record["outcome"], error=last_words(record["log_tail"])
        )  # fmt: skip


def measure_rates(shared: Comparison, sizes: Sequence[Size]) -> dict[str, Any]:
    """GEMM, attention and copy rates and the bounds from them, by size ("8x2048"); {} with "why" where that failed."""
    result, log = shared.scratch / "rates.json", shared.scratch / "rates.log"
    command = [sys.executable, "-m", "qlora_dist.bench.bound", str(shared.nf4 / "config.json"), str(result)]
    ended = watched([*command, *(f"{size.batch}x{size.length}" for size in sizes)], log, PREPARE_S)
    measured = json.loads(result.read_text()) if result.exists() else {}
    return dict(measured) if ended.code == 0 else measured | {"why": last_words(log.read_text(errors="replace"))}


def with_ratios(records: Sequence[Record], rates: dict[str, Any]) -> list[Record]:
    """The records with of_bound (tokens/s over that size's bound with nothing recomputed) and, for a peer's,
    ours_same_size (our best there over theirs) and ours_no_more_memory (our best with that length and no more
    allocated over theirs); None where there is nothing to compare with.
    """
    good = [record for record in records if record["outcome"] == "ok"]
    ours = [record for record in good if record["peer"] is None]
    told = []
    for record in records:
        size = record["size"]
        added: Record = {"of_bound": None, "ours_same_size": None, "ours_no_more_memory": None}
        if record in good:
            bound = rates.get(f"{size['batch']}x{size['length']}", {}).get("bound", {}).get("kept")
            added["of_bound"] = record["tokens_per_second"] / bound if bound else None
        if record in good and record["peer"] is not None:
            same = [mine for mine in ours if mine["size"] == size]
            peak = record["peak_allocated_gib"] or 0.0
            lean = [
                mine
                for mine in ours
                if mine["size"]["length"] == size["length"] and (mine["peak_allocated_gib"] or 0.0) <= peak
            ]
            added["ours_same_size"] = _best_over(same, record)
            added["ours_no_more_memory"] = _best_over(lean, record)
        told.append({**record, **added})
    return told


def _best_over(ours: Sequence[Record], theirs: Record) -> float | None:
    best = max((record["tokens_per_second"] for record in ours), default=None)
    return None if best is None else best / float(theirs["tokens_per_second"])
