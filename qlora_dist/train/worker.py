"""The life of a worker, top to bottom. It knows its rank, device and coordinator, and not who started it."""

import json
import os
import secrets
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from qlora_dist.checkpoint.format import read_snapshot
from qlora_dist.checkpoint.manifest import list_checkpoints, resolve_resume
from qlora_dist.checkpoint.writer import BackgroundWriter
from qlora_dist.config.errors import UserError
from qlora_dist.config.redact import redact, redact_tree
from qlora_dist.config.schema import RunConfig
from qlora_dist.coordinate.client import Fenced, join_and_wait
from qlora_dist.coordinate.host import this_host
from qlora_dist.coordinate.rundir import check_shared
from qlora_dist.data.order import GlobalOrder
from qlora_dist.data.summary import data_line, data_notices, data_record, example_line, example_pieces
from qlora_dist.data.tokens import TokenTable, prepare_data
from qlora_dist.model.adapter import (
    adapter_config_json,
    attach_adapter,
    check_trainable,
    trainable_parameters,
    write_adapter,
)  # fmt: skip
from qlora_dist.model.base import compute_dtype, load_base, load_tokenizer
from qlora_dist.model.block import Block
from qlora_dist.model.fp8 import check_fp8
from qlora_dist.model.fused import fuse
from qlora_dist.model.gguf import rounding_note
from qlora_dist.model.resolve import resolve_base
from qlora_dist.optim.optimizers import build_optimizer
from qlora_dist.optim.schedules import build_schedule
from qlora_dist.shard.activations import offload_activations
from qlora_dist.shard.loading import make_placement
from qlora_dist.shard.strategy import make_strategy
from qlora_dist.track.attempt import open_metrics
from qlora_dist.train.activation_plan import set_activations
from qlora_dist.train.boundaries import check_document_boundaries
from qlora_dist.train.context import Worker
from qlora_dist.train.evaluate import answer_prompts
from qlora_dist.train.heartbeat import Heartbeat
from qlora_dist.train.identity import resume, run_identity
from qlora_dist.train.island_loop import IslandLoop
from qlora_dist.train.island_meeting import meet_islands
from qlora_dist.train.largest import largest_micro_batch, rehearsal_batch
from qlora_dist.train.leaner_plan import OutOfRoom, can_go_on
from qlora_dist.train.loop import Loop
from qlora_dist.train.progress import Progress
from qlora_dist.train.rehearsal import Rehearsal
from qlora_dist.train.step import LossScale, accumulate_gradients, lays_flat
from qlora_dist.train.vocabulary import check_vocabulary

# What CUDA's context, its libraries and NCCL take beside PyTorch's allocator, which alone can be capped.
BESIDE_ALLOCATOR_GIB = 2.0
# Two missed heartbeats and a little more.
SILENCE_S = 2.5


class WorkerLost(Exception):
    """A collective failed because a worker died, stopped or fell behind; the message names it."""


def train(config: RunConfig, worker: Worker) -> None:
    """Run one worker from start to end.

    What a person can mend is reported to the coordinator and not raised, so that nobody retries it; the launcher
    reads the outcome there. Everything else is reported and raised.

    Raises:
        WorkerLost: another worker is gone; the launcher restarts the group from the last checkpoint.
    """
    generation: int | None = None
    heartbeat: Heartbeat | None = None
    failed = True
    try:
        join_process_group(config, worker)
        generation = join_attempt(worker, config.launch.start_timeout_s)
        heartbeat = Heartbeat(worker.client, generation, worker.rank, worker.device)
        run_stages(config, worker, generation, heartbeat)
        failed = False
    except UserError as error:
        report(worker, generation, "user", error.message, heartbeat)
    except OutOfRoom as error:
        report(worker, generation, "memory", out_of_memory(error, config, worker).message, heartbeat)
        raise
    except torch.OutOfMemoryError as error:
        report(worker, generation, "user", out_of_memory(error, config, worker).message, heartbeat)
    except Fenced:
        # Another attempt has taken this one's place: whatever is said now would be said of that one.
        raise
    except Exception as error:
        lost = explain_failure(error, worker, generation, heartbeat)
        if lost is None:
            return
        report(worker, generation, "error", f"{type(lost).__name__}: {lost}", heartbeat)
        raise lost from error
    finally:
        if heartbeat is not None:
            heartbeat.stop()
        leave_process_group(worker, failed)


