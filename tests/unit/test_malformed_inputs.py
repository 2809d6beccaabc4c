"""Malformed inputs through the whole command: one sentence, exit code 2, no checkpoint changed, no secret shown."""

import hashlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from moto import settings as moto_settings
from moto.server import ThreadedMotoServer

from qlora_dist import cli
from qlora_dist.coordinate.manifest import list_committed
from tests.single import small_config
from tests.unit.malformed_box import Box, flip, refusing_server
from tests.unit.malformed_table import CASES, CONFIG, Case

pytestmark = pytest.mark.timeout(120)
ANSWERS = {
    "gated": (403, {"X-Error-Code": "GatedRepo"}),
    "private": (404, {"X-Error-Code": "RepoNotFound"}),
    "strange": (403, {}),
    "refused": (401, {"X-Error-Message": "Invalid credentials in Authorization header"}),
}


def settings_of(run_dir: Path, base: Path) -> dict[str, Any]:
    """The configuration that every case starts from; without a case's damage it trains."""
    config = small_config(run_dir, base, train={"optim": "adamw_8bit"}, track={"tensorboard": False, "report": False})
    return config.model_dump(mode="json", exclude_unset=True)


def command(*arguments: str | Path) -> int:
    """Run the command line in this process; its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["qlora-dist", *map(str, arguments)])
        try:
            cli.main()
        except SystemExit as end:
            return int(end.code or 0)
    return 0


def checkpoint_bytes(folder: Path) -> dict[str, str]:
    """Relative path -> SHA-256 of every file of every checkpoint below `folder`."""
    files = (
        p for place in folder.rglob("*") if place.name.startswith("step-") for p in place.rglob("*") if p.is_file()
    )
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def trained(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with the checkpoints of steps 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "config.yaml").write_text(yaml.safe_dump(settings_of(folder / "run", tiny_model)))
    assert command("train", folder / "config.yaml") == 0
    assert len(list((folder / "run" / "checkpoints").glob("step-*"))) == 3
    return folder / "run"


@pytest.fixture(scope="module")
def serve() -> Iterator[Callable[[str], str]]:
    """Starts servers of this machine when they are asked for."""
    started: dict[str, tuple[str, Callable[[], None]]] = {}

    def address(name: str) -> str:
        if name not in started and name == "s3":
            # From the first request on it checks signatures, and knows no user.
            server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
            server.start()
            host, port = server.get_host_and_port()
            started[name] = (f"http://{host}:{port}", server.stop)
        elif name not in started:
            stub = refusing_server(*ANSWERS[name])
            started[name] = (f"http://127.0.0.1:{stub.server_port}", stub.shutdown)
        return started[name][0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moto_settings, "INITIAL_NO_AUTH_ACTION_COUNT", 0)
        yield address
        for _, stop in started.values():
            stop()


@pytest.fixture
def box(
    tiny_model: Path, trained: Path, serve: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Box:
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "AWS_PROFILE", "AWS_SESSION_TOKEN",
                 "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "RANK", "WORLD_SIZE"):  # fmt: skip
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    return Box(tmp_path, tiny_model, trained, monkeypatch, serve, settings_of(tmp_path / "run", tiny_model))


def arrange(case: Case, box: Box) -> tuple[Path, list[str]]:
    """Bring the case about; the configuration's path and the overrides."""
    found = case.prepare(box)
    path = box.folder / "config.yaml"
    path.write_bytes(box.text if box.text is not None else yaml.safe_dump(box.values).encode())
    return box.config or path, found if isinstance(found, list) else []


def test_the_table_is_large_enough() -> None:
    assert len(CASES) >= 60
    assert {case.kind for case in CASES} == {"config", "data", "model", "adapter", "checkpoint", "credentials"}
    assert len({(case.kind, case.what) for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=[f"{case.kind}: {case.what}" for case in CASES])
def test_ends_in_one_sentence(case: Case, box: Box, capfd: pytest.CaptureFixture[str]) -> None:
    config, overrides = arrange(case, box)
    before = checkpoint_bytes(box.folder)
    capfd.readouterr()
    code = command("train", config, *overrides)
    out, err = capfd.readouterr()
    assert (code, "Traceback" in out + err) == (2, False), out + err
    (line,) = err.splitlines()
    print(line)
    assert line.startswith("error: ")
    assert re.search(case.sentence, line)
    assert "error" not in out
    assert [secret for secret in box.secrets if secret in out + err] == []
    assert checkpoint_bytes(box.folder) == before


@pytest.mark.parametrize("case", CONFIG, ids=[case.what for case in CONFIG])
def test_config_show_says_the_same(case: Case, box: Box, capfd: pytest.CaptureFixture[str]) -> None:
    config, overrides = arrange(case, box)
    capfd.readouterr()
    assert (command("config", "show", config, *overrides), command("train", config, *overrides)) == (2, 2)
    out, err = capfd.readouterr()
    shown, trained = err.splitlines()
    assert shown == trained
    assert out == ""


@pytest.mark.parametrize("what", ["cut file"])
def test_a_process_of_its_own_says_no_more(what: str, box: Box) -> None:
    """Warnings, and what libraries write before Python's streams are there, would be seen here only."""
    (case,) = [case for case in CASES if case.what == what and case.kind != "adapter"]
    config, overrides = arrange(case, box)
    before = checkpoint_bytes(box.folder)
    line = [sys.executable, "-m", "qlora_dist.cli", "train", str(config), *overrides]
    done = subprocess.run(line, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2, done.stderr
    assert re.fullmatch(f"error: .*{case.sentence}.*\n", done.stderr)
    assert checkpoint_bytes(box.folder) == before


def damage_event_log(run_dir: Path) -> None:
    log = run_dir / "events.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    lines[len(lines) // 2] = b"\0" * 30 + b"\n"
    log.write_bytes(b"".join(lines))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (damage_event_log, r"resumed from .*step-00000006-g0001"),
        (lambda run: flip(list_committed(run)[0] / "state.json"),
         r"step-00000006-g0001 is damaged and passed over: state\.json has been altered(.|\n)*from .*00000004-g0001"),
    ],
    ids=["event log damaged in its middle", "newest checkpoint damaged"],
)  # fmt: skip
def test_what_can_be_gone_on_from_is(
    change: Callable[[Path], object], told: str, box: Box, capfd: pytest.CaptureFixture[str]
) -> None:
    change(box.run())
    config, _ = arrange(Case("", "", "", lambda box: None), box)
    before = checkpoint_bytes(box.folder)
    assert command("train", config, "train.max_steps=7", "checkpoint.keep_last=9") == 0
    out, err = capfd.readouterr()
    assert re.search(told, out)
    assert "Traceback" not in out + err
    assert before.items() <= checkpoint_bytes(box.folder).items()
