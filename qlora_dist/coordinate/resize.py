"""A planned change of the number of workers: asked for, waited for at a step boundary, done or called off.

The launcher asks. Every rank hears of it in the answer to a heartbeat; they agree on a step boundary, make a checkpoint
there, and once it is committed rank 0 says that they hold still. Only then does the launcher end the group, so that no
step is lost. The next generation makes the resize done; a failure, a stop, the end of the run or the launcher calls it
off, and ranks that hold still go on.
"""

from typing import Any

from qlora_dist.coordinate.decisions import Decisions


def ask(decisions: Decisions, workers: int, reason: str) -> dict[str, Any]:
    """Answer to `Coordinator.request_resize`."""
    with decisions.deciding() as run:
        if run.state() != "running" or run.stop is not None:
            return {"asked": False}
        if run.resize is None:
            fields = {"workers_before": len(run.members), "workers": workers, "reason": reason}
            decisions.decide("resize", generation=run.generation, **fields)
    return {"asked": True}


def hold(decisions: Decisions, generation: int, step: int) -> dict[str, Any]:
    """Answer to `Coordinator.held`."""
    with decisions.deciding() as run:
        if generation != run.generation:
            return {"recorded": False}
        if run.resize is not None and run.held is None:
            if (generation, step) not in {(e["generation"], e["step"]) for e in run.committed.values()}:
                raise ValueError(f"step {step} of generation {generation} has no checkpoint, so nobody may hold there")
            decisions.decide("held", generation=generation, step=step)
    return {"recorded": True}


def call_off(decisions: Decisions, reason: str) -> dict[str, Any]:
    """Answer to `Coordinator.cancel_resize`."""
    with decisions.deciding() as run:
        if run.resize is not None:
            decisions.decide("resize_off", generation=run.generation, reason=reason)
    return {}


def stands(decisions: Decisions) -> dict[str, Any]:
    """Answer to `Coordinator.resize_state`."""
    decisions.catch_up()
    with decisions.memory:
        run = decisions.run
        held = None if run.held is None else run.held["step"]
        return {"asked": run.resize is not None, "held_step": held}
