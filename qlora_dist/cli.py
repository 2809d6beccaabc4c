"""Commands: parse, call, print."""

import contextlib
import json
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from qlora_dist import __version__
from qlora_dist.aggregate_cli import aggregate
from qlora_dist.bench.commands import app as bench_app
from qlora_dist.config.errors import UserError
from qlora_dist.config.load import load_config, to_yaml, with_absolute_paths
from qlora_dist.config.redact import redact
from qlora_dist.config.schema import RunConfig
from qlora_dist.submit_cli import app as submit_app
from qlora_dist.track.island_lines import round_text

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help="Distributed QLoRA fine-tuning.")
config_app = typer.Typer(no_args_is_help=True, help="Look at configurations.")
app.add_typer(config_app, name="config")
app.add_typer(bench_app, name="bench")
app.add_typer(submit_app, name="submit")
app.command()(aggregate)

ConfigPath = Annotated[Path, typer.Argument(help="A YAML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="section.field=value, such as train.max_steps=50", show_default=False)
]


@app.command()
def train(config: ConfigPath, overrides: Overrides = None) -> None:
    """Fine-tune: run what CONFIG says; the same command again resumes it."""
    from qlora_dist.cluster.launch import launch
    from qlora_dist.track.terminal import watching

    run_config = with_absolute_paths(load_config(config, overrides or []))
    run_dir, lead = run_config.run_dir, os.environ.get("RANK", "0") == "0"
    # torchrun's workers share one terminal.
    with watching(run_dir) if lead else contextlib.nullcontext():
        code = launch(run_config, run_dir)
    if run_config.track.report and lead:
        report_at_end(run_dir)
    raise typer.Exit(code)


@app.command()
def coordinate(
    config: ConfigPath,
    overrides: Overrides = None,
    host: Annotated[str, typer.Option(help="The address to listen at; 0.0.0.0 for islands on other machines.")] = (
        "127.0.0.1"
    ),
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Default: the one it had before, or a free one.")
    ] = None,
) -> None:
    """Coordinate islands that are started apart, each by `train` with aggregate.coordinator and aggregate.island."""
    from qlora_dist.cluster.outer import coordinate as run
    from qlora_dist.track.terminal import watching

    run_config = with_absolute_paths(load_config(config, overrides or []))
    with watching(run_config.run_dir):
        outcome = run(run_config, run_config.run_dir, host, port)
    if outcome.message:
        print(redact(outcome.message), file=sys.stderr)
    if run_config.track.report:
        report_at_end(run_config.run_dir)
    raise typer.Exit(outcome.exit_code)


def report_at_end(run_dir: Path) -> None:
    """Write report.html, if the run got as far as having metrics; that it fails is told and changes nothing."""
    from qlora_dist.track.metrics import read_metrics

    if not read_metrics(run_dir):
        return
    try:
        from qlora_dist.track.report import write_report

        print(f"  report  {write_report(run_dir)}")
    except Exception as error:  # the run is over and its result stands, whatever is wrong with the report
        print(redact(f"no report was written ({type(error).__name__}: {error})"), file=sys.stderr)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="The run folder.", show_default=False)],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="RUN/report.html where not given.")] = None,
) -> None:
    """Write a run's report: one HTML file that opens offline."""
    from qlora_dist.track.report import write_report

    try:
        print(write_report(run, output))
    except OSError as error:
        raise UserError("report-not-writable", error=error) from error


@app.command()
def runs(
    folders: Annotated[
        list[Path] | None, typer.Argument(help="One folder of runs, or two and more runs.", show_default=False)
    ] = None,
) -> None:
    """List the runs in a folder (`runs` where none is given), or compare two and more runs."""
    from qlora_dist.track.runs import show_comparison, show_runs

    console = Console(width=None if sys.stdout.isatty() else 160)
    if folders and len(folders) > 1:
        show_comparison(folders, console)
    else:
        show_runs(folders[0] if folders else Path("runs"), console)


