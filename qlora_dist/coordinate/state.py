"""The coordinator: it owns what no single worker may decide.

Every decision that must last (which attempt is the current generation, what is committed, how the run ended) is
made under the event log's lock after reading what others appended, so two coordinators over one folder (one that
was stopped and wakes up later) agree. What a killed coordinator leaves behind is put right by the next: a
checkpoint folder with a manifest is committed whether its event was written or not.
"""

import inspect
import logging
import time
from pathlib import Path
from typing import Any

from qlora_dist.config.errors import UserError
from qlora_dist.coordinate import report, resize
from qlora_dist.coordinate.commit import commit
from qlora_dist.coordinate.decisions import Decisions
from qlora_dist.coordinate.files import empty_trash
from qlora_dist.coordinate.heard import PHASES, Heard, describe
from qlora_dist.coordinate.manifest import CHECKPOINTS
from qlora_dist.coordinate.replay import DECISIONS, normalise
from qlora_dist.coordinate.retention import sweep_writing
from qlora_dist.coordinate.rundir import read_run

logger = logging.getLogger(__name__)
Answer = dict[str, Any]
MESSAGES = frozenset(
    {
        "start_job", "join", "heartbeat", "who_is_missing", "commit", "fail", "finish", "request_stop", "outcome",
        "should_restart", "request_resize", "held", "cancel_resize", "resize_state", "note", "status",
    }
)  # fmt: skip


# Each time a quarter of the layers gives up what it keeps.
MOST_LEANER = 4


