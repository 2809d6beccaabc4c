"""Best-fit-decreasing bin packing: documents into packs of a fixed room, so that little of it is padding.

The algorithm is Johnson's (1974, "Fast algorithms for bin packing"): documents from the longest to the shortest, each
into the fullest pack that still takes it. Documents of one length and packs of one room are interchangeable, so whole
groups of them are placed at once and the work grows with the number of lengths, not of documents.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Packs:
    """Which documents make up which pack.

    Attributes:
        documents: int64 [documents], pack after pack, within a pack in the source's order.
        offsets: int64 [packs + 1]; pack p is `documents[offsets[p]:offsets[p + 1]]`.
    """

    documents: np.ndarray
    offsets: np.ndarray


def pack_documents(lengths: np.ndarray, room: int) -> Packs:
    """Pack documents of these `lengths` (int [documents], each from 1 to `room`), `room` tokens a pack at most.

    A pure function of its arguments. Packs stand in the order of their first documents, so that unshuffled packs
    follow the source roughly.

    Raises:
        ValueError: a document is empty or longer than `room`.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if len(lengths) and (lengths.min() < 1 or lengths.max() > room):
        raise ValueError(f"documents of {lengths.min()} to {lengths.max()} tokens do not fit packs of {room}")
    pack_of_document = np.empty(len(lengths), dtype=np.int64)
    packs_by_room: dict[int, list[np.ndarray]] = {}
    rooms: list[int] = []
    num_packs = 0

    def leave(packs: np.ndarray, room_left: int) -> None:
        if not len(packs) or room_left == 0:
            return
        if room_left not in packs_by_room:
            packs_by_room[room_left] = []
            insort(rooms, room_left)
        packs_by_room[room_left].append(packs)

    by_length = np.argsort(-lengths, kind="stable")
    borders = np.flatnonzero(np.diff(lengths[by_length])) + 1
    for documents in np.split(by_length, borders):
        length = int(lengths[documents[0]]) if len(documents) else 0
        while len(documents):
            tightest = bisect_left(rooms, length)
            if tightest < len(rooms):
                open_room = rooms.pop(tightest)
                groups = packs_by_room.pop(open_room)
                packs = groups[0] if len(groups) == 1 else np.concatenate(groups)
            else:
                open_room = room
                count = -(-len(documents) // (room // length))
                packs = np.arange(num_packs, num_packs + count)
                num_packs += count
            # A pack that has just taken one is now the fullest that takes the next, as long as it does.
            each = open_room // length
            used, last = divmod(len(documents), each)
            if used >= len(packs):
                used, last = len(packs), 0
            whole = used * each
            pack_of_document[documents[:whole]] = np.repeat(packs[:used], each)
            pack_of_document[documents[whole : whole + last]] = packs[used : used + 1] if last else 0
            documents = documents[whole + last :]
            leave(packs[:used], open_room - each * length)
            if last:
                leave(packs[used : used + 1], open_room - last * length)
            leave(packs[used + (last > 0) :], open_room)
    return _in_source_order(pack_of_document, num_packs)


def _in_source_order(pack_of_document: np.ndarray, num_packs: int) -> Packs:
    documents = np.argsort(pack_of_document, kind="stable")
    counts = np.bincount(pack_of_document, minlength=num_packs)
    starts = np.cumsum(counts) - counts
    order = np.argsort(documents[starts], kind="stable")
    rank = np.empty(num_packs, dtype=np.int64)
    rank[order] = np.arange(num_packs)
    return Packs(
        documents=np.argsort(rank[pack_of_document], kind="stable").astype(np.int64),
        offsets=np.concatenate([[0], np.cumsum(counts[order])]).astype(np.int64),
    )