def run_stages(config: RunConfig, worker: Worker, generation: int, heartbeat: Heartbeat) -> None:
    """Data, base model, adapter, strategy, optimizer, resume, loop, final adapter."""
    lead = worker.rank == 0
    note = partial(tell, worker, generation) if lead else _ignore
    check_shared(worker.run_dir, worker.nonce)
    resume_from = agree(worker, resume_path(config, worker, note) if lead else None)

    placement = make_placement(
        config, worker.rank, worker.world_size, worker.local_rank, worker.local_world_size, worker.device
    )
    with placement:
        folder = placement.once(partial(resolve_base, config.model))
        tokenizer = load_tokenizer(folder, config.model.trust_remote_code)
        train_table, eval_table = prepare_data(config.data, tokenizer, config.seed)
        order = GlobalOrder(train_table.num_packs, config.global_batch_size, config.data.shuffle, config.seed)
        total_steps = config.train.max_steps or order.total_steps(config.train.num_train_epochs or 1.0)
        if lead:
            describe_data(note, tokenizer, train_table, eval_table, config, total_steps, worker.world_size)

        dtype = compute_dtype(config.model, worker.device)
        check_fp8(config.model, worker.device, dtype)
        base = load_base(config.model, folder, worker.device, config.adapter, placement)
    if placement.reason is not None:
        note("notice", placement.reason)
    check_vocabulary(base, tokenizer, [table for table in (train_table, eval_table) if table is not None])
    adapted = attach_adapter(base, config.adapter, config.seed, config.model.revision)
    if config.activations == "recompute":
        # transformers 5.2x has a new name for it and warns at the old one.
        enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    blocks: list[Block] = []
    if config.model.fused == "always" or (config.model.fused == "auto" and worker.device.type == "cuda"):
        blocks = fuse(adapted, partial(note, "notice"), config.model.compute)
    adapter_config = adapter_config_json(adapted)
    adapter_settings = json.loads(adapter_config)
    identity = agree(worker, run_identity(config, folder, train_table, adapter_settings) if lead else None)
    islands = None
    if config.aggregate.coordinator is not None:
        trained = trainable_parameters(adapted)
        islands = meet_islands(config, worker, identity, trained, partial(agree, worker), partial(note, "notice"))
    describe_model(note, adapted, config, dtype, folder)
    if config.activations == "offload":
        if worker.device.type == "cpu":
            note("notice", "shard.offload: the activations of a run on a CPU are in host memory anyway")
        else:
            offload_activations(adapted)

    if config.strategy == "none" and worker.world_size > 1:
        raise ValueError(f"strategy none with {worker.world_size} workers would train {worker.world_size} adapters")
    strategy = make_strategy(config, worker.world_size, worker.local_world_size, placement.loaded, placement.frozen)
    # DeepSpeed offloads the optimizer in its own way.
    on_host = "optimizer" in config.shard.offload and not config.strategy.startswith("zero")
    make_optimizer = partial(build_optimizer, config=config.train, notice=partial(note, "notice"), on_host=on_host)
    model = strategy.apply(adapted, make_optimizer)
    if config.data.packing:
        check_document_boundaries(model, lays_flat(config), dtype, worker.device)
    largest = largest_micro_batch(config, train_table)
    batch = rehearsal_batch(largest, tokenizer.pad_token_id, worker.device)
    # Between micro-batches some strategies hold gradients that they have not shared out yet.
    several = config.global_batch_size > config.train.per_device_train_batch_size * worker.world_size
    batches = [(batch, 0)] * (2 if several else 1)
    run = partial(accumulate_gradients, model, strategy, batches, batch.num_loss_tokens, 1.0, dtype)
    alone = can_go_on(config, worker.world_size)
    rehearsal = Rehearsal(
        run, strategy, worker.device, largest, dtype.itemsize, alone, local_workers=worker.local_world_size
    )
    leaner = agree(worker, worker.client.call("outcome")["out_of_memory"] if lead else None)
    kept = set_activations(config, adapted, blocks, rehearsal, leaner)
    if kept is not None:
        note("memory", f"activations {kept}")
    del batch, batches, run, rehearsal
    progress = Progress(loss_scale=LossScale.for_dtype(dtype))
    if resume_from is not None:
        progress = resume(Path(resume_from), strategy, identity, config.train.optim)
        if progress.loss_scale.enabled != (dtype == torch.float16):
            progress.loss_scale = LossScale.for_dtype(dtype)
            note("notice", f"the checkpoint was made in another precision; loss scaling starts anew for {dtype}")
        note("resumed", f"resumed from {resume_from}", step=progress.step, checkpoint=str(resume_from))

    if lead:
        refuse_if_fenced(heartbeat)
    parts: dict[str, Any] = dict(
        config=config, rank=worker.rank, world_size=worker.world_size, device=worker.device, model=model,
        strategy=strategy, schedule=build_schedule(config.train, total_steps), compute_dtype=dtype,
        pad_token_id=tokenizer.pad_token_id, order=order, train_table=train_table, eval_table=eval_table,
        total_steps=total_steps, progress=progress, identity=identity,
        adapter_config=adapter_settings, adapter_config_json=adapter_config, heartbeat=heartbeat,
        metrics=open_metrics(config, worker.run_dir, generation, progress.step, partial(note, "notice"))
        if lead else None,
        writer=BackgroundWriter(worker.run_dir, worker.client, generation) if lead else None,
        nodes=ranks_of_nodes(worker) if lead else {}, blocks=blocks, notice=partial(note, "notice"),
    )  # fmt: skip
    loop = Loop(**parts)
    if islands is not None:
        resumed = read_snapshot(Path(resume_from)) if lead and resume_from is not None else None
        agreed = partial(agree, worker)
        loop = IslandLoop(**parts, **vars(islands), agree=agreed, whole_order=order, resumed=resumed)
    loop.run()
    finish(loop, worker, tokenizer, generation)


