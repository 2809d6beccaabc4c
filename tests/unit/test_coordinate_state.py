"""The coordinator's state machine: generations, commits, failures, who is missing, status."""

import hashlib
import json
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from qlora_dist.config.errors import UserError
from qlora_dist.coordinate.client import DirectClient, Fenced, join_and_wait
from qlora_dist.coordinate.heard import Heard, describe
from qlora_dist.coordinate.manifest import list_committed, new_writing_name, read_manifest
from qlora_dist.coordinate.report import read_status
from qlora_dist.coordinate.rundir import check_shared, open_run
from qlora_dist.coordinate.state import Coordinator


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    open_run(tmp_path / "run", "name: test\n")
    return tmp_path / "run"


def coordinator(run_dir: Path, **options: Any) -> Coordinator:
    return Coordinator(run_dir, settle_s=0.2, **options)


def join(coordinator: Coordinator, attempt: str, world_size: int = 1, ranks: list[int] | None = None) -> int | None:
    answer: dict[str, Any] = {}
    for rank in range(world_size) if ranks is None else ranks:
        answer = coordinator.join(attempt, rank, world_size, "a", 100 + rank)
    assert answer["refused"] is None, answer
    return answer["generation"]


def write_folder(run_dir: Path, generation: int, step: int, content: bytes = b"weights") -> tuple[str, dict[str, Any]]:
    name = new_writing_name(generation, step)
    folder = run_dir / "checkpoints" / name
    folder.mkdir()
    (folder / "a.bin").write_bytes(content)
    return name, {"a.bin": {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}}


def commit(coordinator: Coordinator, generation: int, step: int, **metrics: Any) -> dict[str, Any]:
    name, files = write_folder(coordinator.run_dir, generation, step)
    return coordinator.commit(generation, step, name, files, metrics)


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


# Generations


def test_a_group_becomes_a_generation_when_all_ranks_have_joined(run_dir: Path) -> None:
    c = coordinator(run_dir)
    assert join(c, "one", 3, [0, 2]) is None
    assert c.status()["state"] == "starting"
    assert c.status()["joined"] == [0, 2]
    assert join(c, "one", 3, [1]) == 1
    assert join(c, "one", 3, [0, 1, 2]) == 1  # asking again
    assert c.status()["state"] == "running"
    assert join(c, "two") == 2


def test_a_group_that_began_to_join_before_another_was_complete_is_dead(run_dir: Path) -> None:
    c = coordinator(run_dir)
    join(c, "zombie", 2, [0])
    assert join(c, "living", 2) == 1
    answer = c.join("zombie", 1, 2, "a", 101)
    assert answer["generation"] is None
    assert "generation 1 started" in answer["refused"]
    assert c.status()["generation"] == 1


def test_a_coordinator_that_was_away_does_not_complete_a_group_that_died_meanwhile(run_dir: Path) -> None:
    away, other = coordinator(run_dir), coordinator(run_dir)
    join(away, "zombie", 2, [0])
    assert join(other, "living", 2) == 1
    assert away.join("zombie", 1, 2, "a", 101)["refused"] is not None
    assert other.heartbeat(1, 0, 1, "compute")["current"]


def test_a_replaced_group_and_a_second_process_of_a_rank_are_refused(run_dir: Path) -> None:
    c = coordinator(run_dir)
    join(c, "one")
    join(c, "two")
    assert "has taken its place" in c.join("one", 0, 1, "a", 100)["refused"]
    assert "without this process" in c.join("two", 0, 1, "a", 999)["refused"]
    join(c, "three", 2, [0])
    assert "is pid 100" in c.join("three", 0, 2, "a", 999)["refused"]
    assert "do not agree" in c.join("three", 1, 3, "a", 101)["refused"]


def test_the_generation_survives_the_coordinator_and_even_the_log(run_dir: Path) -> None:
    join(coordinator(run_dir), "one")
    assert commit(coordinator(run_dir), 1, 5)["committed"]
    assert join(coordinator(run_dir), "two") == 2
    (run_dir / "events.jsonl").unlink()
    c = coordinator(run_dir)
    assert c.status()["last_checkpoint"]["step"] == 5
    assert c.start_job() == {"started_generation": 1}
    assert c.outcome()["started_generation"] == 1
    assert join(c, "three") == 2


