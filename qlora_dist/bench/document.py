"""The JSON of a benchmark: machine, versions, settings, records; written anew after each record."""

import json
import platform
import shutil
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from qlora_dist import __version__
from qlora_dist.config.errors import UserError

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "triton", "liger_kernel", "unsloth", "trl")
Record = dict[str, Any]


def machine() -> dict[str, Any]:
    """The devices and the versions of what computes; asks nvidia-smi, so that no GPU memory is taken."""
    devices: list[str] = []
    if shutil.which("nvidia-smi") is not None:
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        devices = subprocess.run(command, capture_output=True, text=True).stdout.strip().splitlines()
    return {
        "device": devices[0] if devices else f"CPU ({platform.machine()})",
        "gpus": len(devices),
        "python": platform.python_version(),
        "versions": {"qlora-dist": __version__} | installed(PACKAGES),
    }


def installed(packages: Sequence[str]) -> dict[str, str]:
    """The versions of those that are there."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def begin(out: Path, resume: bool, **facts: Any) -> dict[str, Any]:
    """A new document without records, or with `resume` what `out` holds, if it was measured on such a machine.

    Raises:
        UserError: `out` cannot be read or written, or was measured on another machine or with other versions.
    """
    document = {**facts, **machine(), "records": []}
    if resume and out.exists():
        try:
            earlier = json.loads(out.read_text(encoding="utf-8"))
            same = all(earlier[key] == document[key] for key in ("what", "device", "gpus", "versions"))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError("bench-not-resumable", file=out, error=error) from error
        if not same:
            raise UserError("bench-not-resumable", file=out, error="measured with other hardware or versions")
        return {**earlier, **facts}
    write(out, document)
    return document


def write(out: Path, document: dict[str, Any]) -> None:
    """Replace the JSON at `out`.

    Raises:
        UserError: it cannot be written.
    """
    partial = out.with_name(out.name + ".new")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        partial.replace(out)
    except OSError as error:
        raise UserError("bench-not-writable", file=out, error=error) from error


def read(path: Path) -> dict[str, Any]:
    """A document that `write` has written.

    Raises:
        UserError: there is none.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(document["records"], list):
            raise ValueError("no list of records")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError("bench-unreadable", file=path, error=f"{type(error).__name__}: {error}") from error
    return dict(document)
