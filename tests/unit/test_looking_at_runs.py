"""`stop`, `logs` and `status --watch`: what they do to a run, and what a person reads."""

import io
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from qlora_dist.config.errors import UserError
from qlora_dist.coordinate.replay import DECISIONS, Run
from qlora_dist.coordinate.report import read_status
from qlora_dist.coordinate.rundir import open_run
from qlora_dist.coordinate.stop import ask_to_stop, is_over, until_over
from qlora_dist.track.terminal_log import lines, ranges, show_log
from qlora_dist.track.terminal_status import span, spark, view, watch
from tests.single import small_config, train_here


def console(width: int = 200) -> Console:
    return Console(file=io.StringIO(), width=width)


def text_of(shown: Console) -> str:
    assert isinstance(shown.file, io.StringIO)
    return shown.file.getvalue()


def cluster_status(nodes: int, per_node: int) -> dict[str, Any]:
    """A status as 64 ranks would give it: 17 computes while the rest wait, 40 is silent, 50 is named as a straggler.

    Rank 51 is as long outside collectives as 50, and named by nobody: it has longer sequences.
    """
    ranks = [
        {
            "rank": rank, "host": f"gpu-node-{rank // per_node:02d}.cluster.example", "pid": 20000 + rank, "step": 1240,
            "phase": "collective", "age_s": 0.5, "tokens_per_second": 800.0 + rank % 7, "memory_bytes": 62 << 30,
            "seconds_per_step": 2.5, "busy_s": 1.8 + 0.01 * (rank % 7),
        }
        for rank in range(nodes * per_node)
    ]  # fmt: skip
    if len(ranks) > 40:
        ranks[17] |= {"phase": "compute", "busy_s": 2.4}
        ranks[40] |= {"age_s": 42.0, "step": 1238}
        ranks[50] |= {"busy_s": 2.4}
        ranks[51] |= {"busy_s": 2.4}
    named = [{"rank": 50, "sentence": "rank 50 keeps the others waiting"}] if len(ranks) > 50 else []
    return {
        "run_id": "20261122-061201-3fa9c1", "state": "running", "generation": 2, "time": time.time(), "age_s": 0.4,
        "silent": False, "reason": None, "step": 1240, "max_steps": 5000, "loss": 1.2345, "joined": [],
        "tokens_per_second": sum(rank["tokens_per_second"] for rank in ranks), "seconds_left": 9817.0, "ranks": ranks,
        "last_checkpoint": {
            "folder": "step-00001200-g0002", "step": 1200, "generation": 2, "time": time.time() - 130,
            "metrics": {"eval_loss": 1.3},
        },
        "stragglers": named,
        "restarts": [{"generation": 1, "step": 803, "reason": "rank 12 died of SIGKILL", "planned": False}],
    }  # fmt: skip


def test_a_run_that_is_asked_to_stop_ends_after_a_checkpoint_and_goes_on_from_it(
    tiny_model: Path, tmp_path: Path
) -> None:
    config = small_config(
        tmp_path / "run", tiny_model, train={"max_steps": 100_000}, checkpoint={"save_steps": 100_000}
    )
    outcomes: list[dict[str, Any]] = []
    thread = threading.Thread(target=lambda: outcomes.append(train_here(config)), daemon=True)
    thread.start()
    deadline = time.monotonic() + 60
    while not (config.run_dir / "metrics.jsonl").exists() or not (read_status(config.run_dir)["step"] or 0) > 1:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    before = ask_to_stop(config.run_dir, "enough")
    ask_to_stop(config.run_dir, "twice does no harm")
    assert before["state"] == "running"
    *_, last = until_over(config.run_dir, poll_s=0.1)
    thread.join(30)
    assert (last["state"], last["reason"]) == ("stopped", "enough")
    assert outcomes[0]["exit_code"] == 0
    step = last["last_checkpoint"]["step"]
    assert 1 < step < 100_000

    logged = console()
    show_log(config.run_dir, logged, follow=True)
    assert text_of(logged).count("stop       asked for, a checkpoint first: enough") == 1
    assert text_of(logged).index("attempt 1 on 1 worker(s)") < text_of(logged).index(f"saved      step {step}")
    shown = console(80)
    watch(config.run_dir, shown)
    assert f"step {step:,}, " in text_of(shown)

    again = small_config(tmp_path / "run", tiny_model, train={"max_steps": step + 1})
    train_here(again)
    assert read_status(config.run_dir)["last_checkpoint"]["step"] == step + 1
    with pytest.raises(UserError, match="is finished already") as error:
        ask_to_stop(config.run_dir, "too late")
    assert error.value.code == "run-is-over"


def test_stopping_what_is_no_run_or_was_killed_is_a_sentence(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="there is no run"):
        ask_to_stop(tmp_path, "why not")
    status = cluster_status(1, 2) | {"silent": True, "age_s": 300.0}
    monkeypatch.setattr("qlora_dist.coordinate.stop.read_status", lambda run_dir: status)
    with pytest.raises(UserError, match=r"has not been heard of for 300 s.*step-00001200-g0002"):
        ask_to_stop(tmp_path, "why not")
    assert is_over(status)
    assert not is_over(status | {"state": "starting"}), "a queue may take its time"
    assert not is_over(status | {"state": "failed", "age_s": 1.0}), "it may be started again"


