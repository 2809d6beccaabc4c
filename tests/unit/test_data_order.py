"""The global order: a fixed list of batches, the same whatever the number of workers."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_dist.data.order import GlobalOrder, Position, micro_batches

orders = st.builds(
    GlobalOrder,
    num_packs=st.integers(1, 60),
    global_batch_size=st.integers(1, 20),
    shuffle=st.booleans(),
    seed=st.integers(0, 2**40),
)


@given(orders, st.integers(1, 3))
def test_every_epoch_holds_each_pack_once_and_batches_never_cross_its_end(order: GlobalOrder, epochs: int) -> None:
    position = Position()
    for epoch in range(epochs):
        seen: list[int] = []
        for batch in range(order.steps_per_epoch):
            assert position == order.position_at(epoch * order.steps_per_epoch + batch)
            assert position == Position(epoch, len(seen))
            packs, position = order.batch_at(position)
            is_last = batch == order.steps_per_epoch - 1
            assert len(packs) == order.global_batch_size or (is_last and 0 < len(packs) < order.global_batch_size)
            seen += packs.tolist()
        assert sorted(seen) == list(range(order.num_packs))
    assert position == Position(epochs, 0)


@given(
    st.lists(st.integers(0, 10**6), max_size=40, unique=True), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9)
)
def test_micro_batches_are_the_same_for_every_world_size(packs: list[int], size: int, one: int, other: int) -> None:
    def of_world(world_size: int) -> list[list[int]]:
        ranks = [micro_batches(packs, size, rank, world_size) for rank in range(world_size)]
        assert len({len(rank) for rank in ranks}) == 1
        # Round i over the ranks is the global batch's own order.
        ordered = [ranks[rank][index] for index in range(len(ranks[0])) for rank in range(world_size)]
        padding = ordered[len(list(filter(None, ordered))) :]
        assert padding == [[]] * len(padding)
        assert len(padding) < world_size
        return ordered[: len(ordered) - len(padding)]

    assert of_world(one) == of_world(other)
    assert [pack for micro_batch in of_world(one) for pack in micro_batch] == packs
    assert all(len(micro_batch) == size for micro_batch in of_world(one)[:-1])


def test_micro_batches_by_hand() -> None:
    packs = np.array([9, 4, 7, 1, 0])
    assert micro_batches(packs, 2, 0, 2) == [[9, 4], [0]]
    assert micro_batches(packs, 2, 1, 2) == [[7, 1], []]
    assert micro_batches(packs, 2, 3, 4) == [[]]
    assert all(type(pack) is int for pack in micro_batches(packs, 2, 0, 1)[0])
    with pytest.raises(ValueError, match="rank 2 of 2"):
        micro_batches(packs, 2, 2, 2)


@given(orders, st.integers(0, 200))
def test_a_position_travels_through_json(order: GlobalOrder, step: int) -> None:
    position = order.position_at(step)
    again = Position.from_dict(json.loads(json.dumps(position.to_dict())))
    assert again == position
    packs, following = order.batch_at(position)
    packs_again, following_again = order.batch_at(again)
    assert packs.tolist() == packs_again.tolist()
    assert following == following_again == order.position_at(step + 1)


def test_the_permutation_follows_from_seed_and_epoch_alone() -> None:
    # These figures hold a checkpoint to the data order it was made with: a change here breaks every resume.
    order = GlobalOrder(num_packs=8, global_batch_size=8, seed=42)
    assert order.batch_at(Position(0, 0))[0].tolist() == [0, 1, 4, 2, 6, 5, 7, 3]
    epochs = {tuple(order.batch_at(Position(epoch, 0))[0].tolist()) for epoch in range(5)}
    seeds = {tuple(GlobalOrder(8, 8, seed=seed).batch_at(Position())[0].tolist()) for seed in range(5)}
    assert len(epochs) == len(seeds) == 5
    # (seed, epoch) is a pair, not a sum.
    one_zero, zero_one = GlobalOrder(8, 8, seed=1), GlobalOrder(8, 8, seed=0)
    assert one_zero.batch_at(Position(0))[0].tolist() != zero_one.batch_at(Position(1))[0].tolist()


def test_a_caller_cannot_change_the_order() -> None:
    packs, _ = GlobalOrder(8, 4, seed=1).batch_at(Position())
    with pytest.raises(ValueError, match="read-only"):
        packs[0] = 3


def test_unshuffled_is_the_tables_order() -> None:
    order = GlobalOrder(5, 2, shuffle=False)
    assert [order.batch_at(order.position_at(step))[0].tolist() for step in range(4)] == [[0, 1], [2, 3], [4], [0, 1]]


def test_total_steps_is_transformers_rounding() -> None:
    order = GlobalOrder(10, 4)
    assert order.steps_per_epoch == 3
    assert [order.total_steps(epochs) for epochs in (1, 2, 0.5, 0.1)] == [3, 6, 2, 1]


@pytest.mark.parametrize("position", [Position(0, 8), Position(0, -1), Position(-1, 0)])
def test_a_position_outside_the_order_is_refused(position: Position) -> None:
    with pytest.raises(ValueError, match="outside an epoch of 8 packs"):
        GlobalOrder(8, 3).batch_at(position)


def test_no_packs_or_no_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        GlobalOrder(0, 1)
    with pytest.raises(ValueError, match="at least 1"):
        GlobalOrder(1, 0)
