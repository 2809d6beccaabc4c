"""`qlora-dist bench ...`: parse, call, print."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
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
Steps = Annotated[int, typer.Option(min=1, help="Steps measured; the median counts.")]
WarmUp = Annotated[int, typer.Option(min=0, help="Steps before them.")]
PointLimit = Annotated[float, typer.Option(min=1.0, help="Seconds a point may take.")]
Limit = Annotated[float, typer.Option(min=1.0, help="Seconds that all of it may take.")]
Resume = Annotated[bool, typer.Option("--resume", help="Keep what --out holds, and measure what it lacks.")]
Scratch = Annotated[
    Path | None,
    typer.Option(help="Folder for runs and data, on storage that all nodes share; a temporary one where not given."),
]


@app.command()
def throughput(
    model: Model = None,
    config: Annotated[Path | None, typer.Option(help="A YAML file whose settings go over the benchmark's own.")] = None,
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
    from qlora_dist.bench.plane import draw_plane
    from qlora_dist.bench.sweep import checked, combined, parse_points, read_points
    from qlora_dist.bench.tables import throughput_page
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
        numbers = {point.name: number for number, point in enumerate(swept)}
        bench.run_points(
            swept, document, out,
            lambda point, seconds: bench.measure(
                point, settings, folder, warm_up, seconds, numbers[point.name]
            ),
            point_limit_s, limit_s, tell,
        )  # fmt: skip
    finish(out, throughput_page(document))
    drawn = bench.spots(document)
    if drawn:
        measure = "peak allocated, GiB" if document["gpus"] else "peak of host memory, GiB"
        draw_plane(out.with_suffix(".png"), drawn, f"{base}, {document['device']}", measure, "tokens/s a worker")


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
