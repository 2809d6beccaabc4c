"""A run as a job of a Ray cluster somewhere else: submitted, followed and stopped over the cluster's HTTP jobs API.

The job is `qlora-dist train` on the cluster's head node (or wherever Ray puts it); this process may leave and the run
goes on. The configuration travels, secrets do not: whoever starts the cluster's nodes gives them theirs.
"""

import asyncio
import contextlib
import importlib.util
import logging
import os
import secrets
import shlex
import socket
import sys
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_dist.config.errors import UserError
from qlora_dist.config.load import to_yaml
from qlora_dist.config.redact import redact
from qlora_dist.config.schema import RunConfig

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

INTERRUPTED = 130
PROBE_TIMEOUT_S = 5.0
POLL_S = 1.0
# How long a cluster may be out of reach before it is given up.
PATIENCE_S = 60.0
FINISH_S = 10.0
# For the small job that passes a stop on.
STOP_JOB_S = 120.0
# From the SIGTERM of `ray job stop` to the SIGKILL: time for a checkpoint, where Ray gives 3 s.
NOTICE_S = "120"
NOT_SENT = ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY")


def connect(address: str) -> "JobSubmissionClient":
    """A client of the jobs API at `address`; the token, where the cluster wants one, is the environment's.

    Args:
        address: `http://HOST:8265` or `https://HOST`, where Ray's dashboard answers.

    Raises:
        UserError: ray[default] is not installed, nobody answers there, or the token is wrong.
    """
    if importlib.util.find_spec("aiohttp") is None:
        raise UserError("ray-jobs-not-installed")
    parts = urllib.parse.urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError("ray-jobs-address-form", address=address)
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        # Ray's client would wait for ever for a host that drops what it does not want.
        socket.create_connection((parts.hostname, port), timeout=PROBE_TIMEOUT_S).close()
    except (OSError, ValueError) as error:
        raise UserError("ray-jobs-not-there", address=address, error=error) from error
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    try:
        with _without("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
            return JobSubmissionClient(address)
    except AuthenticationError as error:
        raise UserError("ray-jobs-token", address=address) from error
    except (RuntimeError, ConnectionError, ValueError) as error:
        raise UserError("ray-jobs-refused", address=address, error=error) from error


def submit(client: "JobSubmissionClient", config: RunConfig, python: str = "python") -> str:
    """Submit the run; the submission id.

    Args:
        config: with absolute paths, each of which every node of the cluster sees.
        python: the cluster's Python that has qlora-dist.

    Raises:
        UserError: `launch.backend` is not ray, or the cluster refuses the job.
    """
    if config.launch.backend != "ray":
        raise UserError("submit-needs-ray", backend=config.launch.backend)
    # The job is on the cluster that it is to use, wherever a driver would have to look for that one.
    config = config.model_copy(update={"launch": config.launch.model_copy(update={"address": None})})
    submission_id = f"{config.name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
    with tempfile.TemporaryDirectory(prefix="qlora-dist-") as folder:
        (Path(folder) / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
        return _submit(
            client,
            submission_id,
            f"{shlex.quote(python)} -m qlora_dist.cli train config.yaml",
            # Unbuffered, so that the stream shows lines as they are written.
            {"working_dir": folder, "env_vars": {"PYTHONUNBUFFERED": "1", "RAY_JOB_STOP_WAIT_TIME_S": NOTICE_S}},
            {"run_dir": str(config.run_dir)},
        )


def _submit(
    client: "JobSubmissionClient",
    submission_id: str,
    entrypoint: str,
    runtime_env: dict[str, Any] | None = None,
    metadata: dict[str, str] | None = None,
) -> str:
    try:
        return client.submit_job(
            entrypoint=entrypoint, submission_id=submission_id, runtime_env=runtime_env, metadata=metadata
        )
    except (RuntimeError, OSError) as error:
        raise UserError("ray-jobs-refused", address=client.get_address(), error=error) from error


def not_sent() -> list[str]:
    """Secrets that this machine's environment has and the job does not get."""
    return [name for name in NOT_SENT if os.environ.get(name)]


def follow(client: "JobSubmissionClient", submission_id: str, run_dir: Path, python: str = "python") -> int:
    """Show the job's output until it ends.

    The first Ctrl-C asks the run for a checkpoint and its end, and goes on showing; the second leaves the job alone.

    Returns:
        The exit code of the run: 0 finished or stopped, 2 where a person must mend something, 130 where it was left
        or ended from outside, else 1.

    Raises:
        UserError: the cluster is out of reach for `PATIENCE_S` seconds.
    """
    output = Output(client, submission_id)
    asked = False
    while True:
        try:
            details = _wait_for_end(client, submission_id)
            break
        except KeyboardInterrupt:
            if asked:
                print(f"\nleft; the job goes on: {_how_to_look(client, submission_id)}", file=sys.stderr)
                return INTERRUPTED
            print("\nasking the run for a checkpoint and its end; Ctrl-C again leaves it running", file=sys.stderr)
            with contextlib.suppress(KeyboardInterrupt):
                asked = pass_stop_on(client, run_dir, python)
    output.finish()
    if details.status == "SUCCEEDED":
        return 0
    if details.status == "STOPPED":
        print("the job was ended from outside; submitting it again goes on from the last checkpoint", file=sys.stderr)
        return INTERRUPTED
    if details.driver_exit_code is None:
        print(f"error: the job failed: {redact(details.message or 'Ray does not say why')}", file=sys.stderr)
    return details.driver_exit_code if (details.driver_exit_code or 0) > 0 else 1


def pass_stop_on(client: "JobSubmissionClient", run_dir: Path, python: str = "python") -> bool:
    """Ask the run to stop, by a small job: the run folder is on the cluster's storage, which we may not see.

    Returns:
        Whether it was asked; if not, the reason was printed.
    """
    entrypoint = f"{shlex.quote(python)} -m qlora_dist.cli stop --no-wait {shlex.quote(str(run_dir))}"
    try:
        refusal = _refusal(client, _submit(client, f"stop-{secrets.token_hex(6)}", entrypoint))
    except (OSError, RuntimeError, UserError) as error:
        refusal = str(error)  # the run goes on, and so does the showing
    if refusal is not None:
        print(f"the run could not be asked to stop: {redact(refusal)}", file=sys.stderr)
    return refusal is None


def _refusal(client: "JobSubmissionClient", submission_id: str) -> str | None:
    """Why a job that asks for a stop failed; None where it did not."""
    deadline = time.monotonic() + STOP_JOB_S
    while not (details := client.get_job_info(submission_id)).status.is_terminal():
        if time.monotonic() > deadline:
            return f"the cluster has not done {submission_id} within {STOP_JOB_S:.0f} s"
        time.sleep(POLL_S)
    if details.status == "SUCCEEDED":
        return None
    said = [line for line in client.get_job_logs(submission_id).splitlines() if line.startswith("error: ")]
    return said[-1].removeprefix("error: ") if said else details.message or "no reason given"


def _wait_for_end(client: "JobSubmissionClient", submission_id: str) -> Any:
    heard = time.monotonic()
    while True:
        try:
            details = client.get_job_info(submission_id)
            if details.status.is_terminal():
                return details
            heard = time.monotonic()
        except (OSError, RuntimeError) as error:
            if time.monotonic() - heard > PATIENCE_S:
                raise UserError("ray-jobs-lost", job=submission_id, seconds=PATIENCE_S, error=error) from error
        time.sleep(POLL_S)


class Output:
    """Writes a job's output to stdout from a thread; where the connection breaks, on from where it broke."""

    def __init__(self, client: "JobSubmissionClient", submission_id: str):
        self._client, self._submission_id = client, submission_id
        self._over = threading.Event()
        self._written = 0
        logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.ERROR)
        self._thread = threading.Thread(target=self._stream, name="job-output", daemon=True)
        self._thread.start()

    def _show(self, text: str, start: int) -> None:
        """Write what is new of `text`, which begins at character `start` of the output."""
        sys.stdout.write(text[max(0, self._written - start) :])
        sys.stdout.flush()
        self._written = max(self._written, start + len(text))

    async def _tail(self) -> None:
        seen = 0
        async for text in self._client.tail_job_logs(self._submission_id):
            self._show(text, seen)
            seen += len(text)

    def _stream(self) -> None:
        import aiohttp

        while not self._over.is_set():
            try:
                asyncio.run(self._tail())
                return
            except (RuntimeError, OSError, aiohttp.ClientError):
                self._over.wait(POLL_S)  # `_wait_for_end` tells of a cluster that stays away

    def finish(self) -> None:
        """Write the rest of the output of a job that has ended: Ray's stream may end before its last lines."""
        self._over.set()
        self._thread.join(FINISH_S)
        if not self._thread.is_alive():
            self._show(self._client.get_job_logs(self._submission_id), 0)


def _how_to_look(client: "JobSubmissionClient", submission_id: str) -> str:
    return f"`ray job logs --follow --address {client.get_address()} {submission_id}`"


@contextlib.contextmanager
def _without(*names: str) -> Iterator[None]:
    """These variables unset inside the block: Ray's client prefers them to the address it is given."""
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)
