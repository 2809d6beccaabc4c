"""`qlora-dist bench ...`: parse, call, print."""

import importlib.util
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from qlora_dist.config.errors import UserError

app = typer.Typer(no_args_is_help=True, help="Measure throughput, kernels, and the peers beside qlora-dist.")

Model = Annotated[
    str | None,
    typer.Option(help="A shape such as llama-3.1-8b, or what model.name takes."),
]
Axes = Annotated[
    list[str] | None,
    typer.Option("--set", help="section.field=value,value,...: an axis of the sweep, or a setting of all its points."),
]
Config = Annotated[Path | None, typer.Option(help="A YAML file whose settings go over the benchmark's own.")]
Steps = Annotated[int, typer.Option(min=1, help="Steps measured; the median counts.")]
WarmUp = Annotated[int, typer.Option(min=0, help="Steps before them.")]
PointLimit = Annotated[float, typer.Option(min=1.0, help="Seconds a point may take.")]
Limit = Annotated[float, typer.Option(min=1.0, help="Seconds that all of it may take.")]
Resume = Annotated[bool, typer.Option("--resume", help="Keep what --out holds, and measure what it lacks.")]
Scratch = Annotated[
    Path | None,
    typer.Option(help="Folder for runs and data, on storage that all nodes share; a temporary one where not given."),
]
# Both ends of the plane, where --ours names none.
OUR_WAYS = ["train.activations=auto", "train.activations=recompute"]


@app.command()
def throughput(
    model: Model = None,
    config: Config = None,
    axes: Axes = None,
    points: Annotated[Path | None, typer.Option(help="A JSON list of points, each combined with the axes.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Only the point of this name; may be repeated.")] = None,
    steps: Steps = 20,
    warm_up: WarmUp = 5,
    point_limit_s: PointLimit = 600.0,
    limit_s: Limit = 86_400.0,
    out: Annotated[Path, typer.Option(help="The JSON file; .md and .png go beside it.")] = Path(
        "bench-throughput.json"
    ),
    resume: Resume = False,
    scratch: Scratch = None,
) -> None:
    """Train each point of a sweep for a few steps: tokens/s over memory."""
    from qlora_dist.bench import throughput as bench
    from qlora_dist.bench.document import begin
    from qlora_dist.bench.sweep import checked, combined, parse_points, read_points
    from qlora_dist.bench.workload import model_setting, words_for, write_rows, write_settings

    refuse_other_names(out)
    swept = parse_points(axes or [])
    chosen = None if model is None else model_setting(model)
    with scratch_folder(scratch) as folder:
        if points is not None:
            swept = combined(read_points(points, folder), swept)
        if only:
            swept = [point for point in swept if point.name in only]
        settings, rows = folder / "settings.yaml", folder / "rows.jsonl"
        base = write_settings(settings, chosen, rows, warm_up + steps, config)
        configs = checked(settings, swept)
        for point, one in zip(swept, configs, strict=True):
            if one.train.max_steps is not None and one.train.max_steps <= warm_up:
                raise UserError("bench-too-few-steps", name=point.name, max_steps=one.train.max_steps, warm_up=warm_up)
        if configs:
            write_rows(rows, words=words_for(max(one.data.max_length for one in configs)))
        document = begin(
            out, resume, what="throughput", title=f"`qlora-dist bench throughput`: {base}",
            settings=settings.read_text(encoding="utf-8").replace(str(folder), "SCRATCH"), warm_up=warm_up,
        )  # fmt: skip
        tasks = [
            bench.Task(
                point.name,
                {"overrides": point.overrides, "environment": point.environment},
                partial(bench.measure, point, settings, folder, warm_up, number=number),
            )
            for number, point in enumerate(swept)
        ]
        bench.run_tasks(tasks, document, out, point_limit_s, limit_s, tell)
    show([out])


