"""Names and manifests of checkpoint folders. A checkpoint without its manifest does not exist.

checkpoints/.writing-g0003-00000060-1a2b3c4d/   being written by generation 3
checkpoints/step-00000060-g0003/                committed: manifest.json lists every file with size and SHA-256
checkpoints/.trash-1a2b3c4d/                    being removed
"""

import errno
import hashlib
import json
import os
import re
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_dist.coordinate.files import sha256_of, write_atomically

CHECKPOINTS = "checkpoints"
MANIFEST = "manifest.json"
FORMAT = 1
_COMMITTED = re.compile(r"step-(\d{8,})-g(\d{4,})")
_WRITING = re.compile(r"\.writing-g(\d{4,})-(\d{8,})-[0-9a-f]+")
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")
Files = Mapping[str, Mapping[str, Any]]


def committed_name(generation: int, step: int) -> str:
    """Name of the folder of a committed checkpoint."""
    return f"step-{step:08d}-g{generation:04d}"


def new_writing_name(generation: int, step: int) -> str:
    """A fresh name for a folder that a checkpoint is written in before it is committed."""
    return f".writing-g{generation:04d}-{step:08d}-{secrets.token_hex(4)}"


def parse_committed(name: str) -> tuple[int, int] | None:
    """(generation, step) of a committed folder's name, None for any other name."""
    match = _COMMITTED.fullmatch(name)
    return (int(match[2]), int(match[1])) if match else None


def parse_writing(name: str) -> tuple[int, int] | None:
    """(generation, step) of a writing folder's name, None for any other name."""
    match = _WRITING.fullmatch(name)
    return (int(match[1]), int(match[2])) if match else None


def list_committed(run_dir: Path) -> list[Path]:
    """Folders of committed checkpoints, newest (generation, step) first. Whether they are intact is not looked at."""
    found = []
    if (run_dir / CHECKPOINTS).is_dir():
        for folder in (run_dir / CHECKPOINTS).iterdir():
            if (key := parse_committed(folder.name)) is not None:
                found.append((key, folder))
    return [folder for _, folder in sorted(found, reverse=True)]


def _digest(manifest: Mapping[str, Any]) -> str:
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_manifest(
    folder: Path, run_id: str, generation: int, step: int, time: float, files: Files, metrics: Mapping[str, Any]
) -> None:
    """Write `manifest.json`, durably and in one step. The caller holds the event log's lock."""
    manifest = {
        "format": FORMAT,
        "run_id": run_id,
        "generation": generation,
        "step": step,
        "time": time,
        "metrics": dict(metrics),
        "files": {name: {"bytes": files[name]["bytes"], "sha256": files[name]["sha256"]} for name in sorted(files)},
    }
    # Through JSON once, so that the digest is that of what a reader gets back.
    manifest = json.loads(json.dumps(manifest))
    manifest["sha256"] = _digest(manifest)
    write_atomically(folder / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint folder.

    Raises:
        ValueError: it is missing, unreadable, altered, or that of another checkpoint; the message says which.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{MANIFEST} is missing") from None
    except NotADirectoryError:
        raise ValueError("it is not a folder") from None
    except ValueError:
        raise ValueError(f"{MANIFEST} is not readable JSON") from None
    if not isinstance(manifest, dict) or manifest.get("sha256") != _digest(manifest):
        raise ValueError(f"{MANIFEST} has been altered: its own checksum differs")
    if manifest["format"] != FORMAT:
        raise ValueError(f"{MANIFEST} has format {manifest['format']}; this version reads format {FORMAT}")
    named = parse_committed(folder.name)
    if named is not None and named != (manifest["generation"], manifest["step"]):
        raise ValueError(f"{MANIFEST} is that of {committed_name(manifest['generation'], manifest['step'])}")
    return manifest


def require_files(files: Files) -> None:
    """Raise ValueError unless this is a table of plain file names with sizes and checksums, of one file at least."""
    if not files:
        raise ValueError("a checkpoint has files")
    for name, entry in files.items():
        if not _FILE_NAME.fullmatch(name) or name == MANIFEST:
            raise ValueError(f"{name!r} is no name for a file of a checkpoint")
        size, sha256 = entry.get("bytes"), entry.get("sha256")
        if type(size) is not int or not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
            raise ValueError(f"{name}: bytes and sha256 are needed")


def check_files(folder: Path, files: Files, checksums: bool) -> list[str]:
    """What is wrong with the files of a folder, one phrase each; empty where all is well.

    Args:
        checksums: read every byte; else only existence and sizes are looked at.
    """
    problems = []
    for name, expected in files.items():
        if not _FILE_NAME.fullmatch(name):
            problems.append(f"{name!r} is not a plain file name")
            continue
        try:
            found = os.lstat(folder / name)
        except (FileNotFoundError, NotADirectoryError):
            problems.append(f"{name} is missing")
            continue
        if not stat.S_ISREG(found.st_mode):
            problems.append(f"{name} is not a plain file")
        elif found.st_size != expected["bytes"]:
            problems.append(f"{name} has {found.st_size} bytes instead of {expected['bytes']}")
        elif checksums and sha256_of(folder / name) != expected["sha256"]:
            problems.append(f"{name} has been altered: its checksum differs")
    return problems


def find_problems(folder: Path, checksums: bool) -> list[str]:
    """What is wrong with a committed checkpoint, one phrase each; empty where all is well."""
    try:
        return check_files(folder, read_manifest(folder)["files"], checksums)
    except ValueError as error:
        return [str(error)]
    except OSError as error:
        # A bad disk is damage. Anything else (permission, a server that is away) may pass, and to go on from an
        # older checkpoint because of it would throw work away.
        if error.errno not in (errno.EIO, errno.EBADMSG, errno.EUCLEAN):
            raise
        return [f"it cannot be read: {error.strerror}"]
