"""What an attempt writes its metrics to."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from qlora_dist.config.schema import RunConfig
from qlora_dist.coordinate.rundir import read_run
from qlora_dist.track.metrics import MetricsLog
from qlora_dist.track.sinks import Sink, SinkThread
from qlora_dist.track.wandb import choose_mode


def open_metrics(
    config: RunConfig, run_dir: Path, attempt: int, resume_step: int, tell: Callable[[str], None]
) -> MetricsLog:
    """metrics.jsonl, and a thread for each sink that `config.track` asks for.

    Args:
        tell: takes one sentence for the person; called from other threads.
    """
    sinks = []
    if config.track.tensorboard:
        sinks.append(SinkThread("TensorBoard", partial(_tensorboard, run_dir), tell))
    mode = choose_mode(config.track.wandb)
    if mode == "off" and config.track.wandb != "off":
        tell("WANDB_MODE=disabled, so W&B gets nothing")
    if mode != "off":
        sinks.append(SinkThread("W&B", partial(_wandb, config, run_dir, read_run(run_dir).run_id, tell), tell))
    return MetricsLog(run_dir, attempt, resume_step, sinks)


# Imported in the sink's thread, so that a missing or broken library ends the sink and not the run.
def _tensorboard(run_dir: Path) -> Sink:
    from qlora_dist.track.tensorboard import TensorBoardSink

    return TensorBoardSink(run_dir)


def _wandb(config: RunConfig, run_dir: Path, run_id: str, tell: Callable[[str], None]) -> Sink:
    from qlora_dist.track.wandb import WandbSink

    return WandbSink(config, run_dir, run_id, tell)
