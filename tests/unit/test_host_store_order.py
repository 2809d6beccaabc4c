"""Copies on streams of their own touch no memory before or after its time: a race detector over the store.

There are no streams on a CPU, so made-up ones keep vector clocks (Mattern 1989): an operation has happened before
another if the other's stream has waited for it. Every operation on real memory is then held against all those before
it that touched the same bytes, in whatever tensors these lay.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_dist.model.host_store import HostStore

aten: Any = torch.ops.aten


class Stream:
    """A queue of operations; `clock`: of each stream, how many of its operations have happened before the next here."""

    def __init__(self, name: str):
        self.name, self.clock = name, {name: 0}

    def record_event(self) -> dict[str, int]:
        return dict(self.clock)

    def wait_event(self, event: dict[str, int]) -> None:
        for name, count in event.items():
            self.clock[name] = max(self.clock.get(name, 0), count)

    def wait_stream(self, other: "Stream") -> None:
        self.wait_event(other.record_event())


class Races(TorchDispatchMode):
    """Raises where two operations touch the same bytes, one of them writes, and nothing orders them."""

    def __init__(self) -> None:
        super().__init__()
        self.compute = self.active = Stream("compute")
        self.seen: list[tuple[int, int, bool, str, int]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **kwargs or {})
        touched = {aten.copy_.default: [(0, True), (1, False)], aten.equal.default: [(0, False), (1, False)]}
        tensors = [(args[place], writes) for place, writes in touched.get(function, ())]
        if function is aten.full.default:
            tensors = [(out, True)]
        if tensors:
            self.active.clock[self.active.name] += 1
        for tensor, writes in tensors:
            self.hold(tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size(), writes)
        return out

    def hold(self, begin: int, end: int, writes: bool) -> None:
        clock = self.active.clock
        for other_begin, other_end, other_writes, name, number in self.seen:
            if begin < other_end and other_begin < end and (writes or other_writes):
                assert clock.get(name, 0) >= number, f"{self.active.name} does not wait for {name}"
        self.seen.append((begin, end, writes, self.active.name, clock[self.active.name]))

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        before, self.active = self.active, stream
        yield
        self.active = before


def steps(races: Races, monkeypatch: pytest.MonkeyPatch) -> tuple[list[int], list[int]]:
    """Four steps of six layers, the third thrown away in the middle of its backward.

    Returns, at the end of each layer's forward and of each one's backward, copies that nothing waits for yet.
    """
    leaving, coming = [], []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: races.compute)
    monkeypatch.setattr(torch.cuda, "stream", races.on)
    store: Any = HostStore(torch.device("cpu"))
    store.outward, store.inward = Stream("outward"), Stream("inward")
    with races:
        for step in range(4):
            stored = []
            for number in range(6):
                store.begin_layer()
                made = [torch.full((2**14,), 10.0 * number + part) for part in range(2)]
                stored.append([store.put(tensor) for tensor in made])
                del made
                leaving.append(store.outward.clock["outward"] - races.compute.clock.get("outward", 0))
            for number in reversed(range(6)):
                if step == 2 and number == 2:
                    break
                for part, one in enumerate(stored.pop()):
                    back = store.get(one)
                    assert torch.equal(back, torch.full((2**14,), 10.0 * number + part))
                    del one, back
                coming.append(store.inward.clock["inward"] - races.compute.clock.get("inward", 0))
            stored.clear()
            if step == 2:
                store.settle()
    return leaving, coming


def test_every_copy_is_ordered_with_all_that_touches_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    races = Races()
    leaving, coming = steps(races, monkeypatch)
    copies = [name for *_, name, _ in races.seen if name != "compute"]
    assert copies.count("outward") == 2 * 4 * 12
    # The last two layers of six never leave.
    assert 2 * 3 * 8 < copies.count("inward") <= 2 * 4 * 8
    # Two copies a layer, which hide: those of two layers leave, and those of the layer before come.
    assert leaving[:6] == leaving[6:12] == [2, 4, 4, 4, 4, 4]
    assert coming[:6] == coming[6:12] == [0, 2, 2, 2, 2, 0]


@pytest.mark.parametrize(
    ("stream", "lacks"),
    [("outward", "wait_event"), ("outward", "wait_stream"), ("inward", "wait_stream"), ("compute", "wait_event")],
)
def test_each_wait_is_needed(monkeypatch: pytest.MonkeyPatch, stream: str, lacks: str) -> None:
    """The detector finds what a stream that does not wait would do."""
    wait = getattr(Stream, lacks)
    monkeypatch.setattr(Stream, lacks, lambda self, other: None if self.name == stream else wait(self, other))
    with pytest.raises(AssertionError, match="does not wait"):
        steps(Races(), monkeypatch)
