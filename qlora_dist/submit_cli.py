"""`qlora-dist submit ...`: parse, call, print."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Hand a run to a cluster's queue.")


@app.command()
def slurm(
    config: Annotated[Path, typer.Argument(help="A YAML file.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="section.field=value, such as train.max_steps=50", show_default=False)
    ] = None,
    show: Annotated[bool, typer.Option("--print", help="Print the batch script instead of submitting it.")] = False,
    nodes: Annotated[int | None, typer.Option(min=1, help="From launch.num_workers where not given.")] = None,
    gpus_per_node: Annotated[
        int | None, typer.Option(min=1, help="Workers on each node; at most 8 of launch.num_workers where not given.")
    ] = None,
    time: Annotated[str | None, typer.Option(help="As sbatch takes it; the partition's own where not given.")] = None,
) -> None:
    """Submit CONFIG to Slurm. Partition, account and the like: SBATCH_PARTITION, SBATCH_ACCOUNT and so on."""
    from qlora_dist.cluster.slurm_submit import allocation, render, submit
    from qlora_dist.config.load import load_config

    run_config = load_config(config, overrides or [])
    script = render(config, run_config, overrides or [], allocation(run_config, nodes, gpus_per_node), time)
    if show:
        print(script, end="")
    else:
        print(f"submitted job {submit(script)}")
