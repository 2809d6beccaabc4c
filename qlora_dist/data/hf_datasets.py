"""Rows from what the `datasets` library holds: folders that it saved, and the Hugging Face hub."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qlora_dist.config.errors import UserError
from qlora_dist.data.rows import Row, without_nulls

HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(:(?P<subset>[\w.-]+))?(@(?P<revision>[\w./-]+))?")
MARKS = ("dataset_dict.json", "dataset_info.json")


def is_saved_dataset(folder: Path) -> bool:
    """Whether `save_to_disk` wrote this folder."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def read_saved_dataset(folder: Path, field: str, wanted: tuple[str, ...], name: str) -> Iterator[Row]:
    """The rows of a Dataset or DatasetDict that `save_to_disk` wrote.

    Raises:
        UserError: the folder is damaged, or has none of the `wanted` splits.
    """
    import pyarrow
    from datasets import load_from_disk

    try:
        loaded: Any = load_from_disk(str(folder))
        yield from _rows(_pick(loaded, field, wanted, name), name)
    except (OSError, ValueError, KeyError, TypeError, pyarrow.ArrowException) as error:
        raise UserError("saved-dataset-damaged", field=field, place=name, reason=error) from error


def read_hub(hub_id: re.Match[str], field: str, wanted: tuple[str, ...]) -> Iterator[Row]:
    """The rows of `owner/name[:subset][@revision]`, downloaded by `datasets` or from its cache.

    Raises:
        UserError: it does not exist, is gated, cannot be reached, or has no such subset, revision or split.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError, DatasetsError
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    repo, subset = hub_id["repo"], hub_id["subset"]
    try:
        loaded: Any = load_dataset(repo, subset, revision=hub_id["revision"])
    except DatasetNotFoundError as error:
        reason = str(error)
        if "gated" in reason:
            raise UserError("hub-dataset-gated", field=field, repo=repo) from error
        if hub_id["revision"] and "Revision" in reason:
            raise UserError("hub-dataset-revision", field=field, repo=repo, revision=hub_id["revision"]) from error
        raise UserError("hub-dataset-missing", field=field, repo=repo) from error
    except (OfflineModeIsEnabled, ConnectionError) as error:
        raise UserError("hub-dataset-unreachable", field=field, repo=repo, reason=error) from error
    except (HfHubHTTPError, DatasetsError, ValueError, RuntimeError) as error:
        raise UserError("hub-dataset-unloadable", field=field, repo=repo, reason=error) from error
    yield from _rows(_pick(loaded, field, wanted, repo), hub_id.group())


def _pick(loaded: Any, field: str, wanted: tuple[str, ...], name: str) -> Any:
    """The wanted split of a DatasetDict; a Dataset as it is."""
    from datasets import DatasetDict

    if not isinstance(loaded, DatasetDict):
        return loaded
    split = next((split for split in wanted if split in loaded), None)
    if split is None:
        splits, names = ", ".join(sorted(loaded)), " or ".join(wanted)
        raise UserError("dataset-without-split", field=field, place=name, splits=splits, wanted=names)
    return loaded[split]


def _rows(dataset: Any, name: str) -> Iterator[Row]:
    for number, data in enumerate(dataset, start=1):
        yield Row(without_nulls(data), name, number, "row")
