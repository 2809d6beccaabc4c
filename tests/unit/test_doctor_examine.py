"""`qlora-dist doctor`: the lines that facts come to."""

import pytest

from qlora_dist.cluster.doctor.examine import examine
from qlora_dist.cluster.doctor.lines import Line
from qlora_dist.cluster.doctor.wanted import Wanted
from tests.unit.doctor_facts import GIB, TROUBLES, WANTED, Facts, cluster, rank


def trouble(found: list[Facts], wanted: Wanted = WANTED) -> list[Line]:
    return [line for line in examine(found, wanted) if line.verdict in ("warn", "fail")]


def test_a_sound_cluster_is_ok_in_every_line() -> None:
    lines = examine(cluster(), WANTED)
    assert {line.verdict for line in lines} == {"ok"}
    assert len({line.check for line in lines}) == len(lines) == 15
    assert all(line.mend == "" for line in lines)


@pytest.mark.parametrize("name", TROUBLES)
def test_one_thing_wrong_is_found_alone_with_a_mend(name: str) -> None:
    plant, verdict, check, text = TROUBLES[name]
    found = cluster()
    plant(found)
    lines = trouble(found)
    first = next(line for line in lines if line.check == check)
    assert (first.verdict, text in first.found) == (verdict, True), first
    assert all(line.mend for line in lines)
    assert {line.check for line in lines} == {check}, lines


def test_what_a_clock_is_uncertain_by_is_not_held_against_it() -> None:
    found = cluster()
    found[0]["clock"]["2"] = {"ahead_s": 3.0, "within_s": 2.5}
    assert trouble(found) == []


def test_a_folder_that_nobody_named_may_be_each_node_s_own() -> None:
    found = cluster()
    found[2]["folder"] = {"error": "another folder"}
    (line,) = trouble(found, Wanted("/home/me/runs", workers=4, hub="org/model"))
    assert (line.verdict, line.check) == ("warn", "folder")
    assert "--folder" in line.mend


def test_nodes_that_did_not_meet_prove_nothing_of_their_folder() -> None:
    """Each looked at its own then, and found nothing wrong with it."""
    found = cluster()
    for facts in (found[0], found[2]):
        facts["folder"] |= {"nodes": 1, "won": True, "turns": [0, 1], "lag_s": None}
    found[2]["meeting"] = {"error": "DistNetworkError: timed out"}
    lines = {line.check: line for line in trouble(found)}
    assert set(lines) == {"nodes", "folder"}
    assert "not compared between nodes" in lines["folder"].found
    assert "rank 2 on b, meeting: DistNetworkError: timed out" in lines["nodes"].found


def test_a_download_that_does_not_fit_is_found() -> None:
    found = cluster()
    place = {"what": "hub cache", "path": "/hf", "free": 10 * GIB, "total": 20 * GIB, "inodes": None, "device": 9}
    for facts in (found[0], found[2]):
        facts["machine"]["space"].append(place)
    lines = trouble(found)
    assert {line.check for line in lines} == {"space"}
    assert lines[0].found == "10 GiB of 20 GiB free in hub cache (/hf) on a; org/model takes 16 GiB"
    for facts in (found[0], found[2]):
        facts["hub"]["cached"] = True
    assert trouble(found) == []


def test_a_machine_without_gpus_is_sound_unless_the_config_wants_them() -> None:
    facts = rank(0, "a", torch={"torch": "2.13.0+cpu", "cuda": None, "device": None, "count": 0})
    facts["machine"]["gpus"] = {"error": "there is no nvidia-smi", "devices": 0}
    del facts["nccl"], facts["load"], facts["clock"]
    facts["folder"]["nodes"] = 1
    verdicts = {line.check: line.verdict for line in examine([facts], Wanted("/r", workers=1))}
    assert (verdicts["gpu"], verdicts["nccl"], verdicts["gloo"]) == ("skipped", "skipped", "ok")
    (line,) = trouble([facts], Wanted("/r", workers=1, device="cuda"))
    assert (line.check, line.verdict) == ("gpu", "fail")


@pytest.mark.parametrize(
    ("facts", "verdict", "text"),
    [
        ({"wanted": "off"}, "skipped", "track.wandb is off"),
        ({"wanted": "offline", "mode": "offline"}, "ok", "track.wandb=offline"),
        ({"wanted": "online", "mode": "offline", "variable": "offline"}, "ok", "WANDB_MODE=offline"),
        ({"wanted": "online", "mode": "offline", "variable": "dryrun"}, "ok", "WANDB_MODE=dryrun"),
        ({"wanted": "online", "mode": "off", "variable": "disabled"}, "skipped", "WANDB_MODE=disabled: W&B gets"),
        ({"wanted": "online", "mode": "offline", "key": False}, "warn", "no key for w.example"),
        ({"wanted": "auto", "mode": "offline", "key": False}, "ok", "no key for w.example"),
        ({"wanted": "auto", "mode": "online", "error": "no route"}, "warn", "w.example: no route"),
    ],
)
def test_what_becomes_of_wandb_is_said(facts: Facts, verdict: str, text: str) -> None:
    found = [rank(0, "a")]
    found[0]["wandb"] = {"key": True, "host": "w.example", "variable": None, "seconds": 0.1} | facts
    (line,) = [line for line in examine(found, Wanted("/r")) if line.check == "wandb"]
    assert line.verdict == verdict
    assert text in line.found


def test_nothing_answers() -> None:
    found = [{"node": "10.0.0.1", "absent": "Ray has lost it"}]
    (line,) = examine(found, WANTED)[:1]
    assert line == Line("nodes", "fail", "10.0.0.1: Ray has lost it", line.mend)