def join_process_group(config: RunConfig, worker: Worker) -> None:
    """Connect the ranks, unless the launcher has done it; a collective fails after `launch.collective_timeout_s`."""
    if worker.device.type == "cuda":
        torch.cuda.set_device(worker.device)
        if not os.environ.get("PYTORCH_CUDA_ALLOC_CONF") and not os.environ.get("PYTORCH_ALLOC_CONF"):
            # What loading leaves in odd sizes would otherwise not serve the step.
            cuda: Any = torch.cuda.memory
            # Its later name comes without a warning.
            getattr(torch._C, "_accelerator_setAllocatorSettings", cuda._set_allocator_settings)(
                "expandable_segments:True"
            )
        if config.train.memory_budget_gib is not None:
            total = torch.cuda.get_device_properties(worker.device).total_memory / 2**30
            allowed = max(0.1, config.train.memory_budget_gib - BESIDE_ALLOCATOR_GIB)
            torch.cuda.set_per_process_memory_fraction(min(1.0, allowed / total))
    if dist.is_initialized() or (worker.world_size == 1 and config.strategy == "none"):
        return
    backend = "cpu:gloo,cuda:nccl" if worker.device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=config.launch.collective_timeout_s)
    if worker.world_size == 1:
        dist.init_process_group(backend, timeout=timeout, store=dist.HashStore(), rank=0, world_size=1)
    else:
        dist.init_process_group(backend, timeout=timeout)


def join_attempt(worker: Worker, timeout_s: float) -> int:
    """Register this rank's attempt with the coordinator; the attempt counts once all of its ranks have registered.

    Returns:
        The generation number that every commit of this attempt carries.
    """
    attempt = agree(worker, secrets.token_hex(8) if worker.rank == 0 else None)
    return join_and_wait(worker.client, attempt, worker.rank, worker.world_size, this_host(), os.getpid(), timeout_s)


def ranks_of_nodes(worker: Worker) -> dict[str, list[int]]:
    """The ranks of each host, as the coordinator knows them."""
    nodes: dict[str, list[int]] = {}
    for member in worker.client.call("status")["ranks"]:
        nodes.setdefault(member["host"], []).append(member["rank"])
    return nodes


