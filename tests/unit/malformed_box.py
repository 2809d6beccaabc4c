"""What a malformed input is made from: copies of a good model, adapter, run and data that a case then damages."""

import json
import shutil
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from safetensors.torch import load_file, save_file

from qlora_dist.coordinate.manifest import list_committed, read_manifest, write_manifest

GOOD_ROW = b'{"question": "what is three and four", "answer": "seven"}\n'


@dataclass
class Box:
    """One case's folder and configuration.

    Attributes:
        folder: the case's own; everything that it damages lies below it.
        base: a model that trains; not to be changed.
        trained: a run folder with three checkpoints; not to be changed.
        patch: sets the case's environment.
        serve: names a server of this machine -> its address.
        values: the configuration, written as config.yaml unless `text` is set.
        text: bytes to write as config.yaml instead.
        config: the path that the command is given; config.yaml where None.
    """

    folder: Path
    base: Path
    trained: Path
    patch: pytest.MonkeyPatch
    serve: Callable[[str], str]
    values: dict[str, Any]
    text: bytes | None = None
    config: Path | None = None
    secrets: list[str] = field(default_factory=list)

    def model(self) -> Path:
        """A copy of the model, which the configuration then names."""
        copy = Path(shutil.copytree(self.base, self.folder / "model"))
        self.values["model"]["name"] = str(copy)
        return copy

    def adapter(self) -> Path:
        """A copy of the trained adapter, which the configuration then starts from."""
        copy = Path(shutil.copytree(self.trained / "adapter", self.folder / "start"))
        self.values["adapter"] = {"path": str(copy)}
        return copy

    def run(self) -> Path:
        """A copy of the trained run as this case's run folder."""
        return Path(shutil.copytree(self.trained, self.folder / "run"))

    def checkpoint(self) -> Path:
        """The newest checkpoint of such a copy, which the configuration then resumes from."""
        newest = list_committed(self.run())[0]
        self.values["resume"] = str(newest)
        return newest

    def write(self, name: str, content: bytes) -> Path:
        """A file of the case."""
        path = self.folder / name
        path.write_bytes(content)
        return path

    def data(self, name: str, content: bytes) -> Path:
        """A file of training rows, which the configuration then names."""
        path = self.write(name, content)
        self.values["data"]["train"] = str(path)
        return path

    def secret(self, name: str, value: str) -> None:
        """A credential in the environment, which nothing may print."""
        self.patch.setenv(name, value)
        self.secrets.append(value)


def edit_json(path: Path, **changes: Any) -> None:
    """Set fields of a JSON file; None removes one."""
    fields = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in fields.items() if value is not None}))


def cut(path: Path, last_bytes: int = 100) -> None:
    """Take the end of a file away."""
    path.write_bytes(path.read_bytes()[:-last_bytes])


def flip(path: Path) -> None:
    """Change one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(bytes(content))


def safetensors_header(path: Path, header: Any) -> None:
    """Give a safetensors file another header, its data staying as it is."""
    content = path.read_bytes()
    data = content[8 + struct.unpack("<Q", content[:8])[0] :]
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def edit_tensors(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the tensors of a safetensors file."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def sign_again(checkpoint: Path) -> None:
    """Give a checkpoint whose files were changed a manifest that fits them, as a stranger could."""
    import hashlib

    old = read_manifest(checkpoint)
    files = {
        name: {
            "bytes": (checkpoint / name).stat().st_size,
            "sha256": hashlib.sha256((checkpoint / name).read_bytes()).hexdigest(),
        }
        for name in old["files"]
    }
    fields = (old["run_id"], old["generation"], old["step"], old["time"])
    write_manifest(checkpoint, *fields, files, old["metrics"])


def refusing_server(status: int, headers: dict[str, str], body: bytes = b"") -> ThreadingHTTPServer:
    """A server of this machine that gives every request the same answer."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_HEAD = do_POST = do_GET

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


class Case(NamedTuple):
    """One malformed input.

    Attributes:
        kind: what of the person's is malformed.
        what: how, in a few words.
        sentence: a regular expression that the sentence must contain.
        prepare: brings it about in a box; a list that it returns are overrides of the command line.
    """

    kind: str
    what: str
    sentence: str
    prepare: Callable[[Box], object]


def override(*texts: str) -> Callable[[Box], list[str]]:
    return lambda box: list(texts)


def text(content: bytes) -> Callable[[Box], object]:
    return lambda box: setattr(box, "text", content)


def rows(name: str, content: bytes) -> Callable[[Box], object]:
    return lambda box: box.data(name, content)


def setting(section: str, **values: Any) -> Callable[[Box], object]:
    return lambda box: box.values[section].update(values)


def model_json(name: str = "config.json", **changes: Any) -> Callable[[Box], object]:
    return lambda box: edit_json(box.model() / name, **changes)


def model_file(name: str, change: Callable[[Path], object]) -> Callable[[Box], object]:
    return lambda box: change(box.model() / name)


def adapter_file(name: str, change: Callable[[Path], object]) -> Callable[[Box], object]:
    return lambda box: change(box.adapter() / name)


def checkpoint_file(name: str, change: Callable[[Path], object]) -> Callable[[Box], object]:
    return lambda box: change(box.checkpoint() / name)


def run_again(*overrides: str) -> Callable[[Box], list[str]]:
    def prepare(box: Box) -> list[str]:
        box.run()
        return list(overrides)

    return prepare


def steps(*changes: Callable[[Box], object]) -> Callable[[Box], object]:
    """One after the other; what the last one returns counts."""
    return lambda box: [change(box) for change in changes][-1]
