"""Unsloth's own FSDP2 over the GPUs of one host, on an NF4 folder of ours, for the table of sharded.py.

    UNSLOTH_FSDP2=1 UNSLOTH_FSDP2_LAYOUT=sharded torchrun --nproc-per-node 2 -m benchmarks.unsloth_fsdp2 \\
        NF4_FOLDER --batch 8 --out unsloth.json

Unsloth shards inside TRL's SFTTrainer, so that is the loop: r=16, all linear layers, 8-bit AdamW, Unsloth's
checkpointing, random tokens without padding. UNSLOTH_FSDP2_LAYOUT is Unsloth's: `sharded` spreads the frozen base,
`fit` keeps it on every GPU, unset chooses by memory. The record has tokens/s and peak memory of each rank.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

from qlora_dist.bench.peers import Job, unsloth


def main() -> None:
    """Build the model, take the steps, gather what each rank measured, write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, help="an NF4 folder, as model.cache_quantized writes it")
    parser.add_argument("--batch", type=int, default=4, help="rows a GPU")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--warm-up", type=int, default=4)
    parser.add_argument("--limit-s", type=float, default=150.0, help="steps end after it")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    started = time.monotonic()
    world, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    with tempfile.TemporaryDirectory() as folder:
        # Unsloth patches transformers and wants to be imported before it, so nothing comes before this.
        job = Job(
            base=arguments.base, batches=Path(folder) / "batches.safetensors", r=16, lora_alpha=32,
            max_length=arguments.length, device=os.environ.get("DEVICE", "cuda"),
        )  # fmt: skip
        model, _ = unsloth(job)
        loaded = time.monotonic()
        record = measure(model, job, arguments, world, started + arguments.limit_s)
    record |= {"rank": rank, "load_seconds": loaded - started}
    import torch.distributed as dist

    ranks: list[dict] = [{} for _ in range(world)]
    dist.all_gather_object(ranks, record)
    if rank == 0:
        from qlora_dist.bench.document import machine

        layout = os.environ.get("UNSLOTH_FSDP2_LAYOUT", "chosen by Unsloth")
        settings = vars(arguments) | {"base": arguments.base.name, "out": None, "layout": layout}
        arguments.out.write_text(json.dumps({**machine(), "settings": settings, "ranks": ranks}, indent=1))
        slowest = min(one["tokens_per_second"] for one in ranks)
        peak = max(one["peak_allocated_gib"] or 0 for one in ranks)
        print(f"Unsloth FSDP2, layout {layout}: {slowest:,.0f} tokens/s a GPU, peak {peak:.1f} GiB")
    dist.destroy_process_group()


def measure(model, job: Job, arguments: argparse.Namespace, world: int, deadline: float) -> dict:
    """The figures of this rank, as of `qlora_dist.bench.peer_trl.train`, with its GPU's memory after loading."""
    import torch
    from safetensors.torch import save_file

    from qlora_dist.bench.peer_trl import train

    vocabulary, taken = model.config.vocab_size, arguments.steps + arguments.warm_up
    drawn = torch.Generator().manual_seed(0)
    shape = (world * taken, arguments.batch, arguments.length)
    ids_SBT = torch.randint(min(1000, vocabulary // 2), vocabulary, shape, generator=drawn, dtype=torch.int32)
    save_file({"input_ids": ids_SBT}, job.batches)
    result = train(model, job, arguments.warm_up, arguments.steps, deadline)
    if job.device == "cuda":
        result["device_used_gib"] = (lambda free, total: (total - free) / 2**30)(*torch.cuda.mem_get_info())
    return result


if __name__ == "__main__":
    main()
