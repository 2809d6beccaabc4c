"""From a YAML file and dotted overrides to one validated RunConfig; every mistake becomes one sentence."""

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from qlora_dist.config.deepspeed import deepspeed_settings
from qlora_dist.config.errors import UserError
from qlora_dist.config.redact import redact, redact_tree
from qlora_dist.config.schema import RunConfig
from qlora_dist.config.yaml_text import read_yaml

Location = tuple[str | int, ...]
# What people who come from axolotl, TRL or PEFT write, and our name for it.
SYNONYMS = {
    "base_model": "model.name",
    "model_name_or_path": "model.name",
    "lora_r": "adapter.r",
    "lora_target_modules": "adapter.target_modules",
    "datasets": "data.train",
    "sequence_len": "data.max_length",
    "max_seq_length": "data.max_length",
    "val_set_size": "data.eval_split",
    "micro_batch_size": "train.per_device_train_batch_size",
    "num_epochs": "train.num_train_epochs",
    "optimizer": "train.optim",
    "lr": "train.learning_rate",
    "lr_scheduler": "train.lr_scheduler_type",
    "save_total_limit": "checkpoint.keep_last",
    "resume_from_checkpoint": "resume",
}
# Keys that other tools take credentials under; a tokenizer's pad_token and its like are none.
SECRETS = re.compile(
    r"(?i)(.*_)?((hub|hf|auth|access|api|wandb|bearer)_token|api_?key|access_key(_id)?|secret(_\w+)?|passw(or)?d"
    r"|credentials?)|token"
)


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read `path`, apply `overrides` (each `section.field=value`, the value read as YAML) and validate.

    Raises:
        UserError: the file is missing or no YAML mapping, a key is unknown, a value is wrong, or two contradict, those
            of DeepSpeed's file included.
    """
    path = Path(path)
    values, lines = _read_yaml(path)
    sources = {location: f"{path}, line {line}" for location, line in lines.items()}
    for override in overrides:
        location = _apply_override(values, override)
        sources[location] = f"given as {override}"
    config = validate(values, sources, str(path))
    if config.strategy in ("zero2", "zero3"):
        deepspeed_settings(config)
    return config


def validate(values: dict[str, Any], sources: dict[Location, str] | None = None, origin: str = "config") -> RunConfig:
    """Validate a plain mapping; `sources` says where each location was written, for the error's sentence.

    Raises:
        UserError: for the first mistake, in one sentence.
    """
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise _mistake(error.errors(include_url=False), sources or {}, origin) from None


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """The configuration with every path that exists here made absolute: workers may start in another folder."""
    config = config.model_copy(deep=True)
    config.output_dir = config.run_dir.absolute()
    if config.adapter.path is not None:
        config.adapter.path = config.adapter.path.absolute()
    if config.model.cache_quantized is not None:
        config.model.cache_quantized = config.model.cache_quantized.absolute()
    if config.shard.deepspeed_config is not None:
        config.shard.deepspeed_config = config.shard.deepspeed_config.expanduser().absolute()
    for section, field in ((config.model, "name"), (config.data, "train"), (config.data, "eval"), (config, "resume")):
        value = getattr(section, field)
        if value is not None and Path(value).expanduser().exists():
            setattr(section, field, str(Path(value).expanduser().absolute()))
    return config


def to_yaml(config: RunConfig) -> str:
    """The configuration as YAML, every field present, in the schema's order; loading it gives the same config.

    Secrets are taken out: this is what run folders, checkpoints and people get to see.
    """
    values = redact_tree(config.model_dump(mode="json"))
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def from_yaml(text: str, origin: str = "config.yaml") -> RunConfig:
    """Validate what `to_yaml` wrote.

    Raises:
        UserError: as `load_config`.
    """
    return validate(yaml.safe_load(text), origin=origin)


def _read_yaml(path: Path) -> tuple[dict[str, Any], dict[Location, int]]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.y*ml")], n=1)
        if near:
            raise UserError("config-misspelt", path=path, nearest=path.parent / near[0]) from None
        raise UserError("config-missing", path=path) from None
    except IsADirectoryError:
        raise UserError("config-is-folder", path=path) from None
    except OSError as error:
        raise UserError("config-unreadable", path=path, error=error.strerror) from None
    except UnicodeDecodeError as error:
        raise UserError("config-not-utf8", path=path, line=1 + error.object.count(b"\n", 0, error.start)) from None
    values, node = read_yaml(text, lambda line: f"{path}, line {line}")
    if not isinstance(values, dict):
        raise UserError("config-empty", path=path)
    return values, dict(_key_lines(node, ()))


def _key_lines(node: yaml.Node | None, prefix: Location) -> Iterator[tuple[Location, int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            location = (*prefix, key.value)
            yield location, key.start_mark.line + 1
            yield from _key_lines(value, location)


def _apply_override(values: dict[str, Any], override: str) -> Location:
    name, equals, text = override.partition("=")
    keys = name.split(".")
    if not equals or not all(keys):
        raise UserError("override-form", override=override)
    try:
        value, _ = read_yaml(text, lambda _: repr(override))
    except UserError as error:
        if error.code != "config-not-yaml":
            raise
        raise UserError("override-not-yaml", override=override, problem=error.facts["problem"]) from None
    for depth, key in enumerate(keys[:-1]):
        inner = values.setdefault(key, {})
        if inner is None:
            inner = values[key] = {}
        if not isinstance(inner, dict):
            raise UserError("override-into-value", override=override, setting=".".join(keys[: depth + 1]))
        values = inner
    values[keys[-1]] = value
    return tuple(keys)


def _mistake(errors: Sequence[Any], sources: dict[Location, str], origin: str) -> UserError:
    error = errors[0]
    location = _location(error)
    dotted = ".".join(str(part) for part in location)
    written = tuple(str(part) for part in location)
    where = next((sources[written[:n]] for n in range(len(written), 0, -1) if written[:n] in sources), origin)
    kind, given = error["type"], error.get("input")
    if kind in ("extra_forbidden", "invalid_key"):
        if SECRETS.fullmatch(str(location[-1])):
            return UserError("setting-is-secret", setting=dotted, where=where)
        section, nearest = _nearest(location)
        if nearest is not None:
            return UserError("setting-misspelt", setting=dotted, where=where, nearest=nearest)
        return UserError("setting-unknown", setting=dotted, where=where, settings=", ".join(section.model_fields))
    if kind == "missing":
        return UserError("setting-missing", setting=dotted, where=origin)
    if kind == "value_error" and not location:
        # What `contradictions` found.
        (contradiction,) = error["ctx"]["error"].args
        assert isinstance(contradiction, UserError)
        return contradiction
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return UserError("setting-is-section", setting=dotted or "the file", given=_shown(given), where=where)
    branches = [_demand(other) for other in errors if _location(other) == location]
    demand = " or ".join(dict.fromkeys(branches))
    return UserError("setting-value", setting=dotted, given=_shown(given), where=where, demand=demand)


def _location(error: Any) -> Location:
    return tuple(part for part in error["loc"] if not _is_union_branch(part))


def _demand(error: Any) -> str:
    plain = {"bool": "true or false", "int": "a whole number", "float": "a number", "string": "text", "list": "a list"}
    if error["type"] == "string_pattern_mismatch":
        return "letters, digits, dots, dashes and underscores, beginning with a letter or digit"
    family = error["type"].partition("_")[0]
    if error["type"].endswith(("_type", "_parsing")) and family in plain:
        return plain[family]
    return str(error["msg"]).removeprefix("Input should be ").removeprefix("Value error, ")


def _shown(value: object) -> str:
    text = "empty" if value is None else redact(repr(value))
    return text if len(text) <= 60 else text[:57] + "..."


def _is_union_branch(part: str | int) -> bool:
    return isinstance(part, str) and (part in ("str", "int", "bool", "float") or "[" in part)


def _section(model: type[BaseModel], key: str) -> type[BaseModel] | None:
    field = model.model_fields.get(key)
    if field is None:
        return None
    for candidate in (field.annotation, *get_args(field.annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _nearest(location: Location) -> tuple[type[BaseModel], str | None]:
    """The section in which an unknown setting was written, and the setting that was meant, if one is near."""
    section: type[BaseModel] = RunConfig
    for part in location[:-1]:
        section = _section(section, str(part)) or section
    unknown, prefix = str(location[-1]), ".".join(str(part) for part in location[:-1])
    here = difflib.get_close_matches(unknown, section.model_fields, n=1, cutoff=0.75)
    every = {name.rpartition(".")[2]: name for name in setting_names()} | SYNONYMS
    if here:
        return section, f"{prefix + '.' if prefix else ''}{here[0]}"
    if unknown in every:
        return section, every[unknown]
    near = difflib.get_close_matches(unknown, section.model_fields, n=1, cutoff=0.5)
    anywhere = difflib.get_close_matches(unknown, every, n=1, cutoff=0.6)
    if near:
        return section, f"{prefix + '.' if prefix else ''}{near[0]}"
    return section, every[anywhere[0]] if anywhere else None


def setting_names(model: type[BaseModel] = RunConfig, prefix: str = "") -> list[str]:
    """The dotted names of all settings, in the schema's order."""
    names = []
    for key in model.model_fields:
        section = _section(model, key)
        names += setting_names(section, f"{prefix}{key}.") if section else [prefix + key]
    return names
