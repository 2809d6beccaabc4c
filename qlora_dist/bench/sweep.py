"""Which points a sweep has: axes of dotted settings, and their combinations in the order in which they were given."""

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qlora_dist.config.errors import UserError
from qlora_dist.config.load import load_config
from qlora_dist.config.schema import RunConfig

# What a point is called by, where the settings' own words are long.
SHORT = {
    "per_device_train_batch_size": "batch", "max_length": "seq", "memory_budget_gib": "GiB budget",
    "activations=keep": "kept", "activations=auto": "auto", "activations=recompute": "recomputed",
    "activations=offload": "offloaded", "gradient_checkpointing=true": "checkpointing",
    "gradient_checkpointing=false": "kept", "num_workers": "workers",
}  # fmt: skip
OPENING, CLOSING, QUOTES = "[{(", "]})", "\"'"


@dataclass(frozen=True)
class Point:
    """One run: its name, dotted overrides of the settings, and what it adds to the environment."""

    name: str
    overrides: list[str]
    environment: dict[str, str] = field(default_factory=dict)


def parse_axis(text: str) -> tuple[str, list[str]]:
    """`section.field=1,2,4` as the setting and its values; a comma inside brackets or quotes separates nothing.

    Raises:
        UserError: it has another form, or a value twice.
    """
    setting, equals, listed = text.partition("=")
    values = [value.strip() for value in _split(listed)]
    if not equals or not all(setting.split(".")) or not all(values):
        raise UserError("bench-axis-form", axis=text)
    if len(set(values)) < len(values):
        raise UserError("bench-axis-repeats", axis=text)
    return setting.strip(), values


def _split(listed: str) -> list[str]:
    parts, depth, quote = [""], 0, ""
    for character in listed:
        if quote:
            quote = "" if character == quote else quote
        elif character in QUOTES:
            quote = character
        depth += (character in OPENING) - (character in CLOSING)
        if character == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def parse_points(axes: Sequence[str]) -> list[Point]:
    """All combinations of the axes' values, the last axis varying fastest; no axis gives one point.

    A point is named after what varies, in `SHORT` or the settings' last words.

    Raises:
        UserError: as `parse_axis`, or a setting has two axes.
    """
    parsed = [parse_axis(axis) for axis in axes]
    for number, (setting, _) in enumerate(parsed):
        if setting in [other for other, _ in parsed[:number]]:
            raise UserError("bench-axis-twice", setting=setting)
    points = []
    for values in itertools.product(*(listed for _, listed in parsed)):
        chosen = [(setting, value, len(listed) > 1) for (setting, listed), value in zip(parsed, values, strict=True)]
        varied = [called(setting, value) for setting, value, varies in chosen if varies]
        points.append(Point(", ".join(varied) or "defaults", [f"{setting}={value}" for setting, value, _ in chosen]))
    return points


def called(setting: str, value: str) -> str:
    """A setting and its value, in a word or two."""
    word = setting.rpartition(".")[2]
    return SHORT.get(f"{word}={value}") or f"{SHORT.get(word, word)} {value}"


def read_points(path: Path, scratch: Path) -> list[Point]:
    """The points of a JSON list of {"name", "overrides", "environment"}; SCRATCH in it stands for `scratch`.

    Raises:
        UserError: it cannot be read, or is no such list.
    """
    try:
        listed = json.loads(path.read_text(encoding="utf-8").replace("SCRATCH", str(scratch)))
        points = [Point(one["name"], list(one["overrides"]), dict(one.get("environment", {}))) for one in listed]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError("bench-points-unreadable", file=path, error=f"{type(error).__name__}: {error}") from error
    if len({point.name for point in points}) < len(points):
        raise UserError("bench-points-unreadable", file=path, error="two points have one name")
    return points


def combined(points: Sequence[Point], axes: Sequence[Point]) -> list[Point]:
    """Each of `points` with each combination of the axes, named after both."""
    return [
        Point(
            point.name if len(axes) == 1 else f"{point.name}, {axis.name}",
            [*point.overrides, *axis.overrides],
            point.environment,
        )
        for point in points
        for axis in axes
    ]


def checked(settings: Path, points: Sequence[Point]) -> list[RunConfig]:
    """Each point's configuration, so that a mistake in the last one is found before the first one runs.

    Raises:
        UserError: as `load_config`.
    """
    return [load_config(settings, point.overrides) for point in points]