def test_a_run_that_nobody_has_started_yet_has_a_whole_status(tmp_path: Path) -> None:
    open_run(tmp_path, "x: 1\n")
    status = read_status(tmp_path)
    assert (status["state"], status["step"], status["max_steps"], status["ranks"]) == ("starting", None, None, [])


def test_a_stop_asked_for_while_workers_start_again_holds_for_them() -> None:
    run = Run()
    job = {"kind": "job", "time": 1.0, "started_generation": 0}
    first = {"kind": "generation", "time": 2.0, "generation": 1, "attempt": "a", "members": []}
    for event in (
        job,
        first,
        {"kind": "stop", "time": 3.0, "reason": "enough"},
        first | {"generation": 2, "time": 4.0},
    ):
        run.apply(event)
    assert run.stop is not None
    run.apply(job | {"time": 5.0})
    assert run.stop is None, "the next job is not to stop"


@pytest.mark.parametrize("width", [80, 200])
def test_64_ranks_fit_the_terminal_and_those_that_stand_out_are_named(width: int) -> None:
    shown = console(width)
    shown.print(view(cluster_status(8, 8), [3.0, 2.0, 1.0], width))
    rows = text_of(shown).splitlines()
    assert max(map(len, rows)) <= width
    assert len(rows) <= 25, "an ordinary terminal's height"
    for node in range(8):
        (row,) = [row for row in rows if row.startswith(f"gpu-node-{node:02d}  {8 * node}-{8 * node + 7}")]
        assert "…" not in row
        if width == 200:
            assert len(row.split("1 s" if node != 5 else "42 s")[1].split()) == 8, "one speed a rank"
    outstanding = rows[rows.index(next(row for row in rows if row.startswith("ranks that stand out"))) + 2 :]
    assert [row.split()[0] for row in outstanding] == ["17", "40", "50"]
    assert any("2 h 44 min left" in row for row in rows)
    assert any("rank 12 died of SIGKILL" in row for row in rows)


@pytest.mark.parametrize("width", [80, 200])
def test_two_ranks_get_a_line_each(width: int) -> None:
    shown = console(width)
    shown.print(view(cluster_status(1, 2), [], width))
    rows = text_of(shown).splitlines()
    assert max(map(len, rows)) <= width
    assert [row.split()[:2] for row in rows[-2:]] == [["0", "gpu-node-00"], ["1", "gpu-node-00"]]


def test_a_run_of_which_nothing_is_known_yet_can_be_looked_at() -> None:
    status = {
        "run_id": "a", "state": "starting", "generation": None, "time": 0.0, "age_s": 3.0, "silent": False,
        "ranks": [], "joined": [0, 1, 3], "last_checkpoint": None,
    }  # fmt: skip
    shown = console(80)
    shown.print(view(status))
    assert "ranks 0-1, 3 have joined" in text_of(shown)
    assert "nothing yet" in text_of(shown)


def test_every_decision_has_words_and_unknown_events_show_their_fields() -> None:
    example = {
        "time": 1.0, "pid": 7, "host": "n1", "started_generation": 0, "launcher": "ray", "world_size": 2,
        "generation": 1, "attempt": "abc", "members": [{"rank": 0, "host": "n1", "pid": 7}], "step": 5,
        "folder": "step-00000005-g0001", "folders": ["step-00000001-g0001"], "metrics": {"eval_loss": 1.5},
        "rank": 0, "failure": "error", "message": "it broke\nbadly", "restart": True, "reason": "because",
        "workers_before": 2, "workers": 1, "summary": {"adapter": "/runs/a/adapter", "stopped_early": True},
        "packs": 8, "parameters": 9, "island": "0", "lease": 3, "round": 2, "pieces": [[0, 0, 4]], "dropped": [[0, 4]],
        "tokens": 70, "facts": {"metrics": {"loss": 1.5}}, "counted": [{"island": "0"}], "why": "everyone",
        "missed": ["1"], "eval_loss": 1.25, "version": 3,
    }  # fmt: skip
    for kind in sorted(DECISIONS - {"island_told", "leases_ended", "rounds_resumed"}):
        said = list(lines({"kind": kind, **example}))
        assert said, kind
        assert all("\n" not in text and "{" not in text for _, text, _ in said)
    assert list(lines({"kind": "weather", "time": 1.0, "sky": "blue"})) == [("weather", "sky blue", "")]


def test_ranges_spans_and_curves() -> None:
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    assert [span(s) for s in (4.4, 89, 91, 3600, 9817, 200_000)] == [
        "4 s", "89 s", "2 min", "1 h", "2 h 44 min", "2 d 7 h",
    ]  # fmt: skip
    assert spark([3.0, 2.0, 1.0], 10) == "█▅▁"
    assert len(spark([float(i) for i in range(500)], 40)) == 40
    assert spark([1.0, 1.0], 40) == "▁▁"
