"""Where rows come from: files, folders, bundled datasets, `datasets` folders, hub ids, and S3."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from itertools import islice
from pathlib import Path, PurePosixPath

from qlora_dist.config.errors import UserError
from qlora_dist.data.hf_datasets import HUB_ID, is_saved_dataset, read_hub, read_saved_dataset
from qlora_dist.data.rows import SUFFIXES, BadRows, Row, Split, parse_rows

BUNDLED_PREFIX = "bundled:"
S3_PREFIX = "s3://"
KINDS = f"a file ({', '.join(SUFFIXES)}), a folder of them, s3://BUCKET/KEY, a hub id or `bundled:NAME`"
# What the files and splits of a dataset are called, the preferred name first.
SPLIT_NAMES: dict[Split, tuple[str, ...]] = {
    "train": ("train", "training"),
    "eval": ("validation", "valid", "val", "dev", "eval", "test"),
}


@dataclass(frozen=True, slots=True)
class Source:
    """A source as the config names it: `PLACE` or `PLACE#SPLIT`."""

    place: str
    split: Split
    named_split: str | None = None

    @property
    def field(self) -> str:
        """The setting that errors name."""
        return f"data.{self.split}"

    @property
    def wanted(self) -> tuple[str, ...]:
        """Names of the split, the preferred one first."""
        return (self.named_split,) if self.named_split else SPLIT_NAMES[self.split]


def read_rows(
    source: str, max_rows: int | None = None, split: Split = "train", bad_rows: BadRows | None = None
) -> list[Row]:
    """Read the first `max_rows` rows (all where None) of a source.

    Args:
        source: a .jsonl, .json, .csv, .tsv or .parquet file, a folder of them, a folder that `datasets` saved, a hub
            id `owner/name[:subset][@revision]`, `s3://bucket/key-or-prefix`, or `bundled:NAME`. `#SPLIT` after a
            folder or a hub id names the split to read.
        split: what the rows are for: it picks the split where the source has several, and names the field in errors.
        bad_rows: takes the rows that cannot be read; they are errors where None.

    Raises:
        UserError: the source is missing, unreadable or empty, or a row is malformed.
    """
    bad_rows = bad_rows or BadRows()
    rows = list(islice(iterate_rows(_parse_source(source, split), bad_rows), max_rows))
    if not rows:
        first = next(iter(bad_rows.first.values()), None)
        if first is not None:
            raise UserError("source-all-bad", field=f"data.{split}", place=source, first=first)
        raise UserError("source-without-rows", field=f"data.{split}", place=source)
    return rows


def iterate_rows(source: Source, bad_rows: BadRows) -> Iterator[Row]:
    """The rows of a source, file after file in the order of their paths."""
    place = source.place
    if place.startswith(BUNDLED_PREFIX):
        resource = _bundled_resource(source)
        with resource.open("rb") as file:
            yield from parse_rows(file, resource.name, bad_rows)  # type: ignore[arg-type]
    elif place.startswith(S3_PREFIX):
        # Loads Arrow's S3 library, which other runs do without.
        from qlora_dist.data.s3 import list_objects, open_object

        store, keys = list_objects(place, source.field)
        names = [key for key in keys if key.lower().endswith(SUFFIXES)]
        for key in _of_split(names, source) if keys != [place.removeprefix(S3_PREFIX)] else _known(keys, source):
            with open_object(store, key, source.field) as file:
                yield from parse_rows(file, S3_PREFIX + key, bad_rows)
    elif (path := Path(place).expanduser()).is_dir():
        if is_saved_dataset(path):
            yield from read_saved_dataset(path, source.field, source.wanted, place)
            return
        yield from _read_files(_folder_files(path, source), source, bad_rows)
    elif path.is_file():
        yield from _read_files(_known([place], source), source, bad_rows)
    elif not place.lower().endswith(SUFFIXES) and (hub_id := HUB_ID.fullmatch(place)):
        yield from read_hub(hub_id, source.field, source.wanted)
    else:
        raise UserError("source-missing", field=source.field, place=place, kinds=KINDS)


def bundled_names(split: Split) -> list[str]:
    """The names that `bundled:NAME` accepts for `split`, sorted."""
    suffix = f".{split}.jsonl"
    folder = _bundled_folder()
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    return sorted(name.removesuffix(suffix) for name in names if name.endswith(suffix))


def _parse_source(source: str, split: Split) -> Source:
    place, _, named = source.rpartition("#")
    if place and re.fullmatch(r"[\w.-]+", named) and not Path(source).expanduser().exists():
        return Source(place, split, named)
    return Source(source, split)


def _read_files(paths: list[str], source: Source, bad_rows: BadRows) -> Iterator[Row]:
    for path in paths:
        try:
            with Path(path).expanduser().open("rb") as file:
                yield from parse_rows(file, path, bad_rows)
        except OSError as error:
            raise UserError("source-unreadable", field=source.field, file=path, reason=error.strerror) from error


def _folder_files(folder: Path, source: Source) -> list[str]:
    paths = sorted(
        path
        for path in folder.rglob("*")
        if path.name.lower().endswith(SUFFIXES)
        and not any(part.startswith((".", "_")) for part in path.relative_to(folder).parts)
    )
    return _of_split([str(path) for path in paths], source)


def _known(names: list[str], source: Source) -> list[str]:
    if not names[0].lower().endswith(SUFFIXES):
        ending = PurePosixPath(names[0]).suffix or "no ending"
        raise UserError("source-ending", field=source.field, file=names[0], ending=ending, endings=", ".join(SUFFIXES))
    return names


def _of_split(names: list[str], source: Source) -> list[str]:
    """The files of the wanted split, where their names or folders tell splits apart; else all of them."""
    if not names:
        raise UserError("source-folder-empty", field=source.field, place=source.place, endings=", ".join(SUFFIXES))
    splits: dict[str, list[str]] = {}
    for name in names:
        relative = name.removeprefix(source.place.removeprefix(S3_PREFIX)).strip("/")
        splits.setdefault(_split_of(relative, source.named_split), []).append(name)
    if source.named_split is None and set(splits) == {""}:
        return names
    found = next((splits[wanted] for wanted in source.wanted if wanted in splits), None)
    if found is None:
        raise UserError(
            "source-without-split",
            field=source.field,
            place=source.place,
            splits=", ".join(sorted(filter(None, splits))) or "no split",
            wanted=" or ".join(source.wanted),
        )
    return found


def _split_of(relative: str, named: str | None) -> str:
    """The split that a file's name or a folder on its path tells (`train-00001-of-2.parquet`); "" where none does."""
    names = {name for names in SPLIT_NAMES.values() for name in names} | ({named} if named else set())
    for part in reversed(PurePosixPath(relative).parts):
        stem = part.partition(".")[0].lower()
        match = next((name for name in names if re.fullmatch(rf"{re.escape(name.lower())}([-_]\d.*)?", stem)), None)
        if match is not None:
            return match
    return ""


def _bundled_folder() -> Traversable:
    return files("qlora_dist.data").joinpath("bundled")


def _bundled_resource(source: Source) -> Traversable:
    name, split = source.place.removeprefix(BUNDLED_PREFIX), source.split
    names = bundled_names(split)
    if name not in names:
        have = ", ".join(names) or "none"
        raise UserError("bundled-dataset-unknown", field=source.field, name=name, split=split, names=have)
    return _bundled_folder().joinpath(f"{name}.{split}.jsonl")
