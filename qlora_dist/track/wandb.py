"""Weights & Biases: one run, whatever was restarted."""

import logging
import netrc
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from qlora_dist.config.redact import redact_tree
from qlora_dist.config.schema import RunConfig
from qlora_dist.track.sinks import Record, scalars

INIT_TIMEOUT_S = 60.0
FINISH_TIMEOUT_S = 45.0


class WandbSink:
    """A W&B run whose id is that of our run.

    Online, a restarted attempt goes on with the same run, and steps that W&B already has are left out. Offline, each
    attempt writes one folder with everything from step 0 and removes those of the attempts before it: what one
    `wandb sync` uploads has every step once.

    Args:
        config: of the run; its secrets are taken out before W&B sees it.
        run_dir: the folder `wandb` is made in.
        run_id: never changes between attempts.
        tell: takes one sentence for the person.
    """

    def __init__(self, config: RunConfig, run_dir: Path, run_id: str, tell: Callable[[str], None]):
        # Here and not above: it takes half a second, and only where it is wanted.
        import wandb

        self._wandb, self._config, self._run_id, self._tell = wandb, config, run_id, tell
        self._mode, self._root = choose_mode(config.track.wandb), run_dir
        if config.track.wandb == "online" and not has_key():
            self._tell("no W&B key found (WANDB_API_KEY or `wandb login`), so the run is kept in an offline folder")
        if self._mode == "online":
            try:
                self._run = self._init("online")
            except wandb.errors.Error as error:
                self._tell(f"W&B cannot be reached ({type(error).__name__}), so its run is kept in an offline folder")
                # Its service keeps the id of a run that it could not start.
                wandb.teardown(exit_code=1)
                self._mode = "offline"
        if self._mode == "offline":
            for old in (run_dir / "wandb").glob(f"offline-run-*-{run_id}"):
                shutil.rmtree(old, ignore_errors=True)
            self._run = self._init("offline")
        self._first_step = self._run.starting_step if self._mode == "online" else 0
        folder = Path(self._run.settings.sync_dir)
        self._tell(f"W&B run {self._run.url}" if self._mode == "online" else f"W&B offline: wandb sync {folder}")

    def write(self, row: Record) -> None:
        """Log one step."""
        if row["step"] >= self._first_step:
            self._run.log(scalars(row) | {"restarts": row["attempt"] - 1}, step=row["step"])

    def close(self, adapter: Path | None) -> None:
        """Attach the final adapter and wait for the upload."""
        if adapter is not None and self._config.track.wandb_log_adapter:
            artifact = self._wandb.Artifact(f"adapter-{self._config.name}", "model", metadata={"run_id": self._run_id})
            for file in sorted(adapter.iterdir()):
                artifact.add_file(str(file))
            self._run.log_artifact(artifact)
        self._run.finish(exit_code=0)

    def _init(self, mode: Literal["online", "offline"]) -> Any:
        config = redact_tree(self._config.model_dump(mode="json"))
        track = config["track"]
        settings = self._wandb.Settings(
            console="off", silent=True, init_timeout=INIT_TIMEOUT_S, finish_timeout=FINISH_TIMEOUT_S,
            # The command line may hold what the configuration is redacted of; the code is not ours to send.
            x_disable_meta=True, save_code=False, disable_code=True, disable_git=True,
            # A second attempt in one process would get the first one's run.
            reinit="create_new",
        )  # fmt: skip
        logging.getLogger("wandb").setLevel(logging.ERROR)
        return self._wandb.init(
            id=self._run_id, name=track["wandb_name"] or config["name"], project=track["wandb_project"],
            entity=track["wandb_entity"], group=track["wandb_group"], tags=track["wandb_tags"] or None,
            config=config, dir=str(self._root), mode=mode, resume="allow" if mode == "online" else None,
            settings=settings,
        )  # fmt: skip


def choose_mode(wanted: str) -> Literal["off", "online", "offline"]:
    """`online` where a key is found, else `offline`; less of W&B where WANDB_MODE says so.

    Args:
        wanted: `track.wandb`.
    """
    variable = os.environ.get("WANDB_MODE")
    if wanted == "off" or variable == "disabled":
        return "off"
    # "dryrun" is W&B's older word for it.
    if wanted == "offline" or variable in ("offline", "dryrun"):
        return "offline"
    return "online" if has_key() else "offline"


def has_key() -> bool:
    """Whether there is a key to log in with: WANDB_API_KEY, or an entry for the server in netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return netrc.netrc(path).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
