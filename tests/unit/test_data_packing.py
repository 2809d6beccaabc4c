"""Best-fit-decreasing packing against the textbook loop, by hand, and in time."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_dist.data.packing import Packs, pack_documents


def contents(packs: Packs) -> list[list[int]]:
    return [part.tolist() for part in np.split(packs.documents, packs.offsets[1:-1])]


def textbook(lengths: list[int], room: int) -> list[list[int]]:
    """One document at a time, longest first, into the pack with the least room that takes it."""
    packs: list[list[int]] = []
    left: list[int] = []
    for document in sorted(range(len(lengths)), key=lambda d: -lengths[d]):
        fitting = [pack for pack in range(len(packs)) if left[pack] >= lengths[document]]
        if not fitting:
            packs.append([])
            left.append(room)
            fitting = [len(packs) - 1]
        best = min(fitting, key=lambda pack: left[pack])
        packs[best].append(document)
        left[best] -= lengths[document]
    return packs


def test_packs_by_hand() -> None:
    # 6+4, 5+5, 3 fill rooms of 10; packs follow their first documents, documents the source.
    assert contents(pack_documents(np.array([3, 5, 4, 5, 6]), 10)) == [[0], [1, 3], [2, 4]]
    assert contents(pack_documents(np.array([10, 10]), 10)) == [[0], [1]]
    assert contents(pack_documents(np.array([1] * 5), 3)) == [[0, 1, 2], [3, 4]]


@given(
    st.integers(1, 40).flatmap(
        lambda room: st.tuples(st.just(room), st.lists(st.integers(1, room), min_size=1, max_size=60))
    )
)
def test_every_document_once_no_pack_too_full_and_as_tight_as_the_textbook(case: tuple[int, list[int]]) -> None:
    room, lengths = case
    packs = contents(pack_documents(np.array(lengths), room))
    assert sorted(document for pack in packs for document in pack) == list(range(len(lengths)))
    assert all(pack == sorted(pack) for pack in packs)
    assert [pack[0] for pack in packs] == sorted(pack[0] for pack in packs)
    fills = sorted(sum(lengths[document] for document in pack) for pack in packs)
    # Which of several packs of equal room takes a document is free, so the packs are compared by how full they are.
    assert fills == sorted(sum(lengths[document] for document in pack) for pack in textbook(lengths, room))
    assert max(fills) <= room


@pytest.mark.parametrize("lengths", [[0, 3], [3, 11]])
def test_documents_that_cannot_fit_are_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="do not fit packs of 10"):
        pack_documents(np.array(lengths), 10)


def test_a_hundred_thousand_documents_in_a_second_or_two() -> None:
    lengths = np.minimum(np.random.default_rng(0).lognormal(5, 1, 100_000).astype(np.int64) + 1, 2048)
    started = time.monotonic()
    packs = pack_documents(lengths, 2048)
    # A fraction of a second on an idle core; the rest is for a machine that others use.
    assert time.monotonic() - started < 5
    assert lengths.sum() / (2048 * (len(packs.offsets) - 1)) > 0.99
    again = pack_documents(lengths, 2048)
    assert np.array_equal(packs.documents, again.documents)
    assert np.array_equal(packs.offsets, again.offsets)
