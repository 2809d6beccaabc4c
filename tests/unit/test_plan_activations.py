"""The arithmetic of keeping activations, at sizes where the best choice is known."""

from dataclasses import replace

import pytest

from qlora_dist.plan.activations import KINDS, LayerShape, choose, describe, gains

LLAMA_8B = LayerShape(hidden=4096, intermediate=14336, queries=4096, keys=1024)
GIB = 2**30


def test_sizes_are_those_of_the_tensors() -> None:
    """8 rows of 2,048 tokens in bf16: gate and up, then the residual, q, k, v and the attention's output."""
    found = gains(LLAMA_8B, 8 * 2048, 2048, 2)
    assert found["gate_up"].size == 8 * 2048 * 2 * 14336 * 2
    assert found["attention"].size == 8 * 2048 * (4096 + 6144 + 4096) * 2
    assert found["weights"].size == 218_103_808 * 2
    assert found["norms"].size == 2 * 8 * 2048 * 4096 * 2


def test_a_large_rank_takes_its_share() -> None:
    """256: products with A beside q, k, v and the output, and beside gate and up, whose buffer has room for them."""
    ranks = (768, 256, 512, 256)
    plain, found = (gains(shape, 1024, 1024, 2) for shape in (LLAMA_8B, replace(LLAMA_8B, ranks=ranks)))
    assert found["gate_up"].size - plain["gate_up"].size == 1024 * 2 * 512 * 2
    assert found["attention"].size - plain["attention"].size == found["attention"].stays == 1024 * (768 + 256) * 2
    assert found["weights"].size / plain["weights"].size == pytest.approx(1.15, abs=0.01)
    # Buffers are multiples of 64 wide.
    small = gains(replace(LLAMA_8B, ranks=(48, 16, 32, 16)), 1024, 1024, 2)
    assert small["norms"].size - plain["norms"].size == 1024 * 2 * 64 * 2


def test_worth_a_gib_is_in_the_order_that_was_measured() -> None:
    """Milliseconds saved a GiB: about 6 for gate and up, 5 for the attention, a good 1 for weights, 0.7 for norms."""
    found = gains(LLAMA_8B, 8 * 2048, 2048, 2)
    worth = {kind: 1e3 * gain.seconds / (gain.size / GIB) for kind, gain in found.items()}
    assert worth["gate_up"] == pytest.approx(6.3, rel=0.1)
    assert worth["attention"] == pytest.approx(5.5, rel=0.1)
    assert 0.9 < worth["weights"] < 1.6
    assert worth["norms"] == pytest.approx(0.7, rel=0.2)


def test_the_room_is_filled_by_worth_and_from_the_last_layer_on() -> None:
    layers = [gains(LLAMA_8B, 8 * 2048, 2048, 2)] * 4
    gate_up, attention = layers[0]["gate_up"].size, layers[0]["attention"].size
    none, half, all_four = frozenset(), frozenset({"gate_up"}), frozenset({"gate_up", "attention"})
    assert choose(layers, 0) == [none] * 4
    assert choose(layers, 2 * gate_up) == [none, none, half, half]
    assert choose(layers, 4 * gate_up + attention) == [half, half, half, all_four]
    # What is left after the large ones goes to a smaller one.
    assert choose(layers, gate_up + attention)[3] == all_four
    assert choose(layers, 10**13) == [frozenset(KINDS)] * 4
    assert choose(layers, 10**13, kinds=("gate_up",)) == [half] * 4
    # A norm is worth its place only where nothing makes it again on the way.
    assert choose(layers, 10**13, kinds=("gate_up", "norms")) == [half] * 4
    for room in range(0, 8 * gate_up, gate_up // 3):
        kept = choose(layers, room)
        assert sum(layer[kind].size for layer, kinds in zip(layers, kept, strict=True) for kind in kinds) <= room


def test_small_micro_batches_keep_weights_too() -> None:
    layers = [gains(LLAMA_8B, 2048, 2048, 2)] * 32
    assert all("weights" in kinds for kinds in choose(layers, 30 * GIB))
    assert not any("weights" in kinds for kinds in choose(layers, 5 * GIB))


def test_a_person_reads_what_is_kept() -> None:
    both, none = frozenset({"gate_up", "attention"}), frozenset()
    assert describe([both, both]) == "kept: gate and up of all 2 layers, attention of all 2 layers"
    assert describe([none, frozenset({"gate_up"})]) == "kept: gate and up of 1 of 2 layers"
    assert describe([none, none]) == "all of 2 layers recomputed"
