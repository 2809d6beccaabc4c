"""Checkpoints, resuming, and the run folder."""

from qlora_dist.config.catalogue.entry import Mendable

CHECKPOINT: dict[str, Mendable] = {
    "optimizer-state-format": Mendable(
        "the checkpoint's optimizer state of {name} has another format",
        "set train.optim to what the checkpoint's config.yaml says, or start a new output_dir",
    ),
}
