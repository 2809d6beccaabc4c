"""The run folder: made or opened once by whoever starts the run, seen by every node."""

import hashlib
import json
import os
import secrets
import time
from dataclasses import dataclass
from pathlib import Path

from qlora_dist.config.errors import UserError
from qlora_dist.coordinate.files import explain, write_atomically
from qlora_dist.coordinate.host import this_host
from qlora_dist.coordinate.log import EventLog
from qlora_dist.coordinate.manifest import CHECKPOINTS

RUN_FILE = "run.json"
CONFIG_FILE = "config.yaml"
EVENTS_FILE = "events.jsonl"
STATUS_FILE = "status.json"
ADAPTER = "adapter"


@dataclass(frozen=True)
class RunInfo:
    """What `run.json` says.

    Attributes:
        run_id: names the run for people and in Ray actor names.
        nonce: random; a node that reads the same one sees the same folder.
        created: seconds since the epoch.
    """

    run_id: str
    nonce: str
    created: float


def open_run(run_dir: Path, config_yaml: str) -> RunInfo:
    """Make the run folder or open it again, and put the resolved configuration into it.

    Safe when several processes do it at the same time, and when one is killed in between.

    Raises:
        UserError: the folder cannot be made or written, has no space, or its run.json is damaged.
    """
    try:
        (run_dir / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        if (run_dir / ADAPTER).exists() and not (run_dir / ADAPTER).is_dir():
            # The final adapter comes after the last step, and all steps would have been for nothing.
            raise UserError("run-folder-is-file", folder=run_dir, file=run_dir / ADAPTER)
        log = EventLog(run_dir / EVENTS_FILE)
        with log.locked():
            if not (run_dir / RUN_FILE).exists():
                made = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
                fields = {"run_id": f"{made}-{secrets.token_hex(3)}", "nonce": secrets.token_hex(16)}
                text = json.dumps({**fields, "created": time.time()}, indent=1)
                write_atomically(run_dir / RUN_FILE, text.encode())
            info = read_run(run_dir)
            config = config_yaml.encode()
            if not (run_dir / CONFIG_FILE).exists() or (run_dir / CONFIG_FILE).read_bytes() != config:
                write_atomically(run_dir / CONFIG_FILE, config)
            log.append(
                {
                    "kind": "opened",
                    "time": time.time(),
                    "host": this_host(),
                    "pid": os.getpid(),
                    "config_sha256": hashlib.sha256(config).hexdigest(),
                }
            )
    except OSError as error:
        raise explain(error, run_dir) from error
    return info


def read_run(run_dir: Path) -> RunInfo:
    """What `run.json` says.

    Raises:
        FileNotFoundError: there is no run in this folder.
        UserError: the file is damaged.
    """
    text = (run_dir / RUN_FILE).read_bytes()
    try:
        fields = json.loads(text)
        return RunInfo(fields["run_id"], fields["nonce"], fields["created"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError("run-file-damaged", file=run_dir / RUN_FILE) from error


def check_shared(run_dir: Path, nonce: str, wait_s: float = 30.0) -> None:
    """Make sure that this node sees the run folder that the starter of the run opened. Every node calls it.

    Args:
        nonce: the starter's `RunInfo.nonce`.
        wait_s: seconds a network filesystem may take to show a new folder.

    Raises:
        UserError: this node has another folder, or none, at that path.
    """
    deadline = time.monotonic() + wait_s
    while True:
        found = None
        try:
            os.listdir(run_dir)  # makes NFS ask the server again
            found = read_run(run_dir).nonce
        except (FileNotFoundError, NotADirectoryError):
            pass
        if found == nonce:
            return
        if found is not None:
            raise UserError("run-folder-of-another-run", run_dir=run_dir, host=this_host())
        if time.monotonic() > deadline:
            raise UserError("run-folder-not-seen", run_dir=run_dir, host=this_host())
        time.sleep(0.2)