def test_joining_from_many_threads_gives_one_generation_each(run_dir: Path) -> None:
    c, found = coordinator(run_dir), []

    def work(rank: int) -> None:
        found.append(join_and_wait(DirectClient(c), "one", rank, 6, "a", 100 + rank, 20.0))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [1] * 6


def test_waiting_for_a_group_says_who_is_there(run_dir: Path) -> None:
    client = DirectClient(coordinator(run_dir))
    with pytest.raises(TimeoutError, match="only ranks 1 of 2"):
        join_and_wait(client, "one", 1, 2, "a", 101, timeout_s=0.2)
    join_and_wait(client, "two", 0, 1, "a", 100, timeout_s=0.2)
    with pytest.raises(Fenced):
        join_and_wait(client, "one", 0, 2, "a", 100, timeout_s=0.2)


# Commits


def test_a_commit_renames_the_folder_and_writes_the_manifest(run_dir: Path) -> None:
    c = coordinator(run_dir)
    join(c, "one")
    assert commit(c, 1, 7, eval_loss=1.5)["folder"] == "step-00000007-g0001"
    manifest = read_manifest(run_dir / "checkpoints" / "step-00000007-g0001")
    assert (manifest["generation"], manifest["step"], manifest["metrics"]) == (1, 7, {"eval_loss": 1.5})
    assert names(run_dir) == ["step-00000007-g0001"]
    assert c.status()["last_checkpoint"]["metrics"] == {"eval_loss": 1.5}


def test_an_older_generation_commits_nothing(run_dir: Path) -> None:
    old, new = coordinator(run_dir), coordinator(run_dir)
    join(old, "one")
    name, files = write_folder(run_dir, 1, 9)
    join(new, "two")
    assert commit(new, 2, 5)["committed"]
    before = names(run_dir)
    answer = old.commit(1, 9, name, files, {})
    assert (answer["committed"], answer["fenced"]) == (False, True)
    assert names(run_dir) == before == ["step-00000005-g0002"]  # its half-written folder was swept too
    assert not old.heartbeat(1, 0, 9, "compute")["current"]


def test_missing_short_or_foreign_files_are_not_committed(run_dir: Path) -> None:
    c = coordinator(run_dir)
    join(c, "one")
    name, files = write_folder(run_dir, 1, 3)
    missing = {**files, "b.bin": {"bytes": 1, "sha256": "0" * 64}}
    assert "b.bin is missing" in c.commit(1, 3, name, missing, {})["reason"]
    short = {"a.bin": {**files["a.bin"], "bytes": 99}}
    assert "instead of 99" in c.commit(1, 3, name, short, {})["reason"]
    for bad in ("../a.bin", ".hidden", "manifest.json", ""):
        with pytest.raises(ValueError, match="no name"):
            c.commit(1, 3, name, {bad: files["a.bin"]}, {})
    for folder in ("step-00000003-g0001", "../x", name + "/..", new_writing_name(1, 4)):
        with pytest.raises(ValueError, match="is not a folder"):
            c.commit(1, 3, folder, files, {})
    assert list_committed(run_dir) == []
    assert c.commit(1, 3, name, files, {})["committed"]


def test_committing_twice_keeps_the_first_files_and_adds_metrics(run_dir: Path) -> None:
    c = coordinator(run_dir)
    join(c, "one")
    name, files = write_folder(run_dir, 1, 3)
    assert c.commit(1, 3, name, files, {"loss": 1.0})["committed"]
    assert c.commit(1, 3, name, files, {"loss": 1.0})["committed"]  # the answer got lost and it asks again
    assert commit(c, 1, 3, eval_loss=0.5)["committed"]
    manifest = read_manifest(run_dir / "checkpoints" / "step-00000003-g0001")
    assert manifest["metrics"] == {"loss": 1.0, "eval_loss": 0.5}
    assert names(run_dir) == ["step-00000003-g0001"]


def test_retention_keeps_the_last_and_the_best(run_dir: Path) -> None:
    c = coordinator(run_dir, keep_last=2, keep_best=1)
    join(c, "one")
    for step, loss in [(1, 3.0), (2, 1.0), (3, float("nan")), (4, 2.0), (5, None)]:
        commit(c, 1, step, eval_loss=loss)
    assert [path.name for path in list_committed(run_dir)] == [f"step-0000000{n}-g0001" for n in (5, 4, 2)]
    assert set(c._decisions.run.committed) == {path.name for path in list_committed(run_dir)}


