"""`qlora-dist bench` without a GPU: sweeps, records, ratios, tables, pictures, and a real run of two points."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from qlora_dist.bench.bound import Shape, bounds
from qlora_dist.bench.document import begin, read
from qlora_dist.bench.peers import Peer, unsloth
from qlora_dist.bench.plane import draw_plane
from qlora_dist.bench.side_by_side import (
    Comparison,
    Size,
    at_size,
    chosen_peers,
    our_points,
    our_task,
    parse_sizes,
    peer_task,
    prepare_base,
    with_ratios,
)
from qlora_dist.bench.spots import OURS, Spot, frontier
from qlora_dist.bench.sweep import Point, checked, combined, parse_axis, parse_points, read_points
from qlora_dist.bench.tables import page
from qlora_dist.bench.throughput import NO_TIME, OVER_LIMIT, Task, last_words, measure, outcome, run_tasks
from qlora_dist.bench.watch import watched
from qlora_dist.bench.workload import merged, words_for, write_rows, write_settings
from qlora_dist.config.errors import UserError
from qlora_dist.model.shapes import SHAPES


def test_a_comma_inside_brackets_or_quotes_separates_nothing() -> None:
    assert parse_axis("a.b=1, 2,4") == ("a.b", ["1", "2", "4"])
    assert parse_axis("shard.offload=[optimizer,shards],[]") == ("shard.offload", ["[optimizer,shards]", "[]"])
    assert parse_axis("a.b={x: 1, y: 2},'c,d'") == ("a.b", ["{x: 1, y: 2}", "'c,d'"])


@pytest.mark.parametrize(
    ("axes", "code"),
    [
        (["train.max_steps"], "bench-axis-form"),
        (["=1"], "bench-axis-form"),
        (["a..b=1"], "bench-axis-form"),
        (["a.b=1,,2"], "bench-axis-form"),
        (["a.b="], "bench-axis-form"),
        (["a.b=1,1"], "bench-axis-repeats"),
        (["a.b=1", "a.b=2"], "bench-axis-twice"),
    ],
)
def test_a_bad_axis_is_refused(axes: list[str], code: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_points(axes)
    assert caught.value.code == code


def test_points_are_all_combinations_named_after_what_varies() -> None:
    points = parse_points(["adapter.r=16", "train.activations=keep,recompute", "train.per_device_train_batch_size=1,8"])
    assert [point.name for point in points] == [
        "kept, batch 1", "kept, batch 8", "recomputed, batch 1", "recomputed, batch 8",
    ]  # fmt: skip
    assert points[1].overrides == [
        "adapter.r=16", "train.activations=keep", "train.per_device_train_batch_size=8",
    ]  # fmt: skip
    assert [point.name for point in parse_points([])] == ["defaults"]


def test_points_of_a_file_with_an_axis(tmp_path: Path) -> None:
    file = tmp_path / "points.json"
    file.write_text(json.dumps([{"name": "one", "overrides": ["a.b=SCRATCH/x"], "environment": {"N": "4"}}]))
    (one,) = read_points(file, tmp_path)
    assert one == Point("one", [f"a.b={tmp_path}/x"], {"N": "4"})
    assert [point.name for point in combined([one], parse_points(["c.d=1,2"]))] == ["one, d 1", "one, d 2"]
    assert combined([one], parse_points(["c.d=1"])) == [Point("one", [f"a.b={tmp_path}/x", "c.d=1"], {"N": "4"})]
    for damaged in ("", "{}", '[{"name": "x"}]', '[{"name": "x", "overrides": []}, {"name": "x", "overrides": []}]'):
        file.write_text(damaged or "[")
        if damaged == "{}":
            continue
        with pytest.raises(UserError, match="is no list of points"):
            read_points(file, tmp_path)


def test_all_points_are_checked_before_the_first_runs(tmp_path: Path) -> None:
    settings = tmp_path / "settings.yaml"
    assert write_settings(settings, "synthetic:llama-tiny", tmp_path / "rows", 9) == "synthetic:llama-tiny"
    (config,) = checked(settings, parse_points(["train.per_device_train_batch_size=4"]))
    assert (config.global_batch_size, config.train.max_steps, config.adapter.r) == (4, 9, 16)
    with pytest.raises(UserError, match=r"did you mean train\.optim"):
        checked(settings, parse_points(["train.optin=sgd,adamw_8bit"]))


def test_settings_of_a_file_go_over_the_benchmarks_own(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("model: {name: 'synthetic:qwen3-tiny'}\ntrain: {optim: sgd}\n")
    settings = tmp_path / "settings.yaml"
    assert write_settings(settings, None, tmp_path / "rows", 9, tmp_path / "own.yaml") == "synthetic:qwen3-tiny"
    (config,) = checked(settings, parse_points([]))
    assert (config.train.optim, config.train.max_steps, config.data.assistant_only_loss) == ("sgd", 9, False)
    assert merged({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}, "d": 4}) == {"a": {"b": 3, "c": 2}, "d": 4}


def test_rows_are_longer_than_asked(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows", rows=30, words=words_for(100))
    rows = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert len(rows) == 30
    assert all(len(row["completion"]) >= 100 for row in rows)


def test_how_a_command_ended_is_told_from_its_code_and_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("rank 0 ran out of memory on cuda:0 (...)")
    assert outcome(2, False, log) == "out of memory"
    assert outcome(0, False, log) == "ok"
    assert outcome(-15, True, log) == OVER_LIMIT
    log.write_text("Traceback\n  x\nValueError: no\nsome last line\n")
    assert outcome(1, False, log) == "failed"
    assert last_words(log.read_text()) == "ValueError: no"


def test_a_command_over_its_limit_leaves_nothing_running(tmp_path: Path) -> None:
    """A child that ignores SIGTERM, of a parent that does not: both are gone, and within the limit and a little."""
    ignore, told = "signal.signal(signal.SIGTERM, signal.SIG_IGN)", tmp_path / "pid"
    child = f"import os, signal, time; {ignore}; open({str(told)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    started = time.monotonic()
    ended = watched([sys.executable, "-c", parent], tmp_path / "log", 3.0)
    assert ended.over_limit
    assert time.monotonic() - started < 12
    assert ended.host_peak_gib > 0.001
    deadline = time.monotonic() + 5
    while runs(int(told.read_text())) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not runs(int(told.read_text()))


def runs(pid: int) -> bool:
    """Whether the process is there and no zombie, which waits for nothing but its parent."""
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_tasks_stop_when_the_time_is_up_and_go_on_when_resumed(tmp_path: Path) -> None:
    out, asked = tmp_path / "out.json", []

    def task(name: str, result: str = "ok") -> Task:
        def run(seconds: float) -> dict[str, Any]:
            asked.append((name, seconds))
            return {"outcome": result}

        return Task(name, {"overrides": [name]}, run)

    document = begin(out, False, what="throughput", title="t")
    run_tasks([task("a"), task("b", OVER_LIMIT)], document, out, 100.0, 50.0, lambda record: None)
    run_tasks([task("c")], document, out, 100.0, 10.0, lambda record: None)
    assert [name for name, _ in asked] == ["a", "b"]
    assert all(seconds <= 50 for _, seconds in asked)
    assert [record["outcome"] for record in read(out)["records"]] == ["ok", NO_TIME]
    again = begin(out, True, what="throughput", title="t")
    run_tasks([task("a"), task("b"), task("c")], again, out, 100.0, 500.0, lambda record: None)
    assert [name for name, _ in asked[2:]] == ["b", "c"]
    assert [record["name"] for record in read(out)["records"]] == ["a", "b", "c"]
    out.write_text(out.read_text().replace('"torch": "', '"torch": "0'))
    with pytest.raises(UserError, match="other hardware or versions"):
        begin(out, True, what="throughput", title="t")
    out.write_text("[]")
    with pytest.raises(UserError, match="is no result of"):
        read(out)


def test_the_bound_is_that_of_the_measured_rates() -> None:
    """710 TFLOP/s in GEMMs, 507 and 367 in attention: 21,300 tokens/s at the 8B shape, by hand."""
    shape, tokens = Shape.from_config(SHAPES["llama-3.1-8b"]), 8 * 2048
    linear = sum(inputs * outputs for inputs, outputs in shape.linear().values())
    assert shape.layers * linear == pytest.approx(6.98e9, rel=1e-3)
    gemms = {
        name: dict.fromkeys(("forward_ms", "backward_ms"), 2 * tokens * inputs * outputs / 710e9)
        for name, (inputs, outputs) in {**shape.linear(), "head": (shape.hidden, shape.vocabulary)}.items()
    }
    attention = 4 * 8 * 32 * 2048 * 2048 * 128 / 2
    got = bounds(shape, tokens, gemms, {"forward_ms": attention / 507e9, "backward_ms": 2.5 * attention / 367e9})
    seconds = 4 * (6.98e9 + 4096 * 128256) / 710e12 + 32 * attention * (1 / 507e12 + 2.5 / 367e12) / tokens
    assert got["kept"] == pytest.approx(1 / seconds, rel=1e-3)
    again = 2 * (6.98e9 - 32 * 14336 * 4096) / 710e12 + 32 * attention / 507e12 / tokens
    assert got["recomputed"] == pytest.approx(1 / (seconds + again), rel=1e-3)


def record(name: str, size: tuple[int, int], tokens: float, gib: float, peer: str | None = "p") -> dict[str, Any]:
    return {
        "name": name, "title": name, "series": OURS if peer is None else name, "label": f"{size[0]} x {size[1]}",
        "peer": peer, "size": {"batch": size[0], "length": size[1]}, "outcome": "ok", "workers": 1, "steps": 20,
        "tokens_per_second": tokens, "loss_tokens_per_second": tokens, "seconds_per_step": 1.0,
        "peak_allocated_gib": gib, "peak_reserved_gib": gib, "gpu_total_gib": gib, "host_peak_gib": 1.0,
        "losses": [12.7], "note": "",
    }  # fmt: skip


RECORDS = [
    record("ours", (8, 2048), 17_000, 50.0, None),
    record("ours", (4, 2048), 12_000, 8.0, None),
    record("ours", (2, 8192), 99_000, 8.0, None),
    record("theirs", (4, 2048), 10_000, 9.0),
    record("theirs", (8, 2048), 15_000, 60.0),
    record("theirs", (1, 2048), 5_000, 6.0),
    record("others", (8, 2048), 1.0, 80.0) | {"outcome": "not installed", "why": "others"},
]


def test_ratios_compare_at_one_size_and_at_no_more_memory() -> None:
    """By hand; the point of another sequence length counts nowhere."""
    told = with_ratios(RECORDS, {"8x2048": {"bound": {"kept": 20_000}}})
    assert [one["ours_same_size"] for one in told] == [None, None, None, 1.2, 17 / 15, None, None]
    assert [one["ours_no_more_memory"] for one in told] == [None, None, None, 1.2, 17 / 15, None, None]
    assert [one["of_bound"] for one in told] == [0.85, None, None, None, 0.75, None, None]
    lean = with_ratios([RECORDS[0], RECORDS[3]], {})
    assert (lean[1]["ours_same_size"], lean[1]["ours_no_more_memory"]) == (None, None)


def test_pages_hold_every_record() -> None:
    document = {"what": "peers", "title": "t", "device": "H", "gpus": 1, "versions": {"torch": "2"}, "records": RECORDS}
    rates = {"forward_ms": 1.0, "backward_ms": 1.0, "forward_tflop_s": 700.0, "backward_tflop_s": 690.0}
    size = {"gemms": {"qkv": rates}, "attention": {"cudnn": rates}, "bound": {"kept": 20_000.0, "recomputed": 15_000.0}}
    text = page(document | {"rates": {"copy_gb_s": 3000.0, "8x2048": size}})
    assert "| theirs | 8 x 2048 | 15,000 | 1.13 | 1.13 | 75% |" in text
    assert "| others | 8 x 2048 | not installed: others | - |" in text
    assert "- 8x2048: 20,000 tokens/s" in text
    assert "The rates were not measured: no" in page(document | {"rates": {"why": "no"}})
    sweep = document | {"what": "throughput", "records": [RECORDS[0], {"name": "b", "outcome": "out of memory"}]}
    assert "| b | out of memory | - | - |" in page(sweep)
    timed = {"name": "k", "shape": "1 x 2", "outcome": "ok", "ms": 0.1, "gb_s": 2900.0, "of_ceiling": 0.95}
    timed["peers"] = {"Liger": 0.2}
    failed = {"name": "l", "shape": "1", "outcome": "failed", "why": "E: x"}
    kernels = document | {
        "what": "kernels",
        "copy_gb_s": 3000.0,
        "records": [timed | {"peers": {"Liger": 0.2}}, failed],
    }
    assert "| k | 1 x 2 | 0.100 | 2,900 | - | 95% | - | Liger 0.200 |" in page(kernels)
    assert "| l | 1 | failed: E: x |" in page(kernels)


def test_our_line_goes_through_what_nothing_of_ours_beats() -> None:
    spots = [Spot(OURS, "", gib, speed) for gib, speed in ((5, 10), (8, 9), (8, 12), (12, 12), (50, 17))]
    assert [(spot.gib, spot.tokens_per_second) for spot in frontier(spots)] == [(5, 10), (8, 12), (50, 17)]


def test_labels_of_a_crowded_picture_do_not_overlap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes
    from matplotlib.text import Text

    texts: list[Text] = []
    place = Axes.text

    def kept(self: Axes, *arguments: Any, **named: Any) -> Text:
        texts.append(place(self, *arguments, **named))
        return texts[-1]

    monkeypatch.setattr(Axes, "text", kept)
    spots = [Spot(OURS, f"{n} x 2048", 5.0 + 6 * n, 9000.0 + 900 * n) for n in range(1, 8)]
    spots += [Spot(f"peer {n}", f"{n} x 2048", 40 + n / 2, 13_000 + 70 * n) for n in range(8)]
    draw_plane(tmp_path / "plane.png", spots, "title", "GiB", "tokens/s", [("bound", 21_000.0)])
    assert (tmp_path / "plane.png").read_bytes().startswith(b"\x89PNG")
    boxes = [text.get_window_extent() for text in texts]
    assert len(boxes) == len(spots)
    assert not [
        (a, b) for n, a in enumerate(boxes) for b in boxes[:n] if a.shrunk(0.98, 0.7).overlaps(b.shrunk(0.98, 0.7))
    ]


def test_sizes_peers_and_ways_are_read_as_people_write_them() -> None:
    assert parse_sizes("8x2048, 2x8192") == [Size(8, 2048), Size(2, 8192)]
    for wrong in ("8", "8x", "0x2048", "8x2048;1x2048"):
        with pytest.raises(UserError, match="--size"):
            parse_sizes(wrong)
    assert list(chosen_peers(["peft", "liger"])) == ["peft", "liger"]
    with pytest.raises(UserError, match="--peer pfet is not among the peers"):
        chosen_peers(["pfet"])
    ways = our_points(["train.gradient_checkpointing=true train.memory_budget_gib=8", ""])
    assert [way.name for way in ways] == ["checkpointing, GiB budget 8", "defaults"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["throughput", "--model", "llama-tini"], "there is no synthetic:llama-tini"),
        (["throughput", "--out", "x.csv"], "--out x.csv does not end in .json"),
        (["throughput", "--model", "llama-tiny", "--set", "train.max_steps=2"], "first 5 steps are not measured"),
    ],
)
def test_a_mistake_is_one_sentence(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:  # fmt: skip
    from qlora_dist import cli

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["qlora-dist", "bench", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert sentence in capsys.readouterr().err


def test_a_point_is_a_real_run(tmp_path: Path) -> None:
    settings, rows = tmp_path / "settings.yaml", tmp_path / "rows.jsonl"
    write_settings(settings, "synthetic:llama-tiny", rows, 4)
    write_rows(rows, rows=16, words=words_for(64))
    point = Point("one", ["data.max_length=64", "train.per_device_train_batch_size=2"])
    good = measure(point, settings, tmp_path, 1, 120.0)
    assert good["outcome"] == "ok", good["log_tail"]
    assert (good["steps"], good["workers"], len(good["losses"])) == (3, 1, 4)
    assert good["loss_tokens_per_second"] == pytest.approx(good["tokens_per_second"] * 63 / 64)
    assert good["tokens_per_second"] * good["seconds_per_step"] == pytest.approx(128, rel=0.2)
    assert good["host_peak_gib"] > 0.05
    assert good["peak_allocated_gib"] is None


@pytest.mark.slow
def test_a_sweep_on_a_cpu(tmp_path: Path) -> None:
    """A point that trains and one that cannot: the second is a row, and the command goes on and succeeds."""
    out = tmp_path / "sweep.json"
    command = [
        sys.executable, "-m", "qlora_dist.cli", "bench", "throughput", "--model", "llama-tiny", "--steps", "3",
        "--warm-up", "1", "--out", str(out), "--set", "data.max_length=64", "--set",
        "model.cache_quantized=null,/dev/null",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    good, bad = read(out)["records"]
    assert (good["outcome"], bad["outcome"]) == ("ok", "failed")
    assert "/dev/null" in bad["why"]
    assert "| cache_quantized null |" in out.with_suffix(".md").read_text()
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_peer_trains_on_our_batches_and_weights(tmp_path: Path) -> None:
    """PEFT in a process of its own: our losses, step by step, from the same NF4 folder and the batches drawn for it.

    Ours computes in fp32 on a CPU and PEFT under bf16 autocast, and their adapters start from other random numbers.
    """
    settings, rows = tmp_path / "settings.yaml", tmp_path / "rows.jsonl"
    write_settings(settings, "synthetic:llama-tiny", rows, 3)
    write_rows(rows, rows=16, words=words_for(64))
    (config,) = checked(settings, parse_points([]))
    shared = Comparison(settings, config, tmp_path / "nf4", tmp_path, 1, 2, "cpu")
    size = Size(2, 64)
    prepare_base(shared)
    ours = our_task(shared, at_size(our_points([""])[0], size), size).run(120.0)
    theirs = peer_task(shared, "peft", chosen_peers(["peft"])["peft"], size).run(120.0)
    assert (ours["outcome"], theirs["outcome"]) == ("ok", "ok"), (ours, theirs)
    assert theirs["losses"] == pytest.approx(ours["losses"], abs=2e-3)
    assert theirs["losses"][0] != theirs["losses"][1]
    missing = peer_task(shared, "x", Peer("X", ("no_such_package",), unsloth), size).run(120.0)
    assert missing == {"outcome": "not installed", "why": "no_such_package"}