@app.command()
def peers(
    model: Model = None,
    size: Annotated[
        str, typer.Option(help="Micro-batches, sequences x tokens, the most important first.")
    ] = "8x2048,4x2048,1x2048",
    ours: Annotated[
        list[str] | None, typer.Option(help="A way of ours: overrides with blanks between them; may be repeated.")
    ] = None,
    peer: Annotated[list[str] | None, typer.Option(help="Only this peer; may be repeated.")] = None,
    config: Config = None,
    axes: Axes = None,
    steps: Steps = 20,
    warm_up: WarmUp = 5,
    point_limit_s: PointLimit = 180.0,
    limit_s: Limit = 86_400.0,
    nf4: Annotated[
        Path | None, typer.Option(help="Folder of the quantised base, kept for the next call; made where missing.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The JSON file; .md and .png go beside it.")] = Path("peers.json"),
    resume: Resume = False,
    scratch: Scratch = None,
) -> None:
    """Train the same base, adapter and batches by qlora-dist and by its peers, each in its own process, in turn."""
    from qlora_dist.bench import side_by_side as bench
    from qlora_dist.bench.document import begin, write
    from qlora_dist.bench.sweep import parse_points
    from qlora_dist.bench.throughput import run_tasks
    from qlora_dist.bench.workload import model_setting, words_for, write_rows, write_settings
    from qlora_dist.config.load import load_config

    started = time.monotonic()
    refuse_other_names(out)
    sizes, others = bench.parse_sizes(size), bench.chosen_peers(peer)
    points = bench.our_points(ours or OUR_WAYS)
    (common,) = parse_points(axes or [])[:1]
    points = [replace(point, overrides=[*common.overrides, *point.overrides]) for point in points]
    chosen = None if model is None else model_setting(model)
    refuse_without_gpu("peers")
    with scratch_folder(scratch) as folder:
        settings, rows = folder / "settings.yaml", folder / "rows.jsonl"
        base = write_settings(settings, chosen, rows, warm_up + steps, config)
        write_rows(rows, words=words_for(max(one.length for one in sizes)))
        run_config = load_config(settings, common.overrides)
        for point in points:
            for one in sizes:
                load_config(settings, bench.at_size(point, one).overrides)
        document = begin(
            out, resume, what="peers", title=f"`qlora-dist bench peers`: {base}",
            settings=settings.read_text(encoding="utf-8").replace(str(folder), "SCRATCH"), warm_up=warm_up,
        )  # fmt: skip
        shared = bench.Comparison(settings, run_config, (nf4 or folder / "nf4").absolute(), folder, warm_up, steps)
        bench.prepare_base(shared)
        if "rates" not in document:
            document["rates"] = bench.measure_rates(shared, sizes)
            write(out, document)
        left_s = limit_s - (time.monotonic() - started)
        run_tasks(bench.tasks(shared, sizes, points, others), document, out, point_limit_s, left_s, tell)
    show([out])


