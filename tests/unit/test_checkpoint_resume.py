"""Which checkpoint a run goes on from."""

from pathlib import Path

import pytest

from qlora_dist.checkpoint.format import Snapshot, write_snapshot
from qlora_dist.checkpoint.manifest import latest_good, list_checkpoints, resolve_resume, verify
from qlora_dist.config.errors import UserError
from qlora_dist.coordinate.manifest import committed_name, write_manifest
from qlora_dist.coordinate.rundir import open_run


def put(run_dir: Path, generation: int, step: int) -> Path:
    if not run_dir.exists():
        open_run(run_dir, "")
    folder = run_dir / "checkpoints" / committed_name(generation, step)
    folder.mkdir()
    files = write_snapshot(Snapshot(step=step, adapter={}, adapter_config={}), folder)
    write_manifest(folder, "run", generation, step, 0.0, files, {})
    return folder


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(bytes(data))


def never(sentence: str) -> None:
    raise AssertionError(sentence)


def test_newest_is_by_generation_then_step(tmp_path: Path) -> None:
    run = tmp_path / "run"
    put(run, 1, 80)
    newest = put(run, 2, 70)
    put(run, 2, 60)
    (run / "checkpoints" / ".writing-g0003-00000090-ab").mkdir()
    assert latest_good(run, never) == newest
    assert [(c.generation, c.step) for c in list_checkpoints(run)] == [(2, 70), (2, 60), (1, 80)]


def test_damaged_ones_are_passed_over_with_what_is_wrong(tmp_path: Path) -> None:
    run = tmp_path / "run"
    good = put(run, 1, 10)
    flip(put(run, 1, 20) / "adapter_model.safetensors")
    short = put(run, 1, 30) / "state.json"
    short.write_bytes(short.read_bytes()[:-1])
    (put(run, 1, 40) / "config.yaml").unlink()
    (put(run, 1, 50) / "manifest.json").unlink()
    flip(put(run, 1, 60) / "manifest.json")
    put(run, 2, 1).rename(run / "checkpoints" / committed_name(1, 70))
    warnings: list[str] = []
    assert latest_good(run, warnings.append) == good
    assert [w.split("checkpoints/")[1] for w in warnings[:1] + warnings[2:]] == [
        "step-00000070-g0001 is damaged and passed over: manifest.json is that of step-00000001-g0002",
        "step-00000050-g0001 is damaged and passed over: manifest.json is missing",
        "step-00000040-g0001 is damaged and passed over: config.yaml is missing",
        f"step-00000030-g0001 is damaged and passed over: state.json has {short.stat().st_size} bytes instead of "
        f"{short.stat().st_size + 1}",
        "step-00000020-g0001 is damaged and passed over: adapter_model.safetensors has been altered: its checksum "
        "differs",
    ]
    assert "step-00000060-g0001 is damaged and passed over: manifest.json" in warnings[1]
    assert verify(good) == []


def test_none_refuses_an_earlier_jobs_folder_but_restarts_go_on(tmp_path: Path) -> None:
    run = tmp_path / "run"
    open_run(run, "")
    assert resolve_resume(run, "none", 0, never) is None
    own = put(run, 1, 10)
    assert resolve_resume(run, "none", 0, never) == own
    with pytest.raises(UserError, match=r"resume: none, but .*choose another output_dir, or resume=auto"):
        resolve_resume(run, "none", 1, never)
    assert resolve_resume(run, "auto", 1, never) == own


def test_a_path_is_where_a_run_begins(tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    start = put(other, 5, 100)
    newest = put(other, 5, 200)
    open_run(run, "")
    assert resolve_resume(run, str(start), 0, never) == start
    assert resolve_resume(run, str(other), 0, never) == newest
    own = put(run, 1, 110)
    assert resolve_resume(run, str(start), 0, never) == own, "a restart within the job"


def test_the_same_command_after_a_requeue_goes_on_from_the_runs_own_and_says_so(tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    start, own = put(other, 5, 100), put(run, 1, 300)
    warnings: list[str] = []
    assert resolve_resume(run, str(start), 1, warnings.append) == own
    assert len(warnings) == 1
    assert "is where this run began; it goes on from its own step-00000300-g0001" in warnings[0]


def test_a_path_within_the_run_goes_back_to_it(tmp_path: Path) -> None:
    run = tmp_path / "run"
    earlier, later = put(run, 1, 100), put(run, 1, 300)
    assert resolve_resume(run, "auto", 1, never) == later
    assert resolve_resume(run, str(earlier), 1, never) == earlier
    own = put(run, 2, 110)
    assert resolve_resume(run, str(earlier), 1, never) == own
    flip(own / "state.json")
    warnings: list[str] = []
    assert resolve_resume(run, str(earlier), 1, warnings.append) == earlier


def test_a_path_that_is_no_good_checkpoint_is_a_user_error(tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    open_run(run, "")
    only = put(other, 1, 10)
    for path, sentence in [
        (tmp_path / "absent", "does not exist"),
        (only / "state.json", "is not a folder"),
        (tmp_path, "neither a checkpoint"),
        (run, "has no good checkpoint"),
    ]:
        with pytest.raises(UserError, match=rf"resume: .*{sentence}"):
            resolve_resume(run, str(path), 0, never)
    flip(only / "state.json")
    with pytest.raises(UserError, match=r"is damaged \(state.json has been altered"):
        resolve_resume(run, str(only), 0, never)
    with pytest.raises(UserError, match="has no good checkpoint"):
        resolve_resume(run, str(other), 0, lambda _: None)
