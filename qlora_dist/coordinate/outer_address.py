"""Where the coordinator of islands is, and its secret, as an island finds them."""

import json
import os
import re
import time
from pathlib import Path

from qlora_dist.config.errors import UserError
from qlora_dist.coordinate.log import EventLog
from qlora_dist.coordinate.replay import Run
from qlora_dist.coordinate.rundir import EVENTS_FILE

TOKEN_VARIABLE = "QLORA_DIST_TOKEN"
ADDRESS_FILE = "coordinator.json"
# The token for workers on other nodes, whose environment is not the starter's.
OUTER_FILE = "outer.json"
# For a coordinator that starts at the same time; it imports torch.
START_S = 120.0


def outer_address(coordinator: str, run_dir: Path) -> tuple[str, str]:
    """The (url, token) that `aggregate.coordinator` stands for.

    Args:
        coordinator: HOST:PORT, a URL, or the coordinator's run folder.
        run_dir: the island's own, in which its starter may have left the token (`keep_token`).

    Raises:
        UserError: it is neither, the token is not known, or the run in the folder has trained everything.
    """
    file = Path(coordinator).expanduser() / ADDRESS_FILE
    deadline = time.monotonic() + START_S
    while file.parent.is_dir() and not file.is_file() and time.monotonic() < deadline:
        time.sleep(0.2)
    if file.is_file():
        refuse_finished(coordinator)
        told = json.loads(file.read_text())
        return told["url"], told["token"]
    if not re.fullmatch(r"(https?://)?[A-Za-z0-9.\-\[\]:]+:\d+(/.*)?", coordinator):
        raise UserError("island-address-form", coordinator=coordinator)
    token = os.environ.get(TOKEN_VARIABLE)
    kept = run_dir / OUTER_FILE
    if not token and kept.is_file():
        token = json.loads(kept.read_text())["token"]
    if not token:
        raise UserError("island-token-missing", coordinator=coordinator)
    return (coordinator if "://" in coordinator else f"http://{coordinator}"), token


def refuse_finished(coordinator: str) -> None:
    """Raise where `coordinator` is the run folder of one that has ended because everything is trained.

    Raises:
        UserError: it has.
    """
    run_dir, run = Path(coordinator).expanduser(), Run()
    for event in EventLog(run_dir / EVENTS_FILE).read_new():
        run.apply(event)
    if run.finished is not None and run.finished["summary"].get("complete"):
        raise UserError("islands-done", coordinator=run_dir, adapter=run.finished["summary"]["adapter"])


def own_token(coordinator: str, run_dir: Path) -> str | None:
    """The token that an island's run folder is to keep; None where it is in the coordinator's folder.

    Raises:
        UserError: as `outer_address`.
    """
    return None if Path(coordinator).expanduser().is_dir() else outer_address(coordinator, run_dir)[1]


def keep_token(token: str, run_dir: Path) -> None:
    """Leave the token in the island's run folder, in a file that only its owner reads."""
    writing = run_dir / f".{OUTER_FILE}.{os.getpid()}"
    descriptor = os.open(writing, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump({"token": token}, file)
    os.replace(writing, run_dir / OUTER_FILE)
