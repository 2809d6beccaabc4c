"""Loss of fused layers in bf16 and in FP8 against stock layers, on real rows: same settings, seeds, data and order.

    python -m benchmarks.fused_parity --data FOLDER --out benchmarks/results/fused_parity.json [--model FOLDER]
    python -m benchmarks.fused_parity --show benchmarks/results/fused_parity.json

FOLDER holds train.jsonl and test.jsonl with `instruction` and `response` (tldr-pages). Settings are those of
parity_tldr.yaml without dropout, which fused layers do not have. The sides differ in nothing but how they compute:
PEFT's and bitsandbytes' layers in transformers' model, fused ones, fused ones with `model.compute: fp8`. A seed gives
all sides the same initial weights and batches, so that two curves of one seed differ by rounding, and two of one side
by the seed. Adapters are judged by stock transformers and PEFT in bf16: the mean loss a response token over all of
test.jsonl. Needs a GPU; FP8 one of compute capability 8.9.
"""

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.islands_tldr import MODEL, Judge
from qlora_dist.bench import document
from qlora_dist.config.schema import ModelConfig
from qlora_dist.model.resolve import resolve_base
from qlora_dist.track.metrics import read_metrics

SETTINGS = Path(__file__).with_name("parity_tldr.yaml")
SIDES = {
    "stock": ["model.fused=never"],
    "fused": ["model.fused=always"],
    "fp8": ["model.fused=always", "model.compute=fp8"],
}
# Steps at the start of a run whose curves are not compared: the loss falls fast there.
FIRST = 20


def train(
    side: str, seed: int, steps: int, run: Path, base: Path, data: Path, gpu: int, more: Sequence[str]
) -> dict[str, Any]:
    """One run through the command line on one GPU; its loss at each step and what it took.

    Raises:
        RuntimeError: it failed; with what it has printed last.
    """
    command = [sys.executable, "-m", "qlora_dist.cli", "train", str(SETTINGS), f"output_dir={run}", f"seed={seed}"]
    command += [f"model.name={base}", f"data.train={data / 'train.jsonl'}", "adapter.lora_dropout=0", *SIDES[side]]
    command += [f"train.max_steps={steps}", f"checkpoint.save_steps={steps}", "train.logging_steps=1"]
    # Runs share a GPU: none takes what is free.
    command += ["train.activations=keep", "track.tensorboard=false", "track.report=false", *more]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": str(gpu), "OMP_NUM_THREADS": "1"}
    started = time.monotonic()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{side}, seed {seed}, ended with {done.returncode}: {(done.stdout + done.stderr)[-1500:]}")
    losses = [record["loss"] for record in read_metrics(run) if "loss" in record]
    return {"side": side, "seed": seed, "losses": losses, "seconds": time.monotonic() - started}


def curve_distances(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Mean absolute differences of two losses of one step, over pairs of runs.

    Returns:
        Of each side, against stock with the same seed (rounding); of stock and fused, between seeds (run to run).
    """
    first = min(FIRST, len(records[0]["losses"]) // 2)
    losses = {(record["side"], record["seed"]): record["losses"][first:] for record in records}
    seeds = sorted({seed for _, seed in losses})

    def distance(pairs: list[tuple[tuple[str, int], tuple[str, int]]]) -> float:
        return statistics.mean(abs(a - b) for one, two in pairs for a, b in zip(losses[one], losses[two], strict=True))

    found = {f"{side}, same seed": distance([((side, s), ("stock", s)) for s in seeds]) for side in ("fused", "fp8")}
    for side in ("stock", "fused"):
        found[f"{side}, between seeds"] = distance(
            [((side, a), (side, b)) for a, b in itertools.combinations(seeds, 2)]
        )
    return found


def summary(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Held-out losses of each side, their ratios and the curves' distances."""
    held_out = {side: [r["held_out_loss"] for r in records if r["side"] == side] for side in SIDES}
    means = {side: statistics.mean(losses) for side, losses in held_out.items()}
    spread = {side: (max(losses) - min(losses)) / means[side] for side, losses in held_out.items()}
    ratios = {"fused over stock": means["fused"] / means["stock"], "fp8 over fused": means["fp8"] / means["fused"]}
    return {"held_out_means": means, "spread": spread, "ratios": ratios, "curves": curve_distances(records)}


def table(records: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row a side."""
    seeds = sorted({record["seed"] for record in records})
    lines = [f"| layers | {' | '.join(f'seed {seed}' for seed in seeds)} | mean |", (len(seeds) + 2) * "|---" + "|"]
    for side in SIDES:
        losses = [r["held_out_loss"] for seed in seeds for r in records if (r["side"], r["seed"]) == (side, seed)]
        lines.append(f"| {side} | {' | '.join(f'{x:.4f}' for x in losses)} | {statistics.mean(losses):.4f} |")
    return "\n".join(lines)


def draw(records: Sequence[dict[str, Any]], path: Path, over: int = 10) -> None:
    """A PNG: training loss over steps, the mean of `over` steps, a colour a side and a line a seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), dpi=150)
    for number, side in enumerate(SIDES):
        for record in (record for record in records if record["side"] == side):
            losses = record["losses"]
            means = [statistics.mean(losses[end - over : end]) for end in range(over, len(losses) + 1)]
            label = side if record["seed"] == records[0]["seed"] else None
            axes.plot(range(over, len(losses) + 1), means, color=f"C{number}", lw=1, alpha=0.8, label=label)
    axes.set(xlabel="step", ylabel=f"training loss, mean of {over} steps", title="Same seed, same batches: three ways")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    """Run all seeds on all sides, `--at-once` at a time over the GPUs, and write one JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--model", default=MODEL, help="as model.name takes it; a plain chat model")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--at-once", type=int, default=1, help="runs that share the machine; seconds then mean little")
    parser.add_argument("--set", nargs="*", default=[], help="overrides of all runs")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--show", type=Path, metavar="JSON")
    arguments = parser.parse_args()
    if arguments.show:
        records = document.read(arguments.show)["records"]
        print(table(records), summary(records), sep="\n")
        draw(records, arguments.show.with_suffix(".png"))
        return
    base = resolve_base(ModelConfig(name=arguments.model))
    found = document.begin(
        arguments.out, resume=False, what=f"loss of fused and stock layers on tldr, {arguments.steps} steps of batch 8",
        base=f"{Path(arguments.model).name}, NF4 with double quantisation", settings=SETTINGS.read_text(),
    )  # fmt: skip
    judge, gpus = Judge(base, arguments.data), torch.cuda.device_count()
    points = [(side, seed) for seed in arguments.seeds for side in SIDES]
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(arguments.at_once) as pool:
        folders = [Path(scratch) / f"{side}-{seed}" for side, seed in points]
        futures = [
            pool.submit(
                train, side, seed, arguments.steps, folder, base, arguments.data, number % max(1, gpus), arguments.set
            )
            for number, ((side, seed), folder) in enumerate(zip(points, folders, strict=True))
        ]
        for future, folder in zip(futures, folders, strict=True):
            if future.exception() is not None:
                print(future.exception(), flush=True)
                continue
            record = future.result() | {"held_out_loss": judge.loss(folder / "adapter")}
            print(f"{record['side']}, seed {record['seed']}: {record['held_out_loss']:.4f}", flush=True)
            found["records"].append(record)
            document.write(arguments.out, found)
    if len(found["records"]) < len(points):
        sys.exit(1)
    found["summary"] = summary(found["records"])
    document.write(arguments.out, found)
    print(table(found["records"]), found["summary"], sep="\n")


if __name__ == "__main__":
    main()
