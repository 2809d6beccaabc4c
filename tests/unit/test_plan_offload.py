"""What waits in host memory: the plan's arithmetic, at sizes where the best choice is known, and its promises."""

import itertools
from dataclasses import replace

import pytest

from qlora_dist.plan.activations import Gain, Kind, LayerShape, describe, forward_seconds, gains
from qlora_dist.plan.offload import (
    LINK_SHARE,
    Link,
    Placed,
    describe_worth,
    on_device,
    place,
    spread,
    waited_seconds,
)

GIB = 2**30
LLAMA_8B = LayerShape(hidden=4096, intermediate=14336, queries=4096, keys=1024)
TOKENS = 4 * 2048
LAYERS: list[dict[Kind, Gain]] = [gains(LLAMA_8B, TOKENS, 2048, 2)] * 32
INPUTS = [TOKENS * 4096 * 2] * 32
FAST = Link(55e9, 6.1e-3, 100 * GIB)
ROOMS = [-2.5, -0.7, -0.5, -0.3, -0.1, 0.0, 0.05, 0.2, 0.4, 0.6, 0.9, 1.3, 2, 3.3, 5, 6, 8, 9, 14, 22]


def host(placed: Placed, kind: str) -> int:
    return sum(kind in choice for choice in placed.choices)


def bytes_on_device(placed: Placed) -> float:
    """By the tensors' sizes, beyond the leanest plan without the host."""
    total, moved = 0.0, []
    for layer, size, choice in zip(LAYERS, INPUTS, placed.choices, strict=False):
        away = {"attention"} if "attention_on_host" in choice else set()
        total += sum(layer[kind].size for kind in choice - away if kind in layer)
        total -= size if "input_on_host" in choice else 0
        moved.append((layer["attention"].size if away else 0) + (size if "input_on_host" in choice else 0))
    return total + 2 * max(moved)


def test_what_a_large_rank_leaves_on_the_device_counts() -> None:
    """The products with A of all hosted layers are there, and do not travel."""
    ranked = [gains(replace(LLAMA_8B, ranks=(768, 256, 512, 256)), TOKENS, 2048, 2)] * 32
    stays = ranked[0]["attention"].stays
    assert stays == TOKENS * 1024 * 2
    room = 2 * (LAYERS[0]["attention"].size + INPUTS[0]) - 32 * INPUTS[0]
    for layers, fits in ((LAYERS, room), (ranked, room + 32 * stays)):
        for less in (0, 1):
            placed = place(layers, INPUTS, fits - less, FAST, ["attention"])
            everything = host(placed, "attention_on_host") == host(placed, "input_on_host") == 32
            assert everything == (not less)
        assert placed.size <= fits - 1
    assert (
        place(ranked, INPUTS, room + 32 * stays, FAST, ["attention"]).copied
        == place(LAYERS, INPUTS, room, FAST, ["attention"]).copied
    )


def test_a_layers_forward_is_about_what_an_h100_takes() -> None:
    """2,048 x 4 tokens: 5.1 ms of matrix products, 0.3 of attention, the rest passes over memory."""
    assert forward_seconds(LLAMA_8B, TOKENS, 2048, 2) == pytest.approx(6.1e-3, rel=0.05)


def test_attention_goes_to_the_host_before_it_is_computed_again() -> None:
    """302 MB a layer, input and attention, hide behind a forward of 6.1 ms at 55 GB/s; 1.28 ms a layer are saved."""
    placed = place(LAYERS, INPUTS, 0.0, FAST)
    assert host(placed, "attention_on_host") == 32
    assert host(placed, "input_on_host") >= 16, "what the copies under way take comes from somewhere"
    assert placed.waited < 1e-3
    assert placed.saved > 0.9 * 32 * LAYERS[0]["attention"].seconds
    assert on_device(LAYERS, 0.0).saved == 0
    # At twice the tokens' bytes a second no more than half of it hides.
    slow = place(LAYERS, INPUTS, 0.0, Link(25e9, 6.1e-3, 100 * GIB))
    assert 0 < host(slow, "attention_on_host") < 20
    assert slow.copied / 32 <= 25e9 * 6.1e-3 * 1.02
    assert placed.saved > slow.saved > 0


def test_inputs_make_room_where_even_recomputation_is_too_much() -> None:
    placed = place(LAYERS, INPUTS, -1.0 * GIB, Link(10e9, 6.1e-3, 100 * GIB))
    assert host(placed, "attention_on_host") == 0
    assert host(placed, "input_on_host") >= 18
    assert placed.size <= -1.0 * GIB


