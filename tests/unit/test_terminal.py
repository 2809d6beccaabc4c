"""What a person sees: one line for each thing that happened, in its order, from the run folder alone."""

import io
import json
import re
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from qlora_dist.track.metrics import MetricsLog, read_metrics
from qlora_dist.track.terminal import Tail, View, data_table, watching
from tests.single import small_config, train_here


def shown(run_dir: Path, act) -> str:
    stream = io.StringIO()
    run_dir.mkdir(exist_ok=True)
    with watching(run_dir, Console(file=stream, width=200)):
        act()
    return stream.getvalue()


def test_a_whole_run_in_plain_lines(tiny_model: Path, tmp_path: Path) -> None:
    config = small_config(
        tmp_path / "run", tiny_model,
        data={"eval": "bundled:home_commands", "max_eval_rows": 4},
        eval={"eval_steps": 3, "sample_prompts": 2, "sample_max_new_tokens": 4},
    )  # fmt: skip
    text = shown(config.run_dir, lambda: train_here(config))
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line.strip()]
    labels = [line[0] for line in lines]
    assert labels[:7] == ["start", "data", "data", "example", "plan", "model", "notice"]
    assert labels.index("done") > max(i for i, label in enumerate(labels) if label in ("train", "eval", "saved"))
    assert labels.count("eval") == 3
    assert labels[-8:] == ["prompt", "expected", "before", "after"] * 2
    assert "step 6/6" in text
    assert "\x1b" not in text, "colours belong on a terminal"


def test_a_terminal_gets_a_progress_bar(tiny_model: Path, tmp_path: Path) -> None:
    config = small_config(tmp_path / "run", tiny_model)
    stream = io.StringIO()
    config.run_dir.mkdir()
    view = View(config.run_dir, Console(file=stream, force_terminal=True, width=120))
    train_here(config)
    view.poll()
    assert view.task is not None
    view.bar.stop()
    assert "6/6" in stream.getvalue()
    # Prompt and template are dim (2), the answer is not.
    assert "rows read" in stream.getvalue()
    assert re.search(r"\x1b\[2m<\|im_start\|>user", stream.getvalue())


def test_the_data_table_tells_how_full_packs_are_and_why_rows_were_left_out() -> None:
    split = {
        "split": "train", "rows": 1200, "documents": 1190, "dropped": {"duplicate": 9, "[x]": 1}, "truncated": 2,
        "tokens": 50000, "loss_tokens": 20000, "longest": 300, "packs": 25, "packing_efficiency": 0.9765,
    }  # fmt: skip
    console = Console(file=io.StringIO(), width=140)
    with console.capture() as shown:
        console.print(data_table([split, split | {"split": "eval", "dropped": {}, "packing_efficiency": None}]))
    lines = [" ".join(line.split()) for line in shown.get().splitlines()]
    assert lines[1] == "train 1,200 1,190 50,000 20,000 300 25 (97.7 % full) 9 duplicate, 1 [x], (2 truncated)"
    assert lines[2] == "eval 1,200 1,190 50,000 20,000 300 25 (2 truncated)"


def test_tail_gives_whole_lines_and_follows_a_replaced_file(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    tail = Tail(path)
    assert tail.records() == []
    path.write_text('{"a": 1}\n{"a":')
    assert tail.records() == [{"a": 1}]
    with path.open("a") as file:
        file.write(" 2}\n")
    assert tail.records() == [{"a": 2}]
    replacement = tmp_path / "y.jsonl"
    replacement.write_text('{"a": 3}\n')
    replacement.replace(path)
    assert tail.records() == [{"a": 3}]


def test_metrics_hold_null_for_what_is_not_finite(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, attempt=1, resume_step=0)
    log.write(1, loss=float("nan"), grad_norm=float("inf"), learning_rate=0.1)
    log.close()
    (record,) = read_metrics(tmp_path)
    assert (record["loss"], record["grad_norm"], record["learning_rate"]) == (None, None, 0.1)


def test_threads_write_whole_records_one_after_another(tmp_path: Path) -> None:
    """Messages of islands are answered in threads of the coordinator's service."""
    at_work: list[int] = []
    together: list[list[int]] = []

    class Sink:
        def write(self, record: Mapping[str, Any]) -> None:
            at_work.append(record["step"])
            time.sleep(0.01)
            together.append([*at_work])
            at_work.remove(record["step"])

        def close(self, adapter: Path | None) -> None:
            """Nothing to do."""

    log = MetricsLog(tmp_path, 1, 0, [Sink()])  # type: ignore[list-item]
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda step: log.write(step, loss=0.5), range(8)))
    assert all(len(steps) == 1 for steps in together)
    assert sorted(record["step"] for record in read_metrics(tmp_path)) == list(range(8))


def test_an_earlier_attempt_that_wakes_up_writes_where_nobody_reads(tmp_path: Path) -> None:
    first = MetricsLog(tmp_path, attempt=1, resume_step=0)
    for step in (1, 2, 3):
        first.write(step, loss=float(step))
    second = MetricsLog(tmp_path, attempt=2, resume_step=2)
    first.write(4, loss=4.0)
    second.write(3, loss=30.0)
    assert [(r["step"], r["loss"], r["attempt"]) for r in read_metrics(tmp_path)] == [(1, 1, 1), (2, 2, 1), (3, 30, 2)]


@pytest.mark.parametrize("torn", ['{"step": 3, "lo', '{"step": 3}'])
def test_a_line_that_a_kill_cut_off_is_left_out(tmp_path: Path, torn: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 2, "loss": 1.0}) + "\n" + torn)
    assert [record["step"] for record in read_metrics(tmp_path)] == [2]