def test_retention_never_removes_the_only_good_one(run_dir: Path) -> None:
    c = coordinator(run_dir, keep_last=1, keep_best=0)
    join(c, "one")
    commit(c, 1, 1)
    name, files = write_folder(run_dir, 1, 2)
    wrong = {"a.bin": {**files["a.bin"], "sha256": "0" * 64}}  # the disk holds something else than was hashed
    assert c.commit(1, 2, name, wrong, {})["committed"]
    assert [path.name for path in list_committed(run_dir)] == ["step-00000002-g0001", "step-00000001-g0001"]
    commit(c, 1, 3)
    assert [path.name for path in list_committed(run_dir)] == ["step-00000003-g0001"]


def test_a_damaged_one_does_not_count_among_the_last(run_dir: Path) -> None:
    c = coordinator(run_dir, keep_last=2, keep_best=0)
    join(c, "one")
    commit(c, 1, 1)
    commit(c, 1, 2)
    (run_dir / "checkpoints" / "step-00000002-g0001" / "manifest.json").unlink()
    commit(c, 1, 3)
    assert [path.name[:13] for path in list_committed(run_dir)] == ["step-00000003", "step-00000002", "step-00000001"]
    commit(c, 1, 4)
    assert [path.name[:13] for path in list_committed(run_dir)] == ["step-00000004", "step-00000003"]


def test_a_commit_without_its_event_and_a_removed_folder_are_found(run_dir: Path) -> None:
    c = coordinator(run_dir)
    join(c, "one")
    commit(c, 1, 1)
    commit(c, 1, 2)
    lines = (run_dir / "events.jsonl").read_text().splitlines(keepends=True)
    (run_dir / "events.jsonl").write_text("".join(lines[:-1]))
    assert coordinator(run_dir).status()["last_checkpoint"]["step"] == 2
    shutil.rmtree(run_dir / "checkpoints" / "step-00000002-g0001")
    assert coordinator(run_dir).status()["last_checkpoint"]["step"] == 1


# Failures


def test_a_user_error_decides_the_outcome_and_nothing_restarts(run_dir: Path) -> None:
    c = coordinator(run_dir)
    join(c, "one", 2)
    c.fail(1, 1, "error", "collective failed", 3)
    c.fail(1, 0, "user", "data.train: no such file", 3)
    outcome = coordinator(run_dir).outcome()
    assert (outcome["state"], outcome["exit_code"], outcome["message"]) == ("failed", 2, "data.train: no such file")
    assert c.should_restart("worker died", 3) == {"restart": False, "reason": "data.train: no such file"}
    assert c.outcome()["exit_code"] == 2


def test_a_failure_before_the_generation_counts_and_one_of_a_dead_group_does_not(run_dir: Path) -> None:
    c = coordinator(run_dir)
    join(c, "zombie", 2, [0])
    join(c, "one")
    assert c.fail(None, 0, "user", "late", attempt="zombie") == {"recorded": False}
    assert c.fail(7, 0, "user", "of no generation") == {"recorded": False}
    assert c.outcome()["exit_code"] is None
    join(c, "two", 2, [0])
    assert c.fail(None, 0, "user", "adapter.r is too big", attempt="two") == {"recorded": True}
    assert c.outcome()["exit_code"] == 2


def test_the_same_failure_twice_at_the_same_step_stops_the_run(run_dir: Path) -> None:
    c = coordinator(run_dir)
    c.start_job()
    join(c, "one")
    assert c.should_restart("rank 1 (pid 77) died at 0x7f00", 31)["restart"]
    assert c.status()["state"] == "starting"
    join(c, "two")
    assert c.should_restart("rank 1 (pid 99) died at 0x7fab", 40)["restart"]
    join(c, "three")
    assert c.should_restart("CUDA out of memory", 40)["restart"]
    join(c, "four")
    answer = coordinator(run_dir).should_restart("rank 1 (pid 3) died at 0x1", 40)
    assert not answer["restart"]
    assert "twice at step 40" in answer["reason"]
    assert c.outcome()["exit_code"] == 1
    assert "twice" in c.outcome()["message"]
    c.start_job()  # the person tries again
    assert c.should_restart("rank 1 (pid 3) died at 0x1", 40)["restart"]


def test_the_step_of_a_killed_worker_is_what_was_last_heard(run_dir: Path) -> None:
    c = coordinator(run_dir)
    join(c, "one")
    c.heartbeat(1, 0, 12, "compute")
    assert c.should_restart("worker died")["restart"]
    join(c, "two")
    c.heartbeat(2, 0, 12, "compute")
    assert not c.should_restart("worker died")["restart"]
    assert c.should_restart("something else", 50, max_restarts=1)["reason"].startswith("the run was restarted 1 times")