class Coordinator:
    """One method a message; arguments and answers are JSON. Any number of threads may call it.

    Args:
        run_dir: an opened run folder (`rundir.open_run`).
        keep_last, keep_best: retention, as in `checkpoint.keep_last` and `checkpoint.keep_best`.
        status_every_s: least seconds between two status files that heartbeats cause.
        settle_s: seconds that a network filesystem may take to show files written on another node.
        lock_timeout_s: seconds to wait for the event log's lock.
    """

    def __init__(
        self,
        run_dir: Path | str,
        keep_last: int = 3,
        keep_best: int = 1,
        status_every_s: float = 1.0,
        settle_s: float = 10.0,
        lock_timeout_s: float = 60.0,
    ):
        self.run_dir = Path(run_dir)
        self.info = read_run(self.run_dir)
        self._keep_last, self._keep_best = max(1, keep_last), keep_best
        self._status_every_s, self._settle_s = status_every_s, settle_s
        self._decisions = Decisions(self.run_dir, lock_timeout_s)
        self._heard = Heard()
        self._pending: dict[str, dict[int, dict[str, Any]]] = {}
        self._status_time = -1e9
        with self._decisions.deciding():
            pass

    def _current(self) -> Heard:
        """What the ranks of the current generation said; to be called, and used, under the memory's lock."""
        run = self._decisions.run
        if self._heard.generation != run.generation:
            self._heard = Heard(run.generation, run.members, time.monotonic())
        return self._heard

    # Messages

    def handle(self, method: str, **kwargs: Any) -> Answer:
        """Answer one message; what every transport calls.

        Raises:
            ValueError: there is no such message, or its arguments are wrong.
        """
        if method not in MESSAGES:
            raise ValueError(f"the coordinator has no message {method!r}")
        message = getattr(self, method)
        try:
            inspect.signature(message).bind(**kwargs)
        except TypeError as error:
            raise ValueError(str(error)) from None
        answer: Answer = message(**kwargs)
        return answer

    def start_job(self, session: str | None = None, **fields: Any) -> Answer:
        """A person or a queue started the job (again): failures counted so far are forgotten.

        Args:
            session: names a launcher that starts workers again by itself; with the last job's session it is that job.

        Returns:
            {"started_generation": the newest generation before this job, 0 for none}, as `resolve_resume` wants it.
        """
        with self._decisions.deciding() as run:
            if session is not None and session == run.session:
                return {"started_generation": run.started_generation}
            started = self._decisions.known_generation()
            self._decisions.decide("job", started_generation=started, session=session, **fields)
        self._write_status()
        return {"started_generation": started}

    def join(self, attempt: str, rank: int, world_size: int, host: str, pid: int) -> Answer:
        """A rank of a worker group wants to work. It asks again until `generation` is a number or it is refused.

        A group becomes the current generation when all its ranks have asked. Groups that began to ask before that
        and were not complete are dead from then on, so a group that was cut off cannot fence the living.

        Args:
            attempt: a random string that the ranks of one group share, and no other group ever used.

        Returns:
            {"generation": int | None, "refused": sentence | None, "joined": ranks that have asked}.
        """
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is outside a world of {world_size}")
        member = {"rank": rank, "host": host, "pid": pid}
        with self._decisions.memory:
            self._decisions.catch_up()
            if (answer := self._known_answer(attempt, member, world_size)) is not None:
                return answer
            asked = self._pending.setdefault(attempt, {})
            asked[rank] = {**member, "world_size": world_size}
            waiting = attempt in self._decisions.run.joining and len(asked) < world_size
            joined = sorted(asked)
        if waiting:
            return {"generation": None, "refused": None, "joined": joined}
        with self._decisions.deciding() as run:
            if (answer := self._known_answer(attempt, member, world_size)) is not None:
                return answer
            if attempt not in run.joining:
                self._decisions.decide("joining", attempt=attempt, world_size=world_size, host=host, pid=pid)
            with self._decisions.memory:
                asked = dict(self._pending.get(attempt, {}))
            if len(asked) < world_size:
                return {"generation": None, "refused": None, "joined": sorted(asked)}
            members = [{k: v for k, v in asked[r].items() if k != "world_size"} for r in sorted(asked)]
            generation = self._decisions.known_generation() + 1
            self._decisions.decide("generation", generation=generation, attempt=attempt, members=members)
            with self._decisions.memory:
                over = run.dead | run.attempts.keys()
                self._pending = {name: ranks for name, ranks in self._pending.items() if name not in over}
            sweep_writing(self.run_dir, generation)
        empty_trash(self.run_dir / CHECKPOINTS)
        self._write_status()
        return {"generation": generation, "refused": None, "joined": sorted(asked)}

    def _known_answer(self, attempt: str, member: dict[str, Any], world_size: int) -> Answer | None:
        """The answer to a join where it is decided already."""
        run, rank, refused = self._decisions.run, member["rank"], None
        with self._decisions.memory:
            before = self._pending.get(attempt, {}).get(rank)
            sizes = {asked["world_size"] for asked in self._pending.get(attempt, {}).values()}
        if attempt in run.attempts and run.attempts[attempt] == run.generation:
            if member in run.members:
                joined = [other["rank"] for other in run.members]
                return {"generation": run.generation, "refused": None, "joined": joined}
            refused = f"generation {run.generation} is complete without this process (rank {rank}, pid {member['pid']})"
        elif attempt in run.attempts:
            refused = f"this was generation {run.attempts[attempt]}; generation {run.generation} has taken its place"
        elif attempt in run.dead:
            refused = f"generation {run.generation} started while this group was still incomplete"
        elif sizes - {world_size}:
            refused = f"the ranks of this group do not agree on its size: {sorted(sizes | {world_size})}"
        elif before is not None and (before["host"], before["pid"]) != (member["host"], member["pid"]):
            refused = f"rank {rank} of this group is pid {before['pid']} on host {before['host']} already"
        return None if refused is None else {"generation": None, "refused": refused, "joined": []}

    def heartbeat(
        self, generation: int, rank: int, step: int | None, phase: str, seconds_in_phase: float = 0.0, **metrics: Any
    ) -> Answer:
        """A rank is alive; about once a second, from a thread of its own.

        Args:
            step: the optimizer step it works on.
            phase: what it does: compute, collective, checkpoint or setup.
            metrics: JSON values for the status; known ones are loss, max_steps, seconds_left, tokens_per_second
                (this rank's), memory_bytes, and busy: (seconds outside collectives, steps, positions computed) since
                the attempt began, from which stragglers are found.

        Returns:
            {"current": False when a newer generation has started (the rank is to end), "stop": True when the run is
            to end after a checkpoint, "hold": True when all ranks are to make a checkpoint and hold still after it,
            "generation": the current one}.
        """
        if phase not in PHASES:
            raise ValueError(f"phase {phase!r} is none of {', '.join(PHASES)}")
        self._decisions.catch_up(max_age_s=0.5)
        with self._decisions.memory:
            current = generation == self._decisions.run.generation
            stragglers: list[dict[str, Any]] = []
            if current:
                fields = {"step": step, "phase": phase, "seconds_in_phase": seconds_in_phase, **metrics}
                stragglers = self._current().take(rank, time.monotonic(), fields)
            due = time.monotonic() - self._status_time > self._status_every_s
            answer = {
                "current": current,
                "stop": self._decisions.run.stop is not None,
                "hold": current and self._decisions.run.resize is not None,
                "generation": self._decisions.run.generation,
            }
        for change in stragglers:
            self._tell_of_straggler(generation, change)
        if current and due:
            self._write_status()
        return answer

    def _tell_of_straggler(self, generation: int, change: dict[str, Any]) -> None:
        try:
            self.note("straggler", generation=generation, **change)
        except UserError as error:
            # It is in the status, too; a full disk is reported by whoever has something to keep.
            logger.warning("an event cannot be logged: %s", error)

    def who_is_missing(self, generation: int, timeout_s: float) -> Answer:
        """Whom a rank waits for whose collective took `timeout_s` seconds.

        Ranks that were silent for half of that time; if there are none, those that do something else while others
        wait in a collective; if there are none, those that wait at another step. If all are silent it is the
        coordinator that was away, and nobody is named.

        Returns:
            {"missing": [{rank, host, pid, step, phase, reason, sentence}], "sentence": all of it for a person}.
        """
        self._decisions.catch_up()
        with self._decisions.memory:
            if generation != self._decisions.run.generation:
                text = (
                    f"generation {generation} is over, generation {self._decisions.run.generation} has taken its place"
                )
                return {"missing": [], "sentence": text}
            missing = self._current().missing(time.monotonic(), timeout_s)
            if self._current().all_silent(time.monotonic(), timeout_s):
                text = "no rank has been heard of: the coordinator itself was held up"
                return {"missing": [], "sentence": text}
        return {"missing": missing, "sentence": describe(missing)}

    def commit(
        self, generation: int, step: int, folder: str, files: dict[str, dict[str, Any]], metrics: dict[str, Any]
    ) -> Answer:
        """Make a written folder a checkpoint. Asking twice does no harm.

        A step that this generation has committed already keeps its first files; new metrics are added to it.

        Args:
            folder: name of the `.writing-...` folder in `checkpoints/`, every file in it on the disk.
            files: name -> {"bytes": size, "sha256": hexadecimal digits}.
            metrics: JSON values; `eval_loss` decides what `keep_best` keeps.

        Returns:
            {"committed": bool, "fenced": True if refused for a newer generation, "reason": sentence | None,
            "folder": name of the committed folder | None}.

        Raises:
            UserError: no space, no permission; nothing was committed, or it is found at the next start.
        """
        retention = (self._keep_last, self._keep_best)
        answer = commit(
            self._decisions, self.info.run_id, generation, step, folder, files, metrics, *retention, self._settle_s
        )
        if answer["committed"]:
            self._write_status()
        return answer

    def fail(
        self,
        generation: int | None,
        rank: int | None,
        kind: str,
        message: str,
        step: int | None = None,
        attempt: str | None = None,
    ) -> Answer:
        """A rank (None: the driver) failed.

        Args:
            generation: None before the group became one; then `attempt` says whose failure it is.
            kind: "user" for what a person can mend (`message` is the sentence); "memory" for a full GPU, which a plan
                that keeps less may mend, and after that a person; else "error".

        Returns:
            {"recorded": False when it is the failure of a group whose time is over}.
        """
        if kind not in ("user", "memory", "error"):
            raise ValueError(f"a failure is of kind user, memory or error, not {kind!r}")
        fields = {"generation": generation, "rank": rank, "failure": kind, "message": message, "step": step}
        try:
            with self._decisions.deciding() as run:
                if generation is None:
                    over = attempt in run.dead or run.attempts.get(attempt or "", run.generation) != run.generation
                else:
                    over = generation != run.generation
                if over:
                    return {"recorded": False}
                self._decisions.decide("failed", **fields)
        except UserError as error:
            # A full disk is the likeliest failure of all: the driver must hear of it although the log cannot.
            logger.error("the failure cannot be logged: %s", error)
            with self._decisions.memory:
                if generation in (None, self._decisions.run.generation):
                    self._decisions.run.apply({"kind": "failed", "time": time.time(), **fields})
        self._write_status()
        return {"recorded": True}

    def finish(self, generation: int, step: int, summary: dict[str, Any]) -> Answer:
        """The run is done (or ended early because a stop was asked for). Asking twice does no harm."""
        with self._decisions.deciding() as run:
            if generation != run.generation:
                return {"recorded": False}
            if run.finished is None:
                self._decisions.decide("finished", generation=generation, step=step, summary=summary)
        self._write_status()
        return {"recorded": True}

    def request_stop(self, reason: str) -> Answer:
        """Ask the workers to make a checkpoint and end; they see it in the answers to their heartbeats."""
        with self._decisions.deciding():
            self._decisions.decide("stop", reason=reason)
        self._write_status()
        return {}

    def outcome(self) -> Answer:
        """How the run stands or ended; see `report.outcome`."""
        self._decisions.catch_up()
        with self._decisions.memory:
            return report.outcome(self._decisions.run)

    def should_restart(
        self, message: str, step: int | None = None, max_restarts: int | None = None, counted: bool = True
    ) -> Answer:
        """Whether the driver is to start a new worker group after a failure; the decision is kept.

        No, when a person must mend something, when the same failure (numbers and addresses aside) happened at the
        same step since the job started and nothing was committed in between, or when there were `max_restarts`. A run
        that is out of memory goes on with a leaner plan each time, `MOST_LEANER` times.

        Args:
            step: where it failed; None where the driver cannot know: the furthest step a rank told of.
            counted: False for the loss of a node in a run that goes on with those left: `max_restarts` does not bound
                these.

        Returns:
            {"restart": bool, "reason": sentence}.
        """
        with self._decisions.deciding() as run:
            failure = run.failure()
            if step is None:
                step = failure["step"] if failure is not None else None
            if step is None:
                with self._decisions.memory:
                    step = self._current().step()
            # What ranks tell is up to a second old: a step may be an earlier one's. A commit is progress.
            same = [
                event
                for event in run.restarts
                if normalise(event["message"]) == normalise(message)
                and (event["step"], event.get("commits", run.commits)) == (step, run.commits)
            ]
            restarts = sum(event["restart"] and event.get("counted", True) for event in run.restarts)
            if failure is not None and failure["failure"] == "user":
                restart, reason = False, failure["message"]
            elif failure is not None and failure["failure"] == "memory":
                # They have a limit of their own.
                restart, reason, counted = run.out_of_memory <= MOST_LEANER, failure["message"], False
            elif same:
                where = "before the first step" if step is None else f"at step {step}"
                restart, reason = False, f"the same failure happened twice {where}: {message}"
            elif counted and max_restarts is not None and restarts >= max_restarts:
                restart, reason = False, f"the run was restarted {restarts} times and failed again: {message}"
            else:
                restart, reason = True, message
            fields = {"message": message, "step": step, "restart": restart, "reason": reason, "counted": counted}
            fields["commits"] = run.commits
            self._decisions.decide("restart", generation=run.generation, **fields)
        self._write_status()
        return {"restart": restart, "reason": reason}

    def request_resize(self, workers: int, reason: str) -> Answer:
        """Ask the workers for a checkpoint at the next step boundary, after which the group is to be of `workers`.

        Returns:
            {"asked": False when there is no group at work that could be resized}.
        """
        answer = resize.ask(self._decisions, workers, reason)
        self._write_status()
        return answer

    def held(self, generation: int, step: int) -> Answer:
        """All ranks hold still after `step`, whose checkpoint is committed; rank 0 says so.

        Returns:
            {"recorded": False from a group whose time is over}.
        """
        answer = resize.hold(self._decisions, generation, step)
        self._write_status()
        return answer

    def cancel_resize(self, reason: str) -> Answer:
        """The resize will not happen; ranks that hold still go on."""
        answer = resize.call_off(self._decisions, reason)
        self._write_status()
        return answer

    def resize_state(self) -> Answer:
        """Where a resize stands: {"asked": bool, "held_step": where all ranks hold still, else None}."""
        return resize.stands(self._decisions)

    def note(self, kind: str, **fields: Any) -> Answer:
        """Keep an event of no consequence in the log."""
        if kind in DECISIONS:
            raise ValueError(f"{kind!r} is a decision, not a note")
        with self._decisions.deciding():
            self._decisions.decide(kind, **fields)
        return {}

    def status(self) -> Answer:
        """What a person wants to know of the run; see `report.build`."""
        self._decisions.catch_up()
        with self._decisions.memory:
            joined = max((sorted(asked) for asked in self._pending.values()), key=len, default=[])
            return report.build(self.info.run_id, self._decisions.run, self._current(), joined)

    def _write_status(self) -> None:
        with self._decisions.memory:
            self._status_time = time.monotonic()
            status = self.status()
        try:
            report.write(self.run_dir, status)
        except OSError as error:
            # The status is for looking at: a full disk is reported by whoever has something to keep.
            logger.warning("the status cannot be written: %s", error)
