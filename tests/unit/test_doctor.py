"""`qlora-dist doctor`: its table and its exit codes; of nodes see tests/cluster."""

import json
import os
import subprocess
import sys

import pytest
from rich.console import Console
from typer.testing import CliRunner

from qlora_dist.cli import app
from qlora_dist.cluster.doctor import command
from qlora_dist.cluster.doctor.examine import examine
from qlora_dist.cluster.doctor.lines import Line
from qlora_dist.cluster.doctor.table import as_json, show, worst
from tests.unit.doctor_facts import TROUBLES, WANTED, cluster


@pytest.mark.parametrize("width", [80, 200])
def test_every_line_and_mend_is_in_the_table(width: int) -> None:
    found = cluster()
    for name in ("full", "clock", "too old", "hot"):
        TROUBLES[name][0](found)
    lines = examine(found, WANTED)
    console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    show(lines, console)
    text = console.export_text()
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width
    for line in lines:
        for word in f"{line.found} {line.mend}".split():
            assert word in text
    assert "Mend before a run: versions, space, clock." in text
    told = as_json(lines, found)
    assert (told["verdict"], len(told["lines"]), len(told["ranks"])) == ("fail", len(lines), 4)


def test_the_gravest_verdict_decides() -> None:
    lines = [Line("a", "ok", ""), Line("b", "skipped", "")]
    assert worst(lines) == "ok"
    assert worst([*lines, Line("c", "warn", "")]) == "warn"
    assert worst([*lines, Line("c", "warn", ""), Line("d", "fail", "")]) == "fail"


@pytest.mark.parametrize(("environment", "code"), [({}, 1), ({"TORCHELASTIC_RUN_ID": "none"}, 0)])
def test_under_torchrun_a_fail_is_in_the_table_only(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], code: int
) -> None:
    """torchrun takes rank 0's exit code for a crash."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setattr(command, "diagnose", lambda *_: ([Line("ports", "fail", "29400 is taken", "end that")], []))
    done = CliRunner().invoke(app, ["doctor", "--json"], env=environment)
    assert (done.exit_code, json.loads(done.stdout)["verdict"]) == (code, "fail")


@pytest.mark.parametrize("port", ["0", "-1", "70000"])
def test_a_port_that_there_is_not_is_refused(port: str) -> None:
    done = CliRunner().invoke(app, ["doctor", "--port", "29400", "--port", port])
    assert done.exit_code == 2
    assert "'--port'" in done.stderr


@pytest.mark.parametrize(
    ("words", "environment", "sentence"),
    [
        (["no.yaml"], {}, "no.yaml"),
        (["--address", "127.0.0.1:9"], {}, "no Ray cluster answers at --address=127.0.0.1:9"),
        ([], {"RAY_ADDRESS": "127.0.0.1:9"}, "no Ray cluster answers at RAY_ADDRESS=127.0.0.1:9"),
        ([], {"RANK": "1", "WORLD_SIZE": "2"}, "MASTER_ADDR is not set"),
    ],
)
def test_what_a_person_can_mend_is_one_sentence_and_exit_code_2(
    words: list[str], environment: dict[str, str], sentence: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "qlora_dist.cli", "doctor", *words], capture_output=True, text=True, timeout=100,
        env=os.environ | environment,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert sentence in done.stderr
    assert done.stderr.count("\n") == 1