def test_what_was_committed_in_between_is_progress(run_dir: Path) -> None:
    """Heartbeats come once a second, so that a worker killed a few fast steps later seems to be where it began."""
    c = coordinator(run_dir)
    join(c, "one")
    c.heartbeat(1, 0, 0, "compute")
    commit(c, 1, 5)
    assert c.should_restart("worker died")["restart"]
    join(c, "two")
    c.heartbeat(2, 0, 0, "compute")
    commit(c, 2, 10)
    assert c.should_restart("worker died")["restart"]
    join(c, "three")
    c.heartbeat(3, 0, 0, "compute")
    assert not c.should_restart("worker died")["restart"]


def test_finish_stop_and_going_on(run_dir: Path) -> None:
    c = coordinator(run_dir)
    join(c, "one")
    assert not c.heartbeat(1, 0, 1, "compute")["stop"]
    assert c.finish(1, 10, {"loss": 1.0}) == {"recorded": True}
    assert c.outcome()["state"] == "finished"
    assert (c.outcome()["exit_code"], c.outcome()["summary"]) == (0, {"loss": 1.0})
    join(c, "two")
    assert c.status()["state"] == "running"
    c.request_stop("a planned resize")
    assert c.heartbeat(2, 0, 11, "compute")["stop"]
    c.finish(2, 11, {})
    assert (c.outcome()["state"], c.outcome()["message"]) == ("stopped", "a planned resize")
    join(c, "three")
    c.request_stop("too late")
    c.finish(3, 12, {"complete": True})
    assert (c.outcome()["state"], c.outcome()["message"], c.outcome()["exit_code"]) == ("finished", None, 0)
    assert c.finish(1, 99, {}) == {"recorded": False}


# Who is missing


def heard(ages: dict[int, float], phases: dict[int, str], steps: dict[int, int]) -> Heard:
    members = [{"rank": rank, "host": "a", "pid": 70 + rank} for rank in ages]
    state = Heard(1, members, since=0.0)
    for rank, age in ages.items():
        state.take(rank, 100.0 - age, {"step": steps[rank], "phase": phases[rank], "seconds_in_phase": 1.0})
    return state


def test_a_silent_rank_is_named_before_a_late_one() -> None:
    state = heard({0: 0.5, 1: 12.0, 2: 0.5}, {0: "collective", 1: "collective", 2: "compute"}, {0: 32, 1: 31, 2: 31})
    missing = state.missing(100.0, timeout_s=13.0)
    assert [entry["rank"] for entry in missing] == [1]
    assert describe(missing) == "rank 1 (host a, pid 71) has not been heard of for 12 s, its last step was 31"


def test_a_late_rank_is_named_where_all_are_heard_of() -> None:
    state = heard({0: 0.5, 1: 0.5}, {0: "collective", 1: "compute"}, {0: 32, 1: 32})
    assert "rank 1 (host a, pid 71) has been in compute" in describe(state.missing(100.0, 10.0))
    state = heard({0: 0.5, 1: 0.5}, {0: "collective", 1: "collective"}, {0: 32, 1: 31})
    assert [entry["rank"] for entry in state.missing(100.0, 10.0)] == [1]
    state = heard({0: 0.5, 1: 0.5}, {0: "collective", 1: "collective"}, {0: 32, 1: 32})
    assert state.missing(100.0, 10.0) == []


def test_a_coordinator_that_was_stopped_blames_nobody(run_dir: Path) -> None:
    state = heard({0: 50.0, 1: 50.0}, {0: "collective", 1: "compute"}, {0: 32, 1: 31})
    assert state.missing(100.0, 10.0) == []
    c = coordinator(run_dir)
    join(c, "one", 2)
    time.sleep(1.6)
    assert "held up" in c.who_is_missing(1, 1.0)["sentence"]
    c.heartbeat(1, 0, 1, "collective")
    assert [entry["rank"] for entry in c.who_is_missing(1, 1.0)["missing"]] == [1]
    assert "is over" in c.who_is_missing(0, 1.0)["sentence"]


# Status and the run folder


