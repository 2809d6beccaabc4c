"""Folders that appear whole or not at all, whichever of several processes writes them."""

import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from filelock import FileLock

from qlora_dist.config.errors import UserError


def cache_root() -> Path:
    """Where converted models and tokenised data are kept: `$QLORA_DIST_CACHE`, else `~/.cache/qlora-dist`."""
    return Path(os.environ.get("QLORA_DIST_CACHE") or Path.home() / ".cache" / "qlora-dist").expanduser().absolute()


@contextmanager
def folder_lock(target: Path, setting: str = "QLORA_DIST_CACHE") -> Iterator[None]:
    """Hold the one lock of `target` among the processes that share its file system; waits for as long as it takes.

    The operating system releases it when its holder dies, so a killed writer never blocks the next.

    Args:
        setting: what names the place of `target`, for the error.

    Raises:
        UserError: the parent folder cannot be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(target.parent / f".{target.name}.lock")
        lock.acquire()
    except PermissionError as error:
        raise UserError("cache-not-writable", setting=setting, folder=target.parent, error=error.strerror) from error
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(
            "cache-not-writable", setting=setting, folder=target.parent, error="it is a file, or below one"
        ) from error
    try:
        yield
    finally:
        lock.release()


def publish_folder(target: Path, write: Callable[[Path], None], replace: bool = False) -> bool:
    """Let `write` fill a folder beside `target`, then give it that name in one step.

    Args:
        target: the folder's final place; its parent is made where absent.
        write: fills the (existing, empty) folder it is given.
        replace: put the new folder in the place of an old one; else the first to publish wins.

    Returns:
        False where another process published `target` first (its folder stays, ours is dropped).
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(target)
    partial = target.parent / f"{_partial_prefix(target)}{os.getpid()}-{uuid4().hex[:8]}"
    partial.mkdir()
    try:
        write(partial)
        _open_to_readers(partial)
        _sync(partial)
        if replace and target.exists():
            old = partial.with_name(partial.name + "-old")
            target.rename(old)
            partial.rename(target)
            shutil.rmtree(old)
            return True
        try:
            partial.rename(target)
        except OSError:
            if not target.is_dir():
                raise
            return False
        return True
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _partial_prefix(target: Path) -> str:
    return f".{target.name}.partial-{socket.gethostname()}-"


def _remove_leftovers(target: Path) -> None:
    # Only this host's: whether a writer on another node is alive cannot be seen from here.
    for leftover in target.parent.glob(f"{_partial_prefix(target)}*"):
        pid = int(leftover.name.removeprefix(_partial_prefix(target)).split("-")[0])
        if pid == os.getpid() or Path(f"/proc/{pid}").exists():
            continue
        if leftover.name.endswith("-old") and not target.exists():
            leftover.rename(target)
        else:
            shutil.rmtree(leftover, ignore_errors=True)


def _open_to_readers(folder: Path) -> None:
    # safetensors writes files that only their owner can read; a cache is often shared.
    for path in (p for p in folder.rglob("*") if p.is_file()):
        path.chmod(path.stat().st_mode | (folder.stat().st_mode & 0o444))


def _sync(folder: Path) -> None:
    for path in [*(p for p in folder.rglob("*") if p.is_file()), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