@config_app.command("show")
def config_show(
    config: ConfigPath,
    overrides: Overrides = None,
    absolute: Annotated[bool, typer.Option("--absolute", help="Files, and the run folder, as absolute paths.")] = False,
) -> None:
    """Print the resolved configuration as YAML."""
    resolved = load_config(config, overrides or [])
    sys.stdout.write(to_yaml(with_absolute_paths(resolved) if absolute else resolved))


@config_app.command("schema")
def config_schema() -> None:
    """Print the JSON schema, from which editors complete and check."""
    print(json.dumps(RunConfig.model_json_schema(), indent=2))


@app.command()
def status(
    run: Annotated[Path, typer.Argument(help="The run folder.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="As one JSON object.")] = False,
    live: Annotated[bool, typer.Option("--watch", help="Again every second, until the run is over.")] = False,
) -> None:
    """Show how a run stands, from its run folder."""
    from qlora_dist.coordinate.report import read_status

    if live and not as_json:
        from qlora_dist.track.terminal_status import watch

        with interruptible():
            watch(run, Console())
        return
    state = read_status(run)
    if as_json:
        print(json.dumps(state, indent=2))
        return
    show_status(state, Console())


@app.command()
def logs(
    run: Annotated[Path, typer.Argument(help="The run folder.", show_default=False)],
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run is over.")] = False,
) -> None:
    """Print what has happened in a run: attempts, checkpoints, failures, restarts, evaluations."""
    from qlora_dist.track.terminal_log import show_log

    with interruptible():
        show_log(run, Console(highlight=False), follow)


@app.command()
def stop(
    run: Annotated[Path, typer.Argument(help="The run folder.", show_default=False)],
    reason: Annotated[str, typer.Option(help="Kept in the event log.")] = "a person asked it to stop",
    wait: Annotated[bool, typer.Option(help="Wait until the run is over.")] = True,
) -> None:
    """Stop a run gracefully: a checkpoint at the next step boundary, then its end; `train` goes on from there."""
    from qlora_dist.coordinate.stop import ask_to_stop, until_over

    before = ask_to_stop(run, reason)
    rounds = before.get("rounds") is not None
    first = (
        "its islands contribute what they have trained" if rounds else "it makes a checkpoint at the next step boundary"
    )
    print(f"asked run {before['run_id']} to stop; {first} first", flush=True)
    if not wait:
        return
    with interruptible():
        *_, state = until_over(run)
    last = state["last_checkpoint"]
    kept = f"last checkpoint: {last['folder'] if last else 'none'}"
    if state.get("rounds") is not None:
        kept = f"{state['rounds']['round']} rounds committed"
    print(f"{state['sentence']}; {kept}")
    if state["state"] not in ("stopped", "finished"):
        raise typer.Exit(1)


@app.command()
def doctor(
    config: Annotated[
        Path | None, typer.Argument(help="A YAML file, for what its run needs.", show_default=False)
    ] = None,
    overrides: Overrides = None,
    address: Annotated[
        str | None, typer.Option(help="HOST:PORT of a Ray cluster, all of whose nodes are looked at.")
    ] = None,
    folder: Annotated[Path | None, typer.Option(help="The run folder to look at, where no CONFIG names it.")] = None,
    port: Annotated[
        list[int] | None, typer.Option(min=1, max=65535, help="A port that must be free here; may be repeated.")
    ] = None,
    limit: Annotated[float, typer.Option(min=1, help="Seconds that one rank waits for another.")] = 60.0,
    as_json: Annotated[bool, typer.Option("--json", help="As one JSON object, with all facts.")] = False,
) -> None:
    """Look at the machine, or at every node, before a run: a verdict and a mend for each line.

    Started by torchrun or srun it looks at every rank. Exit code 1 where a line fails, but under torchrun 0.
    """
    from qlora_dist.cluster.doctor import command, table

    run_config = load_config(config, overrides or []) if config else None
    told = command.diagnose(run_config, address, folder, port or [], limit)
    if told is None:
        return
    if as_json:
        print(json.dumps(table.as_json(*told), indent=1))
    else:
        table.show(told[0], Console(highlight=False))
    # torchrun takes any other code for a crash and buries the table under a traceback of its own.
    failed = table.worst(told[0]) == "fail" and "TORCHELASTIC_RUN_ID" not in os.environ
    raise typer.Exit(1 if failed else 0)


@contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C ends the looking, not the run, and is no failure."""
    try:
        yield
    except KeyboardInterrupt:
        print(file=sys.stderr)
        raise typer.Exit from None


def show_status(state: dict[str, Any], console: Console) -> None:
    """Print a status as a person reads it."""
    console.print(state["sentence"], highlight=False, markup=False, soft_wrap=True)
    if state.get("reason"):
        console.print(f"why: {state['reason']}", highlight=False, markup=False, soft_wrap=True)
    facts = []
    if state.get("step") is not None:
        facts.append(f"step {state['step']}" + (f" of {state['max_steps']}" if state.get("max_steps") else ""))
    if state.get("loss") is not None:
        facts.append(f"loss {state['loss']:.4f}")
    if state.get("tokens_per_second"):
        facts.append(f"{state['tokens_per_second']:,.0f} tokens/s")
    if state.get("seconds_left"):
        facts.append(f"{state['seconds_left'] / 60:.0f} min left")
    if facts:
        console.print(", ".join(facts), highlight=False)
    last = state.get("last_checkpoint")
    if state.get("rounds") is None:
        console.print(f"last checkpoint: {last['folder'] if last else 'none yet'}", highlight=False)
    else:
        show_rounds(state["rounds"], console)
    for restart in state.get("restarts", []):
        console.print(
            f"{'resized' if restart['planned'] else 'restarted'} after attempt {restart['generation']}, "
            f"step {_or_dash(restart['step'])}: {restart['reason']}",
            highlight=False, markup=False, soft_wrap=True,
        )  # fmt: skip
    for straggler in state.get("stragglers", []):
        console.print(straggler["sentence"], style="yellow", highlight=False, markup=False, soft_wrap=True)
    if state.get("ranks"):
        table = Table("rank", "host", "pid", "step", "phase", "tokens/s", "memory", "heard of", box=None)
        for rank in state["ranks"]:
            speed, memory, age = rank.get("tokens_per_second"), rank.get("memory_bytes"), rank.get("age_s")
            table.add_row(
                str(rank["rank"]), rank["host"], str(rank["pid"]), _or_dash(rank.get("step")),
                _or_dash(rank.get("phase")), f"{speed:,.0f}" if speed else "-",
                f"{memory / 2**30:.1f} GiB" if memory else "-", f"{age:.0f} s ago" if age is not None else "-",
            )  # fmt: skip
        console.print(table)


def show_rounds(rounds: dict[str, Any], console: Console) -> None:
    """Print where a run of islands stands."""
    last, packs = rounds["last"], rounds["packs"]
    committed = f"{rounds['round']} round{'s' * (rounds['round'] != 1)} committed"
    console.print(
        f"{committed}, {rounds['packs_trained']} of {packs} packs trained, "
        f"{rounds['packs_dropped']} dropped", highlight=False,
    )  # fmt: skip
    if last is not None:
        console.print(f"last round: {round_text(last | {'missed': []})}", highlight=False, markup=False, soft_wrap=True)
    table = Table("island", "does", "last contribution", box=None)
    counted = {entry["island"]: entry for entry in (last or {}).get("counted", [])}
    for name, does in rounds["islands"].items():
        entry = counted.get(name)
        told = f"{entry['packs']} packs, {entry['tokens']:,} tokens" if entry else "not in the last round"
        table.add_row(name, does, told)
    console.print(table)
    for refusal in rounds["refusals"]:
        text = f"refused: {refusal['reason']}"
        console.print(text, style="yellow", highlight=False, markup=False, soft_wrap=True)


def _or_dash(value: object) -> str:
    return "-" if value is None else str(value)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"qlora-dist {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point: a mistake that a person can mend is one sentence on stderr and exit code 2."""
    try:
        app()
    except UserError as error:
        print(f"error: {redact(error.message)}", file=sys.stderr)
        sys.exit(2)
    except Exception:  # what Python would print of it, without the secrets that a library's message may hold
        sys.stderr.write(redact(traceback.format_exc()))
        sys.exit(1)


if __name__ == "__main__":
    main()