def leave_process_group(worker: Worker, failed: bool) -> None:
    """Close the connections, so that ranks that wait for this one stop waiting.

    After a failure on GPUs they are left to the end of the process: NCCL's own farewell waits for ranks that may be
    waiting for this one.
    """
    if dist.is_initialized() and not (failed and worker.device.type == "cuda"):
        dist.destroy_process_group()


def out_of_memory(error: Exception, config: RunConfig, worker: Worker) -> UserError:
    """The error of a GPU that is too small for the run."""
    return UserError(
        "out-of-memory", rank=worker.rank, device=worker.device, error=error,
        train_batch=config.train.per_device_train_batch_size, eval_batch=config.eval.per_device_eval_batch_size,
        max_length=config.data.max_length,
    )  # fmt: skip


def agree(worker: Worker, value: Any) -> Any:
    """Rank 0's `value`, on every rank."""
    if worker.world_size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def resume_path(config: RunConfig, worker: Worker, note: Any) -> str | None:
    """The checkpoint to go on from, as `resume` and the run folder have it; None to start from scratch."""
    outcome = worker.client.call("outcome")
    path = resolve_resume(worker.run_dir, config.resume, outcome["started_generation"], partial(note, "notice"))
    return None if path is None else str(path)


def finish(loop: Loop, worker: Worker, tokenizer: Any, generation: int) -> None:
    """Write the final adapter, answer the sample prompts, and tell the coordinator that the run is done."""
    progress, config, model = loop.progress, loop.config, loop.model
    if config.eval.load_best_model_at_end:
        best = agree(worker, best_checkpoint(worker.run_dir) if worker.rank == 0 else None)
        if best is not None:
            loop.strategy.load_adapter(read_snapshot(Path(best)).adapter)
        elif worker.rank == 0:
            tell(
                worker, generation, "notice", "no checkpoint has a finite held-out loss; the last adapter is the final"
            )
    adapter = loop.full_adapter()
    if worker.rank == 0:
        refuse_if_fenced(loop.heartbeat)
        notes = {"compute": config.model.compute, "base": loop.identity["model.name"]}
        write_adapter(adapter, loop.adapter_config_json, worker.run_dir / "adapter", notes)
    samples: list[dict[str, str]] = []
    if loop.eval_table is not None and config.eval.sample_prompts:
        documents = range(min(config.eval.sample_prompts, loop.eval_table.num_documents))
        together = loop.strategy.collective_forward
        mine = answer_prompts(
            model, tokenizer, loop.eval_table, documents if together else documents[worker.rank :: worker.world_size],
            config.eval.sample_max_new_tokens, loop.compute_dtype, worker.device, together,
        )  # fmt: skip
        samples = mine if together else gather_in_turn(worker, mine)
    loop.heartbeat.tell_steps()
    if worker.world_size > 1:
        # What is told after rank 0 has finished would come too late for the last status.
        dist.all_reduce(torch.zeros(1))
    if worker.rank == 0:
        refuse_if_fenced(loop.heartbeat)
        assert loop.metrics is not None
        loop.metrics.close(worker.run_dir / "adapter")
        answer = worker.client.call(
            "finish", generation=generation, step=progress.step,
            summary={
                "adapter": str(worker.run_dir / "adapter"),
                "samples": samples,
                "best_eval_loss": progress.to_dict()["best_eval_loss"],
                "best_step": progress.best_step,
                "skipped_steps": progress.skipped_steps,
                "stopped_early": loop.stopped_early(),
                "complete": loop.complete(),
            },
        )  # fmt: skip
        if not answer["recorded"]:
            raise Fenced(f"attempt {generation} is over: another one has taken its place")


def refuse_if_fenced(heartbeat: Heartbeat) -> None:
    """Ask the coordinator whether this attempt is still the current one, right before writing outside a commit.

    Raises:
        Fenced: another attempt has taken its place.
    """
    if not heartbeat.beat().get("current", True):
        raise Fenced(f"attempt {heartbeat.generation} is over: another one has taken its place")


def best_checkpoint(run_dir: Path) -> str | None:
    """The checkpoint with the lowest held-out loss, which `checkpoint.keep_best` has kept; None where none has one."""
    scored = [(c.metrics["eval_loss"], str(c.path)) for c in list_checkpoints(run_dir) if "eval_loss" in c.metrics]
    return min(scored)[1] if scored else None


