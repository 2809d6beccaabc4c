"""The few file operations that everything durable goes through."""

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
from pathlib import Path

from qlora_dist.config.errors import UserError

HASH_CHUNK_BYTES = 1 << 20
NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
NO_ACCESS = {errno.EACCES, errno.EPERM, errno.EROFS}
NO_FOLDER = {errno.ENOTDIR, errno.EEXIST}


def fsync_folder(folder: Path) -> None:
    """Make the folder's entries (files created, renamed, removed in it) survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network filesystems have no fsync of a folder: their entries are synchronous.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def write_atomically(path: Path, data: bytes, durable: bool = True) -> None:
    """Replace `path` by a file with `data`: a reader sees the old file or the new one, never a part.

    Args:
        durable: wait until file and folder entry are on the disk.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        fsync_folder(path.parent)


def sha256_of(path: Path) -> str:
    """The file's SHA-256 as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def move_to_trash(folder: Path) -> None:
    """Take `folder` out of sight in one atomic step; its files are removed later with `empty_trash`.

    Removing in place could be cut short, and what is left would look like a damaged checkpoint.
    """
    with contextlib.suppress(FileNotFoundError):  # its own writer may have removed it just now
        os.rename(folder, folder.with_name(f".trash-{secrets.token_hex(4)}"))


def empty_trash(parent: Path) -> None:
    """Remove every `.trash-*` folder in `parent`."""
    for trash in parent.glob(".trash-*"):
        # A file that a cut-off process still holds open (NFS) or that another coordinator removes at this very
        # moment may be in the way; what stays is tried again at the next commit.
        shutil.rmtree(trash, ignore_errors=True)


def explain(error: OSError, folder: Path) -> Exception:
    """The `UserError` for a full disk, a quota, missing permission or a file in the place of a folder; else `error`."""
    if error.errno in NO_SPACE:
        return UserError("storage-full", folder=folder, error=error.strerror)
    if error.errno in NO_ACCESS:
        return UserError("run-folder-not-writable", folder=folder, error=error.strerror)
    if error.errno == errno.EISDIR:
        return UserError("run-file-is-folder", folder=folder, file=error.filename)
    if error.errno in NO_FOLDER:
        return UserError("run-folder-is-file", folder=folder, file=_the_file(Path(error.filename or folder)))
    return error


def _the_file(path: Path) -> Path:
    """Which part of a path is a file, so that nothing can lie below it."""
    return next((part for part in (path, *path.parents) if part.exists() and not part.is_dir()), path)
