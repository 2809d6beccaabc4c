"""One peer's training steps: `python -m qlora_dist.bench.peer_process JOB.json RESULT.json`.

Loads the peer's libraries and, of qlora-dist, the list of peers alone. What fails ends with a traceback and an exit
code, which the parent turns into a row.
"""

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from qlora_dist.bench.peers import PEERS, Job

# Steps that must be measured where the time runs out before all of them are.
LEAST_STEPS = 3


def main(job_file: Path, result_file: Path) -> None:
    """Build the peer that the job names, take its steps, write what they came to."""
    settings = json.loads(job_file.read_text())
    paths = {key: Path(settings["job"][key]) for key in ("base", "batches")}
    job = Job(**settings["job"] | paths)
    started = time.monotonic()
    peer = PEERS[settings["peer"]]
    # Unsloth patches transformers and wants to be imported before it, so nothing comes before this.
    model, autocast = peer.build(job)
    loaded = time.monotonic()
    deadline = started + settings["seconds"]
    if peer.trainer:
        from qlora_dist.bench.peer_trl import train

        result = train(model, job, settings["warm_up"], settings["steps"], deadline)
    else:
        result = take_steps(model, job, autocast, settings["warm_up"], settings["steps"], deadline)
    result["load_seconds"] = loaded - started
    result_file.write_text(json.dumps(result))


def take_steps(model: Any, job: Job, autocast: bool, warm_up: int, steps: int, deadline: float) -> dict[str, Any]:
    """The steps: 8-bit AdamW over the trained parameters, clipping at 1, each step timed up to its end on the device.

    Memory peaks are those of the steps, without loading's.
    """
    import torch
    from bitsandbytes.optim import AdamW8bit
    from safetensors.torch import load_file

    on_gpu = job.device.startswith("cuda")
    input_ids_SBT = load_file(job.batches)["input_ids"].to(job.device, torch.int64)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = AdamW8bit(trained, lr=1e-4)
    model.train()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    seconds: list[float] = []
    losses: list[float] = []
    while len(seconds) < warm_up + steps:
        if time.monotonic() > deadline and len(seconds) >= warm_up + LEAST_STEPS:
            break
        input_ids_BT = input_ids_SBT[len(seconds) % len(input_ids_SBT)]
        started = time.perf_counter()
        with torch.autocast(job.device.partition(":")[0], torch.bfloat16, enabled=autocast):
            loss = model(input_ids=input_ids_BT, labels=input_ids_BT, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return figures(model, job, seconds, losses, warm_up, tuple(input_ids_SBT.shape[1:]))


def figures(
    model: Any, job: Job, seconds: list[float], losses: list[float], warm_up: int, size: tuple[int, ...]
) -> dict[str, Any]:
    """A record's figures from the seconds of each step and the GPU's peaks; `size` is batch and length."""
    import torch

    on_gpu = job.device.startswith("cuda")
    measured, (batch, length) = seconds[warm_up:], size
    median = statistics.median(measured)
    return {
        "tokens_per_second": batch * length / median,
        "tokens_per_second_spread": [batch * length / max(measured), batch * length / min(measured)],
        "loss_tokens_per_second": batch * (length - 1) / median,
        "seconds_per_step": median,
        "steps": len(measured),
        "workers": 1,
        "peak_allocated_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None,
        "peak_reserved_gib": torch.cuda.max_memory_reserved() / 2**30 if on_gpu else None,
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "losses": losses,
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