def test_what_cannot_fit_is_as_small_as_it_can_be() -> None:
    placed = place(LAYERS, INPUTS, -3.0 * GIB, FAST)
    assert placed.choices == [frozenset({"input_on_host"})] * 32
    assert placed.size == -30 * INPUTS[0]


@pytest.mark.parametrize("link", [None, Link(55e9, 0.0, GIB), Link(0.0, 6e-3, GIB), Link(55e9, 6e-3, 0.0)])
def test_without_a_host_to_use_all_is_as_it_was(link: Link | None) -> None:
    for room in (0.0, 3 * GIB, 30 * GIB):
        assert place(LAYERS, INPUTS, room, link) == on_device(LAYERS, room)


def test_nothing_travels_where_everything_fits() -> None:
    placed = place(LAYERS, INPUTS, 60 * GIB, FAST)
    assert placed.copied == 0
    assert all({"gate_up", "attention", "weights", "norms"} <= choice for choice in placed.choices)


@pytest.mark.parametrize("rate", [3e9, 25e9, 55e9])
@pytest.mark.parametrize("host_gib", [1.0, 100.0])
def test_more_room_is_never_slower_and_never_overrun(rate: float, host_gib: float) -> None:
    """Twelve layers, of which the larger of a plan's parts are a larger share."""
    link, before = Link(rate, 6.1e-3, host_gib * GIB), None
    layers, inputs = LAYERS[:12], INPUTS[:12]
    for room in ROOMS:
        placed = place(layers, inputs, room * GIB, link)
        assert placed.size == pytest.approx(bytes_on_device(placed))
        assert placed.copied <= host_gib * GIB
        if placed.size > room * GIB:
            assert before is None, "what fitted in less fits"
            continue
        assert placed.saved >= on_device(layers, room * GIB).saved or room < 0
        assert before is None or placed.saved >= before
        before = placed.saved
    assert before is not None


def test_a_faster_link_is_never_slower() -> None:
    found = [place(LAYERS, INPUTS, 1.0 * GIB, Link(rate, 6.1e-3, 100 * GIB)).saved for rate in (3e9, 12e9, 25e9, 55e9)]
    assert all(later >= earlier for earlier, later in itertools.pairwise(found))


def test_waiting_is_what_the_link_lacks() -> None:
    link, fits = Link(10e9, 1e-3, GIB), 10e9 * LINK_SHARE * 1e-3
    assert waited_seconds([0.0] * 8, link) == 0
    assert waited_seconds([fits] * 8, link) == pytest.approx(0.0, abs=1e-9)
    # In the long run a layer takes as long as its copy; two layers' worth may be left at the end.
    assert waited_seconds([1.5 * fits] * 100, link) == pytest.approx(98 * 0.5e-3, rel=0.03)
    # What is under way for one layer hides behind those that send less.
    assert waited_seconds([1.2 * fits, 0.2 * fits, 0.2 * fits] * 50, link) == pytest.approx(0.0, abs=1e-9)
    # A backward of two forwards waits for what takes three.
    assert waited_seconds([3 * fits], link) == pytest.approx(1e-3)


def test_layers_take_turns() -> None:
    attention = [frozenset({"attention_on_host"}), frozenset[str]()]
    assert spread(6, 3, 0) == attention * 3
    both = [frozenset({"attention_on_host"}), frozenset({"input_on_host"})]
    assert spread(6, 3, 3) == both * 3, "inputs first where nothing else travels"
    assert [len(one) for one in spread(6, 3, 4)] == [2, 1, 1, 1, 1, 1]
    assert spread(4, 4, 4) == [frozenset({"attention_on_host", "input_on_host"})] * 4


def test_a_person_reads_what_is_where_and_what_it_saves() -> None:
    host_only: frozenset[str] = frozenset({"attention", "attention_on_host"})
    assert describe([host_only, host_only]) == "in host memory: attention of all 2 layers"  # type: ignore[list-item]
    assert describe([frozenset({"input_on_host"}), frozenset()]) == (
        "all of 2 layers recomputed; in host memory: inputs of 1 of 2 layers"
    )
    assert describe([frozenset({"gate_up", "attention", "attention_on_host", "input_on_host"}), frozenset()]) == (
        "kept: gate and up of 1 of 2 layers; in host memory: attention of 1 of 2 layers, inputs of 1 of 2 layers"
    )
    placed = Placed([], 0.0, 0.0412, 0.0021, 9 * GIB)
    assert describe_worth(placed, FAST) == (
        "41 ms a micro-batch less than all recomputed, as predicted, with 2 ms of waiting (9.0 GiB at 55 GB/s, a "
        "layer's forward 6.1 ms)"
    )
    assert describe_worth(Placed([], 0.0, 0.01), None) == "10 ms a micro-batch less than all recomputed, as predicted"
