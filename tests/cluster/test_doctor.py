"""`qlora-dist doctor` on real processes, with real faults planted."""

import socket

import pytest

from tests.cluster.doctor_faults import (
    Fault,
    bad,
    full_folder,
    other_clock,
    other_folder,
    other_version,
    result,
    start,
    start_nodes,
)


def test_it_finds_what_is_wrong_with_a_node(tmp_path):
    """Of two nodes the second has another folder at the run folder's path, another peft, a full cache, and its wall
    clock 90 s ahead: of the process only (LD_PRELOAD), since the two nodes share one kernel and so one clock."""
    shared, cache = tmp_path / "shared", tmp_path / "cache"
    shared.mkdir()
    cache.mkdir()
    version = other_version(tmp_path / "packages", "peft", "0.9.0")
    fault = Fault(
        before=[*other_folder(shared), *full_folder(cache)],
        environment=version | other_clock(tmp_path, 90) | {"QLORA_DIST_CACHE": str(cache)},
    )
    first, second = start_nodes({1: fault}, "--folder", str(shared / "run"))
    code, told = result(first)
    found = bad(told)
    host = socket.gethostname()
    assert code == 1
    assert second.wait(20) == 0
    assert second.stdout is not None and second.stdout.read() == ""
    (folder,) = found["fail folder"]
    assert folder == f"{shared} is another folder here than on the first node, or not there on {host}/1"
    (packages,) = found["fail versions"]
    assert packages == f"peft 0.9.0 on {host}/1; qlora-dist needs >=0.21"
    (clock,) = found["fail clock"]
    assert clock == f"{host}/1 is 90.0 s ahead of {host}/0"
    (space,) = found["fail space"]
    assert space == f"0 MiB of 1 MiB free in cache ({cache}) on {host}/1"
    # And nothing else is wrong: what the two nodes do together works.
    assert {line["check"]: line["verdict"] for line in told["lines"]}["gloo"] == "ok"
    assert {name for name in found if name.startswith("fail")} == {
        "fail folder", "fail versions", "fail clock", "fail space",
    }  # fmt: skip
    assert not list(shared.iterdir())
