"""Which checkpoints stay. All of this happens under the event log's lock."""

import math
from pathlib import Path
from typing import Any

from qlora_dist.coordinate.files import move_to_trash
from qlora_dist.coordinate.manifest import CHECKPOINTS, find_problems, list_committed, parse_writing, read_manifest


def choose_removals(run_dir: Path, keep_last: int, keep_best: int) -> list[Path]:
    """Folders of committed checkpoints that may go, oldest last.

    The newest `keep_last` intact ones stay, and the `keep_best` with the lowest finite `eval_loss` of their
    manifests. A damaged one counts as none of these; it goes when it is older than the last ones that stay. Nothing
    goes unless one that stays has been read through and found good.
    """
    folders = list_committed(run_dir)
    intact = [folder for folder in folders if not find_problems(folder, checksums=False)]
    scored = sorted(
        (loss, -place, folder)
        for place, folder in enumerate(reversed(intact))
        if (loss := _eval_loss(read_manifest(folder)["metrics"])) is not None
    )
    last = set(intact[:keep_last])
    keep = last | {folder for _, _, folder in scored[:keep_best]}
    removable = [
        folder
        for place, folder in enumerate(folders)
        if folder not in keep and (folder in intact or last.issubset(folders[:place]))
    ]
    if not removable or not any(not find_problems(folder, checksums=True) for folder in folders if folder in keep):
        return []
    return removable


def _eval_loss(metrics: dict[str, Any]) -> float | None:
    loss = metrics.get("eval_loss")
    return float(loss) if isinstance(loss, int | float) and math.isfinite(loss) else None


def retire(run_dir: Path, keep_last: int, keep_best: int) -> list[str]:
    """Move what may go to the trash; return the names of the checkpoints that went."""
    removals = choose_removals(run_dir, keep_last, keep_best)
    for folder in reversed(removals):
        move_to_trash(folder)
    return [folder.name for folder in removals]


def sweep_writing(run_dir: Path, generation: int) -> list[str]:
    """Move the half-written folders of generations before `generation` to the trash; return their names."""
    swept = []
    for folder in sorted((run_dir / CHECKPOINTS).glob(".writing-*")):
        key = parse_writing(folder.name)
        if key is not None and key[0] < generation:
            move_to_trash(folder)
            swept.append(folder.name)
    return swept