def gather_in_turn(worker: Worker, mine: list[Any]) -> list[Any]:
    """The lists of all ranks, item by item in turn, as they were dealt out."""
    if worker.world_size == 1:
        return mine
    parts: list[Any] = [None] * worker.world_size
    dist.all_gather_object(parts, mine)
    longest = max(len(part) for part in parts)
    return [part[turn] for turn in range(longest) for part in parts if turn < len(part)]


def explain_failure(
    error: Exception, worker: Worker, generation: int | None, heartbeat: Heartbeat | None
) -> Exception | None:
    """The reason behind an exception: `error` itself, or the lost worker that a failed collective points at.

    None where another rank has already reported what a person can mend: then this rank has nothing to add.
    """
    if worker.world_size == 1 or heartbeat is None or not is_collective_failure(error):
        return error
    if worker.client.call("outcome")["kind"] == "user":
        return None
    # A connection breaks at once when a worker is killed; its silence is what tells it from the others.
    time.sleep(SILENCE_S)
    answer = worker.client.call("who_is_missing", generation=generation, timeout_s=2 * SILENCE_S)
    return WorkerLost(f"step {heartbeat.step}: {answer['sentence']}") if answer["missing"] else error


def is_collective_failure(error: Exception) -> bool:
    """Whether an exception is that of a collective whose peer is gone; PyTorch has no class of its own for gloo's."""
    if isinstance(error, dist.DistBackendError | dist.DistNetworkError):
        return True
    return isinstance(error, RuntimeError) and any(
        sign in str(error) for sign in ("gloo", "Connection closed by peer", "Connection reset by peer", "Timed out")
    )


def report(worker: Worker, generation: int | None, kind: str, message: str, heartbeat: Heartbeat | None) -> None:
    """Tell the coordinator why this rank ends."""
    step = heartbeat.step if heartbeat is not None else 0
    worker.client.call("fail", generation=generation, rank=worker.rank, kind=kind, message=redact(message), step=step)


def tell(worker: Worker, generation: int, kind: str, message: str, **fields: Any) -> None:
    """A line for the person who watches, kept in the event log."""
    worker.client.call("note", kind=kind, generation=generation, message=redact(message), **redact_tree(fields))


def _ignore(kind: str, message: str, **fields: Any) -> None:
    """What ranks other than 0 do with a line that rank 0 tells."""


def describe_data(
    note: Any, tokenizer: Any, train_table: TokenTable, eval_table: TokenTable | None, config: RunConfig,
    total_steps: int, num_workers: int,
) -> None:  # fmt: skip
    """Say what the data turned into."""
    tables = {"train": train_table} | ({"eval": eval_table} if eval_table is not None else {})
    records = [data_record(name, table) for name, table in tables.items()]
    note("data", "\n".join(data_line(record) for record in records), splits=records)
    for name, table in tables.items():
        for sentence in data_notices(name, table):
            note("notice", sentence)
    pieces = example_pieces(train_table, tokenizer)
    note("example", example_line(pieces), pieces=pieces)
    note(
        "plan",
        f"{total_steps:,} steps of {config.global_batch_size} packs on {num_workers} worker(s), "
        f"strategy {config.strategy}",
        max_steps=total_steps,
    )


def describe_model(note: Any, model: nn.Module, config: RunConfig, dtype: torch.dtype, folder: Path) -> None:
    """Say what trains, after refusing a run in which nothing would."""
    trainable, total = check_trainable(model)
    bits = config.model.quantization.upper() + (", double quantisation" if config.model.double_quant else "")
    base = "not quantised" if config.model.quantization == "none" else bits
    for name, kind in (("embedding", config.model.embedding), ("head", config.model.head)):
        base += "" if kind == "bf16" else f"; {name} {kind}"
    note(
        "model",
        f"{config.model.name}: {total - trainable:,} frozen parameters ({base}), {trainable:,} trained "
        f"({100 * trainable / total:.2f} %), compute in {str(dtype).removeprefix('torch.')}"
        + (", the frozen layers' GEMMs in FP8" if config.model.compute == "fp8" else ""),
    )
    if (rounded := rounding_note(folder)) is not None:
        note("notice", rounded)