def test_status_from_the_coordinator_and_from_the_files(run_dir: Path) -> None:
    c = coordinator(run_dir, status_every_s=0.0)
    join(c, "one", 2)
    for rank in (0, 1):
        c.heartbeat(1, rank, 10, "compute", loss=2.5, max_steps=50, tokens_per_second=100.0, memory_bytes=7)
    time.sleep(0.05)
    c.heartbeat(1, 0, 20, "compute", loss=2.0)
    commit(c, 1, 20)
    for status in (c.status(), read_status(run_dir)):
        assert (status["state"], status["generation"], status["step"]) == ("running", 1, 20)
        assert (status["loss"], status["max_steps"], status["tokens_per_second"]) == (2.0, 50, 200.0)
        assert [entry["memory_bytes"] for entry in status["ranks"]] == [7, 7]
        assert status["last_checkpoint"]["folder"] == "step-00000020-g0001"
        assert status["seconds_left"] > 0
    assert not read_status(run_dir)["silent"]


def test_a_killed_run_is_said_to_be_silent_and_a_broken_status_file_does_no_harm(run_dir: Path) -> None:
    c = coordinator(run_dir)
    join(c, "one")
    c.heartbeat(1, 0, 3, "compute")
    for name in ("events.jsonl", "status.json", "run.json"):  # as if all of it had been written 100 s ago
        text = (run_dir / name).read_text()
        records = [json.loads(line) for line in text.splitlines()] if name == "events.jsonl" else [json.loads(text)]
        for record in records:
            for key in ("time", "created"):
                if key in record:
                    record[key] -= 100
        (run_dir / name).write_text("\n".join(map(json.dumps, records)) + "\n")
    status = read_status(run_dir)
    assert status["silent"]
    assert "has not been heard of for 10" in status["sentence"]
    (run_dir / "status.json").write_text('{"torn')
    assert read_status(run_dir)["generation"] == 1
    with pytest.raises(UserError, match="no run"):
        read_status(run_dir / "checkpoints")


def test_a_coordinator_that_woke_up_does_not_overwrite_the_status(run_dir: Path) -> None:
    old, new = coordinator(run_dir, status_every_s=0.0), coordinator(run_dir, status_every_s=0.0)
    join(old, "one")
    join(new, "two")
    new.heartbeat(2, 0, 5, "compute")
    time.sleep(0.6)  # heartbeats read the log twice a second
    old.heartbeat(1, 0, 99, "compute")
    assert read_status(run_dir)["step"] == 5


def test_the_run_folder_is_opened_once_and_checked_on_every_node(tmp_path: Path) -> None:
    infos: list[Any] = []
    threads = [
        threading.Thread(target=lambda: infos.append(open_run(tmp_path / "new" / "run", "a: 1\n"))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({info.nonce for info in infos}) == 1
    assert len(infos) == 8
    info = open_run(tmp_path / "new" / "run", "a: 2\n")
    assert info == infos[0]
    assert (tmp_path / "new" / "run" / "config.yaml").read_text() == "a: 2\n"
    check_shared(tmp_path / "new" / "run", info.nonce)
    local = open_run(tmp_path / "local", "")
    with pytest.raises(UserError, match=r"output_dir .*local is not shared.*another run's folder"):
        check_shared(tmp_path / "local", info.nonce)
    with pytest.raises(UserError, match=r"output_dir .*absent is not shared.*no run folder"):
        check_shared(tmp_path / "absent", local.nonce, wait_s=0.1)


def test_a_run_folder_that_cannot_be_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file where a folder is needed"):
        open_run(tmp_path / "file", "")
    with pytest.raises(UserError, match="is a file where a folder is needed"):
        open_run(tmp_path / "file" / "run", "")
    open_run(tmp_path / "run", "")
    (tmp_path / "run" / "run.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        open_run(tmp_path / "run", "")
    if os.geteuid() != 0:  # root writes anywhere
        (tmp_path / "sealed").mkdir(mode=0o500)
        with pytest.raises(UserError, match="cannot be written"):
            open_run(tmp_path / "sealed" / "run", "")


def test_notes_cannot_pass_for_decisions(run_dir: Path) -> None:
    c = coordinator(run_dir)
    c.note("resized", workers=3)
    with pytest.raises(ValueError, match="is a decision"):
        c.note("generation", generation=9)
    with pytest.raises(ValueError, match="no message"):
        c.handle("__init__", run_dir="/")
    with pytest.raises(ValueError, match="missing a required argument"):
        c.handle("join", attempt="x")
