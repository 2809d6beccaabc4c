"""How workers learn where the coordinator's HTTP service is: a file in the run folder that only its owner reads.

Not the command line or a rendezvous store: the first shows in `ps`, the second answers anybody.
"""

import json
import os
import time
from pathlib import Path

from qlora_dist.config.errors import UserError

ADDRESS_FILE = "coordinator.json"


def write_address(run_dir: Path, url: str, token: str, key: str) -> None:
    """Replace the file.

    Args:
        key: not secret; tells the readers that this is the file they wait for, not one of an earlier start.
    """
    path = run_dir / ADDRESS_FILE
    writing = path.with_name(f".{ADDRESS_FILE}.{os.getpid()}")
    descriptor = os.open(writing, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump({"url": url, "token": token, "key": key}, file)
    os.replace(writing, path)


def read_address(run_dir: Path, key: str, timeout_s: float) -> tuple[str, str]:
    """Wait for the file with `key`; its (url, token).

    Raises:
        UserError: it does not appear within `timeout_s` seconds, so the folder is not shared.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            found = json.loads((run_dir / ADDRESS_FILE).read_text())
            if found["key"] == key:
                return found["url"], found["token"]
        except FileNotFoundError:
            pass
        if time.monotonic() > deadline:
            raise UserError("run-folder-stale", run_dir=run_dir)
        time.sleep(0.1)
