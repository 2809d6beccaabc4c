"""Objects in S3 and in stores that speak its protocol, through Arrow's client.

Credentials, region and endpoint come from where AWS tools find them: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY,
AWS_SESSION_TOKEN, AWS_PROFILE, AWS_DEFAULT_REGION, AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL, ~/.aws, an instance's role.
"""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from pyarrow.fs import FileSelector, FileType, S3FileSystem

from qlora_dist.config.errors import UserError

CONNECT_TIMEOUT_S = 10.0
REQUEST_TIMEOUT_S = 60.0
BUFFER_BYTES = 8 << 20


def list_objects(url: str, field: str) -> tuple[S3FileSystem, list[str]]:
    """The store, and `bucket/key` of the object `url` or of all objects below it, sorted.

    Raises:
        UserError: there is no such object or prefix, no access, or no answer.
    """
    path = url.removeprefix("s3://").rstrip("/")
    if not path:
        raise UserError("s3-without-bucket", field=field, url=url)
    with _explained(url, field):
        store = _store()
        info = store.get_file_info(path)
        if info.type == FileType.File:
            return store, [path]
        if info.type == FileType.NotFound:
            raise UserError("s3-nothing-there", field=field, url=url)
        found = store.get_file_info(FileSelector(path, recursive=True))
    return store, sorted(entry.path for entry in found if entry.type == FileType.File)


@contextmanager
def open_object(store: S3FileSystem, path: str, field: str) -> Iterator[BinaryIO]:
    """One object, open for reading at any place.

    Raises:
        UserError: it cannot be read.
    """
    with _explained(f"s3://{path}", field):
        raw: Any = store.open_input_file(path)
        # Arrow's own file has no lines, and a request for each small read.
        with io.BufferedReader(raw, BUFFER_BYTES) as file:
            yield file


def _store() -> S3FileSystem:
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_DEFAULT_REGION") or os.environ.get("AWS_REGION")
    return S3FileSystem(
        endpoint_override=endpoint,
        # A store of one's own has no regions to ask for.
        region=region or ("us-east-1" if endpoint else None),
        connect_timeout=CONNECT_TIMEOUT_S,
        request_timeout=REQUEST_TIMEOUT_S,
    )


@contextmanager
def _explained(url: str, field: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = str(error)
        if "ACCESS_DENIED" in reason or "HTTP status 403" in reason or "HTTP status 401" in reason:
            if not _has_credentials():
                raise UserError("s3-without-credentials", field=field, url=url) from error
            raise UserError("s3-access-denied", field=field, url=url) from error
        if "NO_SUCH_BUCKET" in reason or "does not exist" in reason or "HTTP status 404" in reason:
            raise UserError("s3-nothing-there", field=field, url=url) from error
        if "NETWORK_CONNECTION" in reason or "curlCode" in reason:
            raise UserError("s3-unreachable", field=field, url=url) from error
        raise UserError("s3-unreadable", field=field, url=url, reason=error) from error


def _has_credentials() -> bool:
    if os.environ.get("AWS_ACCESS_KEY_ID") or os.environ.get("AWS_WEB_IDENTITY_TOKEN_FILE"):
        return True
    return Path(os.environ.get("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials")).expanduser().is_file()
