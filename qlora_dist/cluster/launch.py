"""From a configuration to an exit code: opens the run folder, picks the launcher, tells how the run ended."""

import os
import sys
from pathlib import Path

from qlora_dist.cluster.outcome import Outcome
from qlora_dist.cluster.output import logs_folder
from qlora_dist.cluster.process import TRAIN
from qlora_dist.cluster.second_start import refuse_second_start, starter
from qlora_dist.config.errors import UserError
from qlora_dist.config.load import to_yaml
from qlora_dist.config.redact import redact
from qlora_dist.config.schema import RunConfig
from qlora_dist.coordinate.client import Fenced
from qlora_dist.coordinate.outer_address import keep_token, own_token
from qlora_dist.coordinate.rundir import open_run

INTERRUPTED = 130


def launch(config: RunConfig, run_dir: Path, train_name: str = TRAIN) -> int:
    """Run the whole run, wherever its workers are.

    Args:
        train_name: `module:function`, what each worker runs.

    Returns:
        The exit code: 0 finished, 2 after the sentence of what a person must mend, 130 after Ctrl-C, 143 and 138 after
        a stop by SIGTERM and SIGUSR1, else 1.
    """
    try:
        outcome = _run(config, run_dir, train_name)
    except UserError as error:
        outcome = Outcome(2, error.message)
    except Fenced:
        outcome = Outcome(2, UserError("run-taken-over", who=starter(run_dir)).message)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return INTERRUPTED
    if outcome.traceback:
        print(redact(outcome.traceback), file=sys.stderr)
    if outcome.message:
        failed = outcome.exit_code in (1, 2)
        print(f"{'error: ' if failed else ''}{redact(outcome.message)}", file=sys.stderr if failed else sys.stdout)
    if outcome.exit_code == 1:
        print(f"the workers' output is in {logs_folder(run_dir)}", file=sys.stderr)
    return outcome.exit_code


def _run(config: RunConfig, run_dir: Path, train_name: str) -> Outcome:
    # Each launcher is imported only where it is used: Ray and torch's agent take seconds.
    backend = config.launch.backend
    if config.aggregate.here and "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        raise UserError("islands-under-launcher", islands=config.aggregate.islands)
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        if backend == "ray":
            raise UserError("torchrun-around-ray")
        from qlora_dist.cluster.torchrun import run_as_worker

        return run_as_worker(config, run_dir, train_name)
    if backend in ("none", "torchrun") or config.aggregate.here:
        # On Ray the name of the coordinator's actor does this.
        refuse_second_start(run_dir)
    if config.aggregate.here:
        from qlora_dist.cluster.islands import run_islands

        return run_islands(config, run_dir)
    outer = config.aggregate.coordinator
    # Before there is a run folder: a wrong address leaves none.
    token = None if outer is None else own_token(outer, run_dir)
    open_run(run_dir, to_yaml(config))
    if token is not None:
        keep_token(token, run_dir)
    if backend == "torchrun":
        from qlora_dist.cluster.torchrun import run_with_torchrun

        return run_with_torchrun(config, run_dir, train_name)
    if backend == "none":
        from qlora_dist.cluster.plain import run_plain

        return run_plain(config, run_dir, train_name)
    from qlora_dist.cluster.ray_driver import run_with_ray

    return run_with_ray(config, run_dir, train_name)
