"""Strategies side by side on the GPUs of one host: tokens/s a GPU, peak memory a GPU, seconds to the first step.

    python benchmarks/sharded.py benchmarks/sharded_runs.json --out benchmarks/results/sharded_h200.json

The first argument is a list of runs: a name, dotted overrides of sharded.yaml, and an environment. SCRATCH in one is a
folder that lasts as long as the benchmark. Every run is `qlora-dist train` in its own processes, with random weights
of the stated shape. Tokens/s is the median over the steps after the first three. The peer's own settings are the
default: LoRA r=16 on all linear layers, sequences of 2,048 tokens, 8-bit AdamW, gradient checkpointing.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.synthetic import anonymous_bytes, write_rows
from qlora_dist.coordinate.report import read_status
from qlora_dist.track.metrics import read_metrics

SETTINGS = Path(__file__).with_name("sharded.yaml")
WARM_UP = 3


def measure(run: dict[str, Any], rows: Path, scratch: Path, limit_s: float) -> dict[str, Any]:
    """One run; what went wrong is in the result, and the other runs go on."""
    name, overrides = run["name"], run["overrides"]
    run_dir = scratch / name.replace(" ", "-")
    command = [sys.executable, "-m", "qlora_dist.cli", "train", str(SETTINGS), f"data.train={rows}"]
    command += [f"output_dir={run_dir}", *overrides]
    started, started_clock = time.monotonic(), time.time()
    log = run_dir.with_suffix(".log")
    result: dict[str, Any] = dict(run)
    with log.open("w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=os.environ | run.get("environment", {})
        )
        gpu_peak, host_peak = 0.0, 0.0
        while process.poll() is None:
            if time.monotonic() - started > limit_s:
                process.terminate()
                process.wait()
                break
            gpu_peak = max(gpu_peak, gpu_used_gib())
            host_peak = max(host_peak, host_used_gib(process.pid))
            time.sleep(0.2)
        code = process.returncode
    result |= {"seconds": time.monotonic() - started, "nvidia_smi_peak_gib": gpu_peak, "host_peak_gib": host_peak}
    steps = [record for record in read_metrics(run_dir) if "loss" in record] if run_dir.is_dir() else []
    if code or len(steps) <= WARM_UP:
        return result | {"exit_code": code, "log_tail": log.read_text()[-3000:]}
    ranks = read_status(run_dir)["ranks"]
    seconds = statistics.median(record["seconds_per_step"] for record in steps[WARM_UP:])
    return result | {
        "workers": len(ranks),
        "tokens_per_second_per_gpu": statistics.median(r["tokens_per_second"] for r in steps[WARM_UP:]) / len(ranks),
        "seconds_per_step": seconds,
        "peak_allocated_gib": [rank.get("memory_bytes", 0) / 2**30 for rank in ranks],
        "seconds_to_first_step": steps[0]["time"] - started_clock,
        "losses": [record["loss"] for record in steps],
        "grad_norms": [record["grad_norm"] for record in steps],
    }


def gpu_used_gib() -> float:
    """The fuller GPU's used memory as nvidia-smi shows it, with what CUDA's context and NCCL take."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return max(float(line) for line in shown.split()) / 1024


def host_used_gib(pid: int) -> float:
    """Private and shared bytes of a process and its children, without page cache."""
    try:
        family = [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    except psutil.NoSuchProcess:
        return 0.0
    return sum(anonymous_bytes(member) for member in family) / 2**30


def main() -> None:
    """All runs of the list, one after the other; the JSON is written anew after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--limit-s", type=float, default=200.0, help="for one run")
    parser.add_argument("--only", nargs="*", help="names of runs")
    arguments = parser.parse_args()
    packages = ("torch", "transformers", "peft", "bitsandbytes", "deepspeed")
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "gpus": torch.cuda.device_count(),
        "versions": {package: version(package) for package in packages},
        "settings": SETTINGS.read_text(),
        "runs": [],
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        write_rows(rows)
        for run in json.loads(arguments.runs.read_text().replace("SCRATCH", folder)):
            if arguments.only and run["name"] not in arguments.only:
                continue
            result = measure(run, rows, Path(folder), arguments.limit_s)
            report["runs"].append(result)
            arguments.out.write_text(json.dumps(report, indent=1) + "\n")
            shown = {key: value for key, value in result.items() if key not in ("losses", "grad_norms", "overrides")}
            print(json.dumps(shown), flush=True)


if __name__ == "__main__":
    main()
