"""`qlora-dist aggregate`: parse, call, print."""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from qlora_dist.config.errors import UserError

if TYPE_CHECKING:
    from qlora_dist.aggregate.merge import Summary


def aggregate(
    adapters: Annotated[list[Path], typer.Argument(help="PEFT LoRA folders over one base.", show_default=False)],
    method: Annotated[
        str, typer.Option(help="mean, svd, task-arithmetic, ties, dare, della or cat.", show_default=False)
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="The new folder.", show_default=False)],
    weights: Annotated[
        str | None,
        typer.Option(help="One for each adapter, as 0.5,0.3,0.2. Default: 1/n for mean, svd and cat, else 1."),
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Of the result. Default: the largest of the adapters'.")] = None,
    density: Annotated[
        float | None, typer.Option(help="Share of the entries that stay; ties, dare, della. Default: 0.5.")
    ] = None,
    epsilon: Annotated[
        float | None,
        typer.Option(help="della: how far apart smallest and largest entries' chances of staying are. Default: 0.1."),
    ] = None,
    majority_sign: Annotated[
        str | None,
        typer.Option(help="total, frequency or none. Default: total for ties and della, none for dare."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="What dare and della drop. Default: 0.")] = None,
    on: Annotated[
        str | None,
        typer.Option(help="updates (products B A) or factors (A and B apart). Default: updates; mean is on factors."),
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="The base's name, where the adapters have several names for the same one.")
    ] = None,
    device: Annotated[
        str, typer.Option(help="Where it is computed; cuda is much faster for ties, dare, della.")
    ] = "cpu",
) -> None:
    """Combine trained adapters into one PEFT folder, layer by layer."""
    from qlora_dist.aggregate import merge
    from qlora_dist.aggregate.methods import recipe

    chosen = recipe(
        method, len(adapters), parse_weights(weights), on=on, rank=rank, density=density, epsilon=epsilon,
        majority_sign=majority_sign, seed=seed,
    )  # fmt: skip
    shown = merge.aggregate(adapters, chosen, output, base=base, device=device, each_layer=with_progress)
    show_summary(shown, Console(highlight=False, width=None if sys.stdout.isatty() else 160))


def parse_weights(text: str | None) -> list[float] | None:
    """Numbers between commas; None stays None.

    Raises:
        UserError: something between the commas is no number.
    """
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(
            "aggregate-value", option="--weights", value=text, wanted="numbers as in 0.5,0.3,0.2"
        ) from error


def with_progress(layers: Sequence[str]) -> Iterable[str]:
    """Go through the layers with a bar on stderr, where that is a terminal."""
    console = Console(stderr=True)
    return track(layers, "layers", console=console, transient=True, disable=not console.is_terminal)


def show_summary(summary: "Summary", console: Console) -> None:
    """Print what was combined, how, and what was lost by it."""
    recipe = summary.recipe
    facts = [f"{recipe.method} on {recipe.on}", f"{summary.num_layers} layers", f"rank {summary.rank}"]
    if recipe.method in ("ties", "dare", "della"):
        facts += [f"density {recipe.density:g}", f"majority sign {recipe.majority_sign}"]
    console.print(", ".join(facts), markup=False)
    table = Table("weight", "rank", "adapter", box=None)
    for parent, weight in zip(summary.parents, recipe.weights, strict=True):
        ranks = sorted({layer.rank for layer in parent.layers.values()})
        shown = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}"
        table.add_row(f"{weight:.4g}", shown, str(parent.folder))
    console.print(table)
    if recipe.method == "cat":
        console.print("exact: nothing was projected")
    elif recipe.on == "updates":
        worst = f", most in {summary.worst[0]} ({summary.worst[1]:.2%})" if summary.lost >= 5e-5 else ""
        console.print(f"the projection to rank {summary.rank} lost {summary.lost:.2%} of the norm{worst}", markup=False)
    elif summary.beside is not None:
        console.print(f"{summary.beside:.2%} of the norm apart from the combined products (--method svd, cat)")
    console.print(f"adapter  {summary.folder}", markup=False, soft_wrap=True)
