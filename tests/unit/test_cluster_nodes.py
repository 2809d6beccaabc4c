"""Interfaces, addresses and room: what launchers ask of the machines."""

import socket

import psutil
import pytest

from qlora_dist.cluster.network import address_towards, interface_of, interface_settings
from qlora_dist.cluster.nodes import room
from qlora_dist.cluster.torchrun import with_world_size, workers_here
from qlora_dist.config.errors import UserError
from tests.cluster.toys import toy_config


def test_each_address_of_this_host_names_its_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.delenv(variable, raising=False)
    seen = 0
    for name, addresses in psutil.net_if_addrs().items():
        for entry in addresses:
            if entry.family == socket.AF_INET:
                seen += 1
                assert interface_of(entry.address) == name
                assert interface_settings(entry.address) == {
                    "GLOO_SOCKET_IFNAME": name,
                    "NCCL_SOCKET_IFNAME": f"={name}",
                }
    assert seen
    assert interface_of("192.0.2.77") is None  # RFC 5737: nobody's
    assert interface_settings("192.0.2.77") == {}
    assert address_towards("127.0.0.1") == "127.0.0.1"


def test_an_interface_that_the_person_chose_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    assert interface_settings("127.0.0.1") == {"GLOO_SOCKET_IFNAME": "lo"}


def test_a_worker_does_not_fit_across_two_nodes() -> None:
    nodes = [{"CPU": 3.0, "GPU": 1.0}, {"CPU": 8.0, "GPU": 4.0}, {"CPU": 64.0}]
    assert room(nodes, {"CPU": 2.0, "GPU": 1.0}) == 5
    assert room(nodes, {"CPU": 4.0, "GPU": 1.0}) == 2
    assert room(nodes, {"CPU": 4.0}) == 18
    assert room([], {"CPU": 1.0}) == 0


def test_a_range_under_somebody_elses_torchrun() -> None:
    config = toy_config(num_workers=[1, 3], backend="torchrun")
    assert with_world_size(config, 2) == config
    assert with_world_size(config, 2).global_batch_size == 3
    with pytest.raises(UserError, match=r"launch.num_workers is \[1, 3\], but WORLD_SIZE is 4"):
        with_world_size(config, 4)
    assert with_world_size(toy_config(num_workers=[2, 2], backend="torchrun"), 2).launch.max_workers == 2


def test_our_own_torchrun_starts_the_most_that_have_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def here(count: int, **launch: object) -> int:
        monkeypatch.setattr("torch.cuda.device_count", lambda: count)
        return workers_here(toy_config(backend="torchrun", **launch))

    assert here(0, num_workers=[1, 3], device="auto") == 3
    assert here(2, num_workers=[1, 3], device="auto") == 2
    assert here(8, num_workers=[1, 3], device="cuda") == 3
    assert here(8, num_workers=[1, 3], device="cpu") == 3
    assert here(2, num_workers=3, device="cuda") == 3  # each worker then says itself what it lacks
    with pytest.raises(UserError, match=r"\[2, 3\], and this machine has 1 GPU"):
        here(1, num_workers=[2, 3], device="cuda")
