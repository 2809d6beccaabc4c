"""The process that coordinates islands: `qlora-dist coordinate`, and a child of a `train` that starts them all."""

import contextlib
import json
import os
import secrets
import socket
import sys
from pathlib import Path

from qlora_dist.aggregate.coordinator import OuterCoordinator
from qlora_dist.aggregate.outer_loop import packs_in_all
from qlora_dist.aggregate.round_report import RoundReport
from qlora_dist.cluster.address_file import ADDRESS_FILE, write_address
from qlora_dist.cluster.outcome import Outcome
from qlora_dist.cluster.second_start import refuse_second_start
from qlora_dist.cluster.stop_signals import StopSignals, stop_on_signals, tell
from qlora_dist.config.errors import UserError
from qlora_dist.config.load import to_yaml
from qlora_dist.config.schema import RunConfig
from qlora_dist.coordinate import report
from qlora_dist.coordinate.decisions import Decisions
from qlora_dist.coordinate.host import this_host
from qlora_dist.coordinate.outer_address import TOKEN_VARIABLE
from qlora_dist.coordinate.replay import Run
from qlora_dist.coordinate.rundir import ADAPTER, RUN_FILE, open_run
from qlora_dist.coordinate.service import CoordinatorService
from qlora_dist.track.attempt import open_metrics

LOCK_TIMEOUT_S = 60.0


def coordinate(config: RunConfig, run_dir: Path, host: str, port: int | None, alone: bool = True) -> Outcome:
    """Coordinate a run of islands until everything is trained or the run is stopped.

    Started again it has the port and the token that it had before, so that islands which are still there find it.

    Args:
        port: None for the one it had, or a free one.
        alone: a person has started it; else whoever has opened the run folder and hears signals.

    Raises:
        UserError: there are no islands to coordinate, the run is alive, or the port cannot be had.
    """
    if config.aggregate.islands < 2:
        raise UserError("coordinate-without-islands")
    run_dir = run_dir.resolve()
    if alone:
        refuse_second_start(run_dir)
        if (ended := look_back(config, run_dir)) is not None:
            return ended
        open_run(run_dir, to_yaml(config))
        start_job(run_dir, "coordinate")
    metrics = open_metrics(config, run_dir, 0, max(1, rounds_done(run_dir)), tell)
    myself = {"host": this_host(), "pid": os.getpid()}
    coordinator = OuterCoordinator(config, run_dir, RoundReport(metrics, run_dir, config.aggregate.islands, myself))
    token, url, service = serve(coordinator, run_dir, host, port)
    try:
        write_address(run_dir, url, token, str(os.getpid()))
        if alone:
            tell(f"coordinating {config.aggregate.islands} islands at {url}; the token is in {run_dir / ADDRESS_FILE}")
        with stop_on_signals(run_dir) if alone else contextlib.nullcontext() as signals:
            coordinator.run()
        outcome = read_end(run_dir)
        return signals.outcome(outcome) if isinstance(signals, StopSignals) else outcome
    finally:
        service.stop()
        metrics.close()


def serve(
    coordinator: OuterCoordinator, run_dir: Path, host: str, port: int | None
) -> tuple[str, str, CoordinatorService]:
    """Start the service; its token, its URL for others, and itself."""
    before = {}
    if (run_dir / ADDRESS_FILE).exists():
        before = json.loads((run_dir / ADDRESS_FILE).read_text())
    token = os.environ.get(TOKEN_VARIABLE) or before.get("token") or secrets.token_urlsafe(32)
    known = int(before["url"].rpartition(":")[2]) if before else 0
    try:
        service = CoordinatorService(coordinator, token, host, known if port is None else port, coordinator)
    except OSError as error:
        if port is not None or not known:
            where = f"a free port of {host}" if port is None else f"port {port} of {host}"
            raise UserError("coordinator-port-taken", where=where, error=error.strerror) from error
        # Somebody else's by now; islands that are started anew read the new one from the file.
        service = CoordinatorService(coordinator, token, host, 0, coordinator)
    name = reached_at() if host in ("0.0.0.0", "::", "") else host
    return token, f"http://{name}:{service.port}", service


def reached_at() -> str:
    """The name by which other machines find this one: Slurm's name of a node need be none."""
    try:
        socket.gethostbyname(this_host())
    except OSError:
        return socket.gethostname()
    return this_host()


def start_job(run_dir: Path, launcher: str) -> None:
    """Note that the job has been started (again): what was asked of it and went wrong before is forgotten."""
    decisions = Decisions(run_dir, LOCK_TIMEOUT_S)
    with decisions.deciding():
        facts = {"launcher": launcher, "host": this_host(), "pid": os.getpid()}
        decisions.decide("job", started_generation=0, session=None, **facts)


def look_back(config: RunConfig, run_dir: Path) -> Outcome | None:
    """How the run has ended, where everything that it began with is trained; else None.

    Raises:
        UserError: it has, and by these settings there is more to train, or less.
    """
    if not (run_dir / RUN_FILE).exists():
        return None
    run = replayed(run_dir)
    if run.begun is None:
        return None
    began, wanted = run.begun["packs"], packs_in_all(config, run.begun["num_packs"])
    if run.finished is None or not run.finished["summary"].get("complete"):
        if began != wanted:
            tell(f"these settings make {wanted:,} packs in all; the run goes on with the {began:,} that it began with")
        return None
    if began != wanted:
        raise UserError("islands-other-packs", folder=run_dir, began=began, wanted=wanted)
    tell(f"everything is trained already; the adapter is in {run_dir / ADAPTER}")
    return read_end(run_dir)


def replayed(run_dir: Path) -> Run:
    """The run as its event log has it."""
    decisions = Decisions(run_dir, LOCK_TIMEOUT_S)
    decisions.catch_up()
    return decisions.run


def rounds_done(run_dir: Path) -> int:
    """How many rounds are committed."""
    return replayed(run_dir).rounds.round


def read_end(run_dir: Path) -> Outcome:
    """How the run ended, by its event log."""
    told = report.outcome(replayed(run_dir))
    if told["exit_code"] == 0:
        return Outcome(0, told["message"], summary=told["summary"], step=told["step"])
    return Outcome(told["exit_code"] or 1, told["message"] or "the coordinator ended before the run did")


def listens_at(config: RunConfig) -> str:
    """Where the coordinator of a `train` that starts everything listens: islands of a Ray cluster are on any node."""
    return "127.0.0.1" if config.launch.address is None else "0.0.0.0"


def main(config_json: str) -> int:
    """Be the coordinator that `train` has started; its output is a file."""
    config = RunConfig.model_validate_json(config_json)
    try:
        coordinate(config, config.run_dir, listens_at(config), None, alone=False)
    except UserError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return 2
    return 0
