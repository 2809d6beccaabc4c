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


@app.command()
def ray(
    config: Annotated[Path, typer.Argument(help="A YAML file.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="section.field=value, such as train.max_steps=50", show_default=False)
    ] = None,
    address: Annotated[
        str, typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="http://HOST:8265, where Ray's dashboard answers.")
    ] = "http://127.0.0.1:8265",
    python: Annotated[str, typer.Option(help="The cluster's Python that has qlora-dist.")] = "python",
    follow: Annotated[bool, typer.Option(help="Show the job's output and wait for its end.")] = True,
) -> None:
    """Submit CONFIG to a Ray cluster as a job; the same command again resumes the run.

    Ctrl-C asks the run for a checkpoint and its end. The exit code is the run's.
    """
    from qlora_dist.cluster.ray_jobs import connect, not_sent, submit
    from qlora_dist.cluster.ray_jobs import follow as show
    from qlora_dist.config.load import load_config, with_absolute_paths

    run_config = with_absolute_paths(load_config(config, overrides or []))
    client = connect(address)
    job = submit(client, run_config, python)
    print(f"submitted {job}; its run folder on the cluster's nodes is {run_config.run_dir}", flush=True)
    if names := not_sent():
        print(f"not sent: {', '.join(names)}; the cluster's nodes need their own", flush=True)
    if follow:
        raise typer.Exit(show(client, job, run_config.run_dir, python))
