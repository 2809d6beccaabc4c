"""TensorBoard event files, written anew by every attempt, so that each metric has one value a step."""

import shutil
from pathlib import Path

from tensorboardX import SummaryWriter

from qlora_dist.track.sinks import Record, scalars

FOLDER = "tensorboard"


class TensorBoardSink:
    """Scalars by metric and step in RUN/tensorboard.

    The rows of earlier attempts come again from metrics.jsonl. Event files cannot be cut, so the old ones go; a worker
    that was cut off and wakes up later writes into a file that nobody reads.
    """

    def __init__(self, run_dir: Path):
        folder = run_dir / FOLDER
        shutil.rmtree(folder, ignore_errors=True)
        # The purge tells a TensorBoard that is open to forget what it has read from the files before.
        self._writer = SummaryWriter(str(folder), flush_secs=2, purge_step=0)

    def write(self, row: Record) -> None:
        """Add one step."""
        for name, value in scalars(row).items():
            group = "eval" if name.startswith("eval_") else "train"
            self._writer.add_scalar(f"{group}/{name.removeprefix('eval_')}", value, row["step"], row["time"])

    def close(self, adapter: Path | None) -> None:
        """Write what is buffered."""
        self._writer.close()
