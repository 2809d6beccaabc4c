"""What is trained: a base, rows of random words, and the settings that a point changes."""

import json
import random
from pathlib import Path
from typing import Any

import yaml

from qlora_dist.config.errors import UserError
from qlora_dist.config.yaml_text import read_yaml
from qlora_dist.model.shapes import SHAPES
from qlora_dist.model.synthetic import SYNTHETIC_PREFIX, synthetic_folder

# Those of the published figures of QLoRA trainers: every token trained, so that loss-bearing tokens are all tokens.
SETTINGS: dict[str, Any] = {
    "name": "bench",
    "adapter": {"r": 16, "lora_alpha": 32},
    "data": {"max_length": 2048, "assistant_only_loss": False},
    "train": {"learning_rate": 1e-4, "lr_scheduler_type": "constant", "optim": "adamw_8bit"},
    "checkpoint": {"save_steps": 1_000_000, "keep_last": 1},
    "launch": {"backend": "none", "num_workers": 1},
    "track": {"tensorboard": False, "report": False},
}
MODEL = "llama-3.1-8b"
# The shortest word and the blank after it, in the tokens of the synthetic bases: bytes.
SHORTEST_WORD = 3


def model_setting(name: str) -> str:
    """`model.name` of a shape's name, or of anything that `model.name` takes.

    Raises:
        UserError: there is neither such a shape nor such a folder.
    """
    if name in SHAPES:
        return SYNTHETIC_PREFIX + name
    if "/" in name or ":" in name or Path(name).exists():
        return name
    synthetic_folder(name)
    raise AssertionError(f"{name} is a shape after all")


def write_settings(path: Path, model: str | None, rows: Path, steps: int, beside: Path | None = None) -> str:
    """Write the settings of every point as a YAML file.

    Args:
        model: as `model.name` has it; `MODEL` where neither this nor `beside` names one.
        rows: the training rows, unless `beside` names others.
        steps: optimizer steps, unless `beside` says how many.
        beside: a YAML file whose settings go over the benchmark's own.

    Returns:
        `model.name`.

    Raises:
        UserError: `beside` cannot be read.
    """
    own = {
        **SETTINGS,
        "model": {"name": SYNTHETIC_PREFIX + MODEL},
        # The tokens are kept for the points that follow, and no longer.
        "data": {**SETTINGS["data"], "train": str(rows), "cache_dir": str(path.parent / "tokens")},
        "train": {**SETTINGS["train"], "max_steps": steps},
    }
    settings = merged(own, read_settings(beside) if beside is not None else {})
    if model is not None:
        settings = merged(settings, {"model": {"name": model}})
    path.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    return str(settings["model"]["name"])


def read_settings(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, which need not be a whole configuration.

    Raises:
        UserError: there is none.
    """
    try:
        settings, _ = read_yaml(path.read_text(encoding="utf-8"), lambda line: f"{path}, line {line}")
    except FileNotFoundError:
        raise UserError("config-missing", path=path) from None
    except OSError as error:
        raise UserError("config-unreadable", path=path, error=error.strerror) from None
    if not isinstance(settings, dict):
        raise UserError("config-empty", path=path)
    return settings


def merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`above` over `below`, section by section."""
    both = dict(below)
    for key, value in above.items():
        inner = both.get(key)
        both[key] = merged(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return both


def words_for(tokens: int) -> int:
    """Words that are at least so many tokens, whatever words are drawn."""
    return tokens // SHORTEST_WORD + 1


def write_rows(path: Path, rows: int = 256, words: int = 4000) -> None:
    """Rows of random words as JSON lines, the same ones each time."""
    draw = random.Random(0)
    vocabulary = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(5000)]
    with path.open("w", encoding="utf-8") as file:
        for _ in range(rows):
            file.write(
                json.dumps({"prompt": "write", "completion": " ".join(draw.choices(vocabulary, k=words))}) + "\n"
            )