@app.command()
def kernels(
    model: Annotated[str, typer.Option(help="The shape whose sizes are taken.")] = "llama-3.1-8b",
    tokens: Annotated[int, typer.Option(min=2048, help="Tokens of a micro-batch, a multiple of 2,048.")] = 16_384,
    only: Annotated[list[str] | None, typer.Option(help="Part of a kernel's name; may be repeated.")] = None,
    out: Annotated[Path, typer.Option(help="The JSON file; .md goes beside it.")] = Path("kernels.json"),
) -> None:
    """Time each kernel beside what the GPU reaches in copies and GEMMs, and beside Liger, bitsandbytes and PEFT."""
    from qlora_dist.bench import kernels as bench
    from qlora_dist.bench.bound import Shape
    from qlora_dist.bench.document import begin, write
    from qlora_dist.bench.timing import copy_gb_s
    from qlora_dist.model.shapes import SHAPES
    from qlora_dist.model.synthetic import synthetic_folder

    refuse_other_names(out)
    synthetic_folder(model)
    known = bench.names(SHAPES[model])
    for part in only or ():
        if not any(part in name for name in known):
            raise UserError("bench-kernel-unknown", name=part, kernels="; ".join(known))
    refuse_without_gpu("kernels")
    title = f"`qlora-dist bench kernels`: {model}, {tokens:,} tokens"
    document = begin(out, False, what="kernels", title=title, copy_gb_s=copy_gb_s())
    rounded = max(tokens // 2048, 1) * 2048
    for record in bench.kernel_records(Shape.from_config(SHAPES[model]), rounded, document["copy_gb_s"], only or ()):
        document["records"].append(record)
        write(out, document)
        share = f"{record['ms']:.3f} ms, {record['of_ceiling']:.0%}" if record["outcome"] == "ok" else record["why"]
        print(f"{record['name']}: {share}", flush=True)
    show([out])


@app.command()
def show(
    files: Annotated[list[Path], typer.Argument(help="JSON files of bench throughput, peers or kernels.")],
) -> None:
    """Write the table and the picture of results once more; of several files, one picture with the points of all."""
    from qlora_dist.bench.document import read
    from qlora_dist.bench.tables import page

    documents = [read(file) for file in files]
    for file, document in zip(files, documents, strict=True):
        finish(file, page(document))
    draw(files[0].with_suffix(".png"), documents)


def draw(path: Path, documents: list[dict[str, Any]]) -> None:
    """The plane of all points of these documents; without any there is no picture."""
    from qlora_dist.bench.throughput import spots

    documents = [document for document in documents if document["what"] != "kernels"]
    drawn = [spot for document in documents for spot in spots(document)]
    if not drawn:
        return
    if importlib.util.find_spec("matplotlib") is None:
        print("matplotlib is not there, so neither is a picture: `qlora-dist bench show` draws it elsewhere")
        return
    from qlora_dist.bench.plane import draw_plane

    first = documents[0]
    ceilings = [
        (f"GEMMs and attention alone, {size}", rates["bound"]["kept"])
        for document in documents
        for size, rates in document.get("rates", {}).items()
        if isinstance(rates, dict)
    ]
    draw_plane(
        path, drawn, f"{first['title'].rpartition(': ')[2]}, {first['device']}",
        "peak allocated, GiB" if first["gpus"] else "peak of host memory, GiB", "tokens/s a worker",
        # One line is enough: the sizes' bounds lie close together.
        sorted(ceilings, key=lambda ceiling: -ceiling[1])[:1],
    )  # fmt: skip
    print(path)


def refuse_without_gpu(what: str) -> None:
    """Refuse what cannot be measured here."""
    import torch

    if not torch.cuda.is_available():
        raise UserError("bench-needs-gpu", what=what)


def refuse_other_names(out: Path) -> None:
    """Refuse an --out that the table's and the picture's names cannot be made from."""
    if out.suffix != ".json":
        raise UserError("bench-out-form", out=out)


@contextmanager
def scratch_folder(given: Path | None) -> Iterator[Path]:
    """A new folder that is gone afterwards, inside the one that is `given`."""
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="qlora-bench-", dir=given, ignore_cleanup_errors=True) as folder:
        yield Path(folder).absolute()


def tell(record: dict[str, Any]) -> None:
    """Print a record as it comes."""
    from qlora_dist.bench.tables import tokens_or_outcome

    line = f"{record['name']}: {tokens_or_outcome(record)}"
    if record["outcome"] == "ok":
        line += " tokens/s"
        peak = record.get("peak_allocated_gib")
        line += f", {record['seconds_per_step']:.3f} s a step" + (f", {peak:.1f} GiB" if peak else "")
    elif record.get("log_tail"):
        line += "\n" + "\n".join(f"  | {tail}" for tail in record["log_tail"].splitlines()[-3:])
    print(line, flush=True)


def finish(out: Path, page: str) -> None:
    """Write the page beside the JSON, and print it."""
    out.with_suffix(".md").write_text(page, encoding="utf-8")
    print(f"\n{page}\n{out}")
