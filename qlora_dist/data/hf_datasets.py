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
        raise UserError(
            f"{field}: {name} is not a whole `datasets` folder ({_first_line(error)}); save it again."
        ) from error


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
            mend = "accept its conditions on the hub, then run `hf auth login` or set HF_TOKEN"
            raise UserError(f"{field}: the hub dataset {repo} is gated; {mend}.") from error
        if hub_id["revision"] and "Revision" in reason:
            raise UserError(
                f"{field}: the hub dataset {repo} has no revision {hub_id['revision']!r}; mend what follows the @."
            ) from error
        raise UserError(
            f"{field}: {repo} is neither a path here nor a dataset that the hub shows you; mend the name, or set "
            "HF_TOKEN if it is private."
        ) from error
    except (OfflineModeIsEnabled, ConnectionError) as error:
        raise UserError(
            f"{field}: {repo} does not exist here, and the hub cannot be reached ({_first_line(error)}); mend the "
            "path, or download the dataset where there is a network and give its folder."
        ) from error
    except (HfHubHTTPError, DatasetsError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{field}: the hub dataset {repo} cannot be loaded ({_first_line(error)}); name what it has as "
            "owner/name:subset@revision#split."
        ) from error
    yield from _rows(_pick(loaded, field, wanted, repo), hub_id.group())


def _pick(loaded: Any, field: str, wanted: tuple[str, ...], name: str) -> Any:
    """The wanted split of a DatasetDict; a Dataset as it is."""
    from datasets import DatasetDict

    if not isinstance(loaded, DatasetDict):
        return loaded
    split = next((split for split in wanted if split in loaded), None)
    if split is None:
        raise UserError(
            f"{field}: {name} has the splits {', '.join(sorted(loaded))}, none of them {' or '.join(wanted)}; "
            f"name one with {name}#SPLIT."
        )
    return loaded[split]


def _rows(dataset: Any, name: str) -> Iterator[Row]:
    for number, data in enumerate(dataset, start=1):
        yield Row(without_nulls(data), name, number, "row")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
