"""Runs the one worker in this process: no launcher, no process group."""

import os
from pathlib import Path

from qlora_dist.cluster.outcome import Outcome, read_outcome
from qlora_dist.cluster.process import TRAIN, choose_device, import_function
from qlora_dist.cluster.stop_signals import stop_on_signals
from qlora_dist.config.errors import UserError
from qlora_dist.config.schema import RunConfig
from qlora_dist.coordinate.client import DirectClient
from qlora_dist.coordinate.host import this_host
from qlora_dist.coordinate.rundir import read_run
from qlora_dist.coordinate.state import Coordinator
from qlora_dist.track.prometheus import serving
from qlora_dist.train.context import Worker


def run_plain(config: RunConfig, run_dir: Path, train_name: str = TRAIN) -> Outcome:
    """Run an opened run folder's only worker; what it raises is raised here, with its traceback.

    Args:
        train_name: `module:function`, what it runs.

    Raises:
        UserError: the config wants more than one worker.
    """
    if config.launch.max_workers != 1:
        raise UserError("one-process-many-workers", num_workers=config.launch.num_workers)
    coordinator = Coordinator(run_dir, config.checkpoint.keep_last, config.checkpoint.keep_best)
    client = DirectClient(coordinator)
    client.call("start_job", launcher="none", host=this_host(), pid=os.getpid())
    worker = Worker(
        rank=0, world_size=1, local_rank=0, device=choose_device(config, 0), client=client,
        run_dir=run_dir.resolve(), nonce=read_run(run_dir).nonce,
    )  # fmt: skip
    with serving(config.track.prometheus_port, coordinator), stop_on_signals(run_dir) as signals:
        import_function(train_name)(config, worker)
    return signals.outcome(read_outcome(client))
