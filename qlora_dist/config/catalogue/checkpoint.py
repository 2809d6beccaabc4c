"""Checkpoints, resuming, and the run folder."""

from qlora_dist.config.catalogue.entry import Mendable

CHECKPOINT: dict[str, Mendable] = {
    "resume-none-over-checkpoints": Mendable(
        "resume: none, but output_dir {run_dir} holds the checkpoint {checkpoint}",
        "choose another output_dir, or resume=auto to go on from it",
    ),
    "resume-missing": Mendable(
        "resume: {path} does not exist",
        "give a checkpoint folder, a run folder, `auto` or `none`",
    ),
    "resume-no-folder": Mendable(
        "resume: {path} is not a folder",
        "give a checkpoint folder, a run folder, `auto` or `none`",
    ),
    "resume-run-without-checkpoint": Mendable(
        "resume: the run folder {path} has no good checkpoint",
        "give another, or `none`",
    ),
    "resume-no-checkpoint": Mendable(
        "resume: {path} is neither a checkpoint (it has no {manifest}) nor a run folder",
        "give one of these, or set adapter.path to start from a PEFT adapter",
    ),
    "checkpoints-all-damaged": Mendable(
        "output_dir {run_dir}: none of its checkpoints is whole ({checkpoints})",
        "restore one of them, or remove them to start anew",
    ),
    "checkpoint-damaged": Mendable(
        "resume: the checkpoint {path} is damaged ({problems})",
        "give another checkpoint, or the run folder to take its newest good one",
    ),
    "checkpoint-value-differs": Mendable(
        "{checkpoint} was made with a different {setting} ({saved} instead of {value}), so this run cannot go on from "
        "it",
        "put {setting} back as it was, or choose another output_dir",
    ),
    "checkpoint-content-differs": Mendable(
        "{checkpoint} was made with a different {setting} (other content), so this run cannot go on from it",
        "put {setting} back as it was, or choose another output_dir",
    ),
    "checkpoint-data-differs": Mendable(
        "{checkpoint} was made with a different data.train (other rows, or another data.max_rows, data.filter, "
        "data.chat_template or data.max_length), so this run cannot go on from it",
        "put data.train and these settings back as they were, or choose another output_dir",
    ),
    "optimizer-differs": Mendable(
        "{checkpoint} was made with train.optim={saved} and this run has {optim}, so it cannot go on from it",
        "set train.optim={saved}, or choose another output_dir",
    ),
    "optimizer-state-extra": Mendable(
        "the checkpoint holds optimizer state of {name}, which this adapter does not train",
        "resume with the adapter settings of the checkpoint's config.yaml, or choose another output_dir",
    ),
    "optimizer-state-format": Mendable(
        "the checkpoint's optimizer state of {name} is not whole",
        "give another checkpoint in resume, or choose another output_dir",
    ),
    "storage-full": Mendable(
        "output_dir {folder}: no space left to write ({error})",
        "free space or raise the quota there, or choose another output_dir, then run the same command again: committed "
        "checkpoints are untouched",
    ),
    "run-folder-not-writable": Mendable(
        "output_dir {folder} cannot be written ({error})",
        "make it writable or choose another output_dir",
    ),
    "run-folder-is-file": Mendable(
        "output_dir {folder}: {file} is a file where a folder is needed",
        "remove it or choose another output_dir",
    ),
    "run-file-is-folder": Mendable(
        "output_dir {folder}: {file} is a folder where a file is needed",
        "remove it or choose another output_dir",
    ),
    "run-file-damaged": Mendable(
        "{file} is damaged",
        "choose another output_dir, and name the folder of this one in resume to go on from it",
    ),
    "run-folder-not-seen": Mendable(
        "output_dir {run_dir} is not shared: host {host} sees no run folder there",
        "choose a folder on storage that all nodes mount",
    ),
    "run-folder-of-another-run": Mendable(
        "output_dir {run_dir} is not shared: host {host} sees another run's folder there",
        "choose a folder on storage that all nodes mount",
    ),
    "run-folder-stale": Mendable(
        "output_dir {run_dir} does not show what rank 0 has written there",
        "choose a folder on storage that all nodes mount, and run all workers as one user",
    ),
    "event-log-locked": Mendable(
        "{path} has been locked for {seconds:.0f} s by {holder}, which may be stopped",
        "end that process and run the same command again",
    ),
    "no-file-locks": Mendable(
        "output_dir {folder} is on a filesystem without file locks ({error})",
        "mount it with locks (Lustre: -o flock) or choose another output_dir",
    ),
}
