"""`qlora-dist runs` and `qlora-dist report`: what they print and write, and what they refuse."""

import io
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from qlora_dist.cli import app
from qlora_dist.config.errors import UserError
from qlora_dist.track.charts import Chart, Line, draw, smooth, thin
from qlora_dist.track.metrics import read_metrics
from qlora_dist.track.report import mean_speed, shorten
from qlora_dist.track.runs import differences, find_runs, flat_config, show_comparison, show_runs, summarise
from tests.single import small_config, train_here


@pytest.fixture(scope="module")
def folder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs that differ in learning rate and steps."""
    folder = tmp_path_factory.mktemp("runs")
    held_out = {"eval": "bundled:home_commands", "max_eval_rows": 2}
    for name, rate, steps in (("slow", 1e-5, 2), ("fast", 1e-2, 4)):
        train_here(
            small_config(folder / name, tiny_model, data=held_out, train={"learning_rate": rate, "max_steps": steps})
        )
    return folder


def printed(show: object, *args: object) -> list[list[str]]:
    out = io.StringIO()
    show(*args, Console(file=out, width=160))  # type: ignore[operator]
    return [line.split() for line in out.getvalue().splitlines()]


def test_runs_are_listed_oldest_first(folder: Path) -> None:
    header, slow, fast = printed(show_runs, folder)
    assert header == ["name", "state", "step", "loss", "eval", "loss", "tokens/s", "started", "duration"]
    assert slow[:3] == ["slow", "finished", "2/2"]
    assert fast[:3] == ["fast", "finished", "4/4"]
    losses = [r["loss"] for r in read_metrics(folder / "fast") if "loss" in r]
    assert fast[3] == f"{losses[-1]:.4f}"


def test_two_runs_are_compared_by_what_differs(folder: Path) -> None:
    rows = {row[0]: row[1:] for row in printed(show_comparison, [folder / "slow", folder / "fast"]) if row}
    assert rows["train.learning_rate"] == ["1e-05", "0.01"]
    assert rows["train.max_steps"] == ["2", "4"]
    assert rows["step"] == ["2", "4"]
    settings = [name for name in rows if "." in name and "/" not in name]
    assert settings == ["train.max_steps", "train.learning_rate"]
    assert differences([{"a": 1, "b": 2}, {"a": 1, "c": 3}]) == {"b": [2, None], "c": [None, 3]}
    assert "output_dir" not in flat_config(folder / "slow")


def test_a_run_is_summed_up(folder: Path) -> None:
    run, records = summarise(folder / "fast"), read_metrics(folder / "fast")
    held_out = [r["eval_loss"] for r in records if "eval_loss" in r]
    assert (run.eval_loss, run.best_eval_loss) == (held_out[-1], min(held_out))
    # 10 tokens in 1 s and 30 in 3 s are 40 in 4 s.
    rows = [{"tokens_per_second": 10.0, "seconds_per_step": s} for s in (1.0, 3.0)]
    assert mean_speed(rows) == pytest.approx(10.0)
    rows[1]["tokens_per_second"] = 2.0
    assert mean_speed(rows) == pytest.approx((10 + 6) / 4)


def test_a_folder_without_runs_is_refused(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(UserError, match="there is no run in"):
        find_runs(tmp_path)
    assert find_runs(folder / "fast") == [folder / "fast"]


def test_report_command_writes_where_it_is_told(folder: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["report", str(folder / "fast"), "-o", str(tmp_path / "mine.html")])
    assert done.exit_code == 0, done.output
    page = (tmp_path / "mine.html").read_text()
    assert page.startswith("<!doctype html>")
    assert "Held-out loss" in page
    with pytest.raises(UserError, match="there is no run in"):
        CliRunner().invoke(app, ["report", str(tmp_path)], catch_exceptions=False)


def test_points_are_thinned_and_smoothed_around_their_place() -> None:
    line = [(float(x), 2.0 * x + 1) for x in range(5000)]
    thinned = thin(line)
    assert len(thinned) <= 601
    assert thinned[-1] == line[-1]
    assert all(y == pytest.approx(2 * x + 1) for x, y in thinned)
    # A straight line stays one up to its ends: no lag.
    assert all(y == pytest.approx(2 * x + 1) for x, y in smooth(line))


def test_a_plot_keeps_clear_of_the_page() -> None:
    svg = draw(Chart("Loss <x>", [Line("a", [(0.0, 1.0), (1.0, 2.0)]), Line("none", [])]))
    assert svg.startswith("<svg")
    assert "var(--series-1)" in svg
    assert "<metadata" not in svg
    assert 'aria-label="Loss &lt;x&gt;"' in svg


def test_a_row_of_saved_checkpoints_is_shortened() -> None:
    rows = [("0", "saved", str(n), "") for n in range(5)]
    assert [row[2] for row in shorten(rows)] == ["0", "3 more", "4"]
    assert shorten(rows[:3]) == rows[:3]
