"""The event log: whole lines, torn tails, the lock."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from qlora_dist.config.errors import UserError
from qlora_dist.coordinate.log import EventLog


def append(log: EventLog, **fields: object) -> None:
    with log.locked():
        log.append({"kind": "note", **fields})


def test_two_logs_over_one_file_see_each_other_and_only_what_is_new(tmp_path: Path) -> None:
    one, two = EventLog(tmp_path / "events.jsonl"), EventLog(tmp_path / "events.jsonl")
    append(one, n=1)
    append(two, n=2)
    assert [event["n"] for event in one.read_new()] == [1, 2]
    append(two, n=3)
    assert [event["n"] for event in one.read_new()] == [3]
    assert one.read_new() == []


@pytest.mark.parametrize("torn", [b'{"kind": "note", "n"', b"x" * 200_000])
def test_a_torn_last_line_is_ignored_by_readers_and_cut_off_by_the_next_writer(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "events.jsonl"
    append(EventLog(path), n=1)
    with open(path, "ab") as file:
        file.write(torn)
    reader = EventLog(path)
    assert [event["n"] for event in reader.read_new()] == [1]
    append(EventLog(path), n=2)
    assert [event["n"] for event in reader.read_new()] == [2]
    assert [json.loads(line)["n"] for line in path.read_text().splitlines()] == [1, 2]


def test_a_damaged_inner_line_is_left_out_by_whoever_holds_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    append(EventLog(path), n=1)
    with open(path, "ab") as file:
        file.write(b"\0\0\0\0\n[1]\n")
    append(EventLog(path), n=2)
    log = EventLog(path)
    assert [event["n"] for event in log.read_new()] == [1]  # it may be on its way: not passed over
    with log.locked():
        assert [event["n"] for event in log.read_new()] == [2]


def test_a_log_that_shrinks_or_vanishes_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    log = EventLog(path)
    append(log, n=1)
    log.read_new()
    os.truncate(path, 3)
    with pytest.raises(RuntimeError, match="cut short"):
        log.read_new()
    path.unlink()
    with pytest.raises(RuntimeError, match="removed"):
        log.read_new()


def test_appending_without_the_lock_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="locked"):
        EventLog(tmp_path / "events.jsonl").append({"kind": "note"})


def test_threads_of_one_object_exclude_each_other(tmp_path: Path) -> None:
    log, inside, most = EventLog(tmp_path / "events.jsonl"), [0], [0]

    def work() -> None:
        for _ in range(20):
            with log.locked():
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                time.sleep(0.0005)
                log.append({"kind": "note"})
                inside[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most[0] == 1
    assert len(log.read_new()) == 80


HOLDER = """
import sys, time
from pathlib import Path
from qlora_dist.coordinate.log import EventLog
with EventLog(Path(sys.argv[1])).locked():
    print("locked", flush=True)
    time.sleep(60)
"""


def test_a_stopped_holder_of_the_lock_is_named_and_its_death_frees_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    child = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == b"locked\n"
        child.send_signal(signal.SIGSTOP)
        log = EventLog(path, lock_timeout_s=0.3)
        with pytest.raises(UserError, match=rf"locked for 0 s by process {child.pid} on host"):
            append(log, n=1)
        child.kill()
        child.wait()
        append(log, n=2)
        assert [event["n"] for event in log.read_new()] == [2]
    finally:
        child.kill()
        child.wait()


def test_what_is_not_finite_is_null_in_the_log(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    append(log, loss=math.nan, told={"each": [1.5, -math.inf], "steps": 3})
    json.loads((tmp_path / "events.jsonl").read_text(), parse_constant=pytest.fail)
    assert log.read_new()[0] == {"kind": "note", "loss": None, "told": {"each": [1.5, None], "steps": 3}}
