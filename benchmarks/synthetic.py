"""Random weights of a real shape through the real command, and how long and how large loading is.

    python benchmarks/synthetic.py train --out benchmarks/results/synthetic_8b.json
    python benchmarks/synthetic.py load synthetic:llama-3.1-70b --out benchmarks/results/load_70b.json
    python benchmarks/synthetic.py cache synthetic:llama-3.1-70b --out benchmarks/results/cache_70b.json

`train` runs synthetic.yaml for 20 steps under Ray, then the same command with 24 steps, which resumes. Every token
bears loss; tokens/s is the median of the steps after the first five. `load` quantises a base onto the GPU. `cache`
trains two steps while writing the NF4 cache and two from it, and reads the process's host memory.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers

from qlora_dist.bench.watch import anonymous_bytes
from qlora_dist.bench.workload import write_rows
from qlora_dist.config.schema import ModelConfig
from qlora_dist.coordinate.report import read_status
from qlora_dist.model.base import load_base
from qlora_dist.model.resolve import resolve_base
from qlora_dist.track.metrics import read_metrics

SETTINGS = Path(__file__).with_name("synthetic.yaml")


def train(settings: list[str]) -> dict[str, Any]:
    """20 steps, then 4 more by the same command; throughput, memory, and that the second part resumed."""
    with tempfile.TemporaryDirectory() as scratch:
        rows, run_dir = Path(scratch) / "rows.jsonl", Path(scratch) / "run"
        write_rows(rows)
        command = [sys.executable, "-m", "qlora_dist.cli", "train", str(SETTINGS), f"data.train={rows}"]
        command += [f"output_dir={run_dir}", *settings]
        started = time.monotonic()
        subprocess.run(command, check=True)
        middle = time.monotonic()
        memory = [rank.get("memory_bytes") for rank in read_status(run_dir)["ranks"]]
        subprocess.run([*command, "train.max_steps=24"], check=True)
        ended = time.monotonic()
        records = {record["step"]: record for record in read_metrics(run_dir) if "loss" in record}
    speeds = [record["tokens_per_second"] for step, record in records.items() if 5 < step <= 20]
    return {
        "what": "synthetic:llama-3.1-8b, 20 steps under Ray by qlora-dist train, then 4 more after a resume",
        "tokens_per_second": statistics.median(speeds),
        "tokens_per_second_spread": [min(speeds), max(speeds)],
        "peak_allocated_gib": max(memory) / 2**30,
        "seconds": [middle - started, ended - middle],
        "attempts": sorted({record["attempt"] for record in records.values()}),
        "losses": [records[step]["loss"] for step in sorted(records)],
        "settings": SETTINGS.read_text(),
        "overrides": settings,
    }


def load(name: str) -> dict[str, Any]:
    """Load a base in NF4; seconds, and peaks of host memory (private and shared, no page cache) and GPU memory."""
    process = psutil.Process()
    start = peak = process.memory_full_info().uss
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.05):
            peak = max(peak, process.memory_full_info().uss)

    thread = threading.Thread(target=watch)
    thread.start()
    started = time.monotonic()
    config = ModelConfig(name=name, compute_dtype="bf16")
    model = load_base(config, resolve_base(config), torch.device("cuda", 0))
    torch.cuda.synchronize()
    seconds = time.monotonic() - started
    done.set()
    thread.join()
    return {
        "what": f"{name} loaded in NF4 with double quantisation",
        "seconds": seconds,
        "parameters_on_gpu_gib": torch.cuda.memory_allocated() / 2**30,
        "peak_allocated_gib": torch.cuda.max_memory_allocated() / 2**30,
        "host_peak_over_start_gib": (peak - start) / 2**30,
        "layers": len(model.model.layers),
    }


def cache(name: str) -> dict[str, Any]:
    """Two steps from the bf16 shape, writing its NF4 cache, then two in a new process from the cache."""
    result: dict[str, Any] = {"what": f"{name}: two steps at 1 x 2048, writing the NF4 cache, then from the cache"}
    with tempfile.TemporaryDirectory() as scratch:
        rows, folder = Path(scratch) / "rows.jsonl", Path(scratch) / "nf4"
        write_rows(rows, rows=8)
        for part in ("writing", "from_cache"):
            run_dir = Path(scratch) / part
            command = [sys.executable, "-m", "qlora_dist.cli", "train", str(SETTINGS), f"data.train={rows}"]
            command += [f"output_dir={run_dir}", f"model.name={name}", f"model.cache_quantized={folder}"]
            command += ["launch.backend=none", "train.max_steps=2", "train.global_batch_size=1"]
            command += ["train.per_device_train_batch_size=1"]
            started, started_clock = time.monotonic(), time.time()
            process = subprocess.Popen(command)
            peak = 0
            while process.poll() is None:
                peak = max(peak, anonymous_bytes(process.pid))
                time.sleep(0.05)
            if process.returncode:
                raise SystemExit(process.returncode)
            first = next(record for record in read_metrics(run_dir) if record["step"] == 1)
            memory = [rank.get("memory_bytes") for rank in read_status(run_dir)["ranks"]]
            result[part] = {
                "seconds": time.monotonic() - started,
                "seconds_to_first_step": first["time"] - started_clock,
                "host_peak_gib": peak / 2**30,
                "gpu_peak_allocated_gib": max(memory) / 2**30,
            }
        result["cache_gib"] = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 2**30
    return result


def main() -> None:
    """Run one of the three and write its JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["train", "load", "cache"])
    parser.add_argument("rest", nargs="*", help="train: overrides; load, cache: the base")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    run: dict[str, Any] = {"train": train, "load": lambda rest: load(rest[0]), "cache": lambda rest: cache(rest[0])}
    result = run[arguments.what](arguments.rest)
    result["device"] = torch.cuda.get_device_name()
    result["versions"] = {module.__name__: module.__version__ for module in (torch, transformers)}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "settings"}, indent=1))


if __name__ == "__main__":
    main()
