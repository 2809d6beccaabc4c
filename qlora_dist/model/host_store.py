"""Tensors that wait for their backward in pinned host memory, and copies that hide behind the computation.

What a layer's forward leaves goes to the host on a stream of its own while the next layers compute, and comes back on
another while the backward of the layer after it runs. Order on the device is kept by events: the host never waits.
Memory of the device comes from the computing stream's pool and goes back to it only after that stream waits for the
copy, so that the allocator counts, and caps, all that is in use (with `record_stream` a host that runs ahead would take
new memory for every layer). A storage is copied whole, in one piece, and comes back with the strides that it had.
"""

import bisect
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from qlora_dist.config.errors import UserError

# Smaller tensors stay: their copies would take longer than what they free is worth.
MIN_BYTES = 2**20
# A small part of something large stays too: it is the large one's to say where it lives.
LARGEST_PART = 8
# Pinned memory is taken from the system in pieces of a quarter of what there is, within these, and never given back.
# They are powers of two, since PyTorch rounds up to them, and large, since the end of one that is too short for the
# next tensor is lost.
FIRST_SLAB_BYTES, SLAB_BYTES, ALIGNED = 2**28, 2**30, 4096
# Of what is taken, what tensors can use.
PACKED = 0.85


@dataclass(eq=False)
class Slot:
    """A piece of host memory, and the last copy from or to it."""

    memory: Tensor
    used: torch.cuda.Event | None = None

    @property
    def size(self) -> int:
        """In bytes."""
        return self.memory.numel()


class PinnedMemory:
    """Slots that are used again: what a step takes, the next one finds.

    taken: bytes that the system has given; constant once the largest micro-batch has been seen.
    """

    def __init__(self, pinned: bool):
        self.pinned, self.taken = pinned, 0
        self.free: list[Slot] = []
        # Whatever thread collects garbage may add to it, at any time.
        self.returned: deque[Slot] = deque()
        self.rest = torch.empty(0, dtype=torch.uint8)

    def take(self, nbytes: int) -> Slot:
        """The smallest free slot of at least so many bytes, or a new one.

        Raises:
            UserError: the system gives no more.
        """
        while self.returned:
            bisect.insort(self.free, self.returned.popleft(), key=lambda slot: slot.size)
        place = bisect.bisect_left(self.free, nbytes, key=lambda slot: slot.size)
        if place < len(self.free):
            return self.free.pop(place)
        size = -(-nbytes // ALIGNED) * ALIGNED
        if size > self.rest.numel():
            quarter = 2 ** ((self.taken // 4).bit_length() - 1) if self.taken else 0
            slab = max(min(max(quarter, FIRST_SLAB_BYTES), SLAB_BYTES), 2 ** (size - 1).bit_length())
            piece = self._allocate(slab)
            if self.rest.numel():
                bisect.insort(self.free, Slot(self.rest), key=lambda slot: slot.size)
            self.rest = piece
            self.taken += slab
        slot, self.rest = Slot(self.rest[:size]), self.rest[size:]
        return slot

    def _allocate(self, nbytes: int) -> Tensor:
        try:
            return torch.empty(nbytes, dtype=torch.uint8, pin_memory=self.pinned)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                "host-memory-not-pinned", gib=nbytes / 2**30, taken_gib=self.taken / 2**30, error=reason
            ) from error

    def give(self, slot: Slot) -> None:
        """Let others have it; whoever takes it waits on the device for `slot.used`."""
        self.returned.append(slot)


class Kept:
    """One storage of the device that is on the host, or on its way there or back.

    group: the layer's number in its forward. source: the storage until its memory is let go. sent, arrived: the ends
    of the copies; None on a CPU, and `arrived` once the computation waits for it. back: the storage that came back.
    """

    def __init__(self, memory: PinnedMemory, source: torch.UntypedStorage, group: int):
        self.slot = memory.take(source.nbytes())
        self.memory = memory
        self.size, self.group, self.device = source.nbytes(), group, source.device
        self.source: torch.UntypedStorage | None = source
        self.back: torch.UntypedStorage | None = None
        self.sent: torch.cuda.Event | None = None
        self.arrived: torch.cuda.Event | None = None

    def __del__(self) -> None:
        if hasattr(self, "memory"):
            self.memory.give(self.slot)


@dataclass(frozen=True, eq=False)
class Stored:
    """A tensor whose storage is `kept`."""

    kept: Kept
    dtype: torch.dtype
    offset: int
    shape: Sequence[int]
    stride: Sequence[int]


class HostStore:
    """What the forwards of a device's layers have put on the host, in that order.

    leaving: whose memory on the device is still held for the copy. coming: fetched, and not yet waited for. Of both
    there are never more than two layers' worth: of the largest layer of the forward before and of this one so far, so
    that a forward like the one before waits no sooner in its first layers than in its last. moved: bytes put since it
    was made.
    """

    def __init__(self, device: torch.device):
        on_gpu = device.type == "cuda"
        self.device, self.min_bytes, self.moved = device, MIN_BYTES, 0
        self.outward = torch.cuda.Stream(device) if on_gpu else None
        self.inward = torch.cuda.Stream(device) if on_gpu else None
        self.memory = PinnedMemory(pinned=on_gpu)
        self.order: list[weakref.ref[Kept]] = []
        self.known: dict[tuple[int, int], tuple[StorageWeakRef, weakref.ref[Kept]]] = {}
        self.leaving: deque[Kept] = deque()
        self.coming: list[Kept] = []
        self.group = self.group_bytes = self.leaving_bytes = 0
        self.largest_group = self.largest_before = 0
        self.backward = False

    def begin_layer(self) -> None:
        """What is put from now on is another layer's, the first of a forward if a backward was the last to ask."""
        if self.backward:
            self.backward, self.largest_before, self.largest_group = False, self.largest_group, 0
        self.group, self.group_bytes = self.group + 1, 0
        self.known.clear()
        self._forget_the_used()

    def pack(self, tensor: Tensor, min_bytes: int | None = None) -> Tensor | Stored:
        """As `put`; as it is where it is small, a parameter or a view of one, or a small part of something large."""
        least = max(1, self.min_bytes if min_bytes is None else min_bytes)
        whole = tensor if tensor._base is None else tensor._base
        size = tensor.numel() * tensor.element_size()
        if type(tensor) is not Tensor or isinstance(whole, nn.Parameter) or size < least:
            return tensor
        known = self._known(tensor) is not None
        return self.put(tensor) if known or size * LARGEST_PART >= tensor.untyped_storage().nbytes() else tensor

    def put(self, tensor: Tensor) -> Stored:
        """Start the copy of its storage to the host, unless that is under way for another tensor of this layer."""
        kept = self._known(tensor)
        if kept is None:
            kept = self._send(tensor.untyped_storage())
            storage = tensor.untyped_storage()
            self.known[storage._cdata, tensor._version] = StorageWeakRef(storage), weakref.ref(kept)
        return Stored(kept, tensor.dtype, int(tensor.storage_offset()), tensor.shape, tensor.stride())

    def get(self, stored: Tensor | Stored) -> Tensor:
        """The tensor on its device, once the computation gets there; what the layer before it needs is sent for."""
        if isinstance(stored, Tensor):
            return stored
        kept, self.backward = stored.kept, True
        if kept.source is not None:
            # Among the last: its memory was not let go yet.
            kept.back = kept.source
            self._let_go(kept)
        elif kept.back is None:
            self._fetch(kept)
        if kept.arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(kept.arrived)
            kept.arrived = None
        if kept in self.coming:
            self.coming.remove(kept)
        self._fetch_layer_before(kept)
        assert kept.back is not None
        flat = torch.empty(0, dtype=stored.dtype, device=self.device)
        return flat.set_(kept.back, stored.offset, tuple(stored.shape), tuple(stored.stride))

    def settle(self) -> None:
        """Let go of what is under way, for a graph that has been thrown away or another plan."""
        while self.leaving:
            self._let_go(self.leaving[0])
        self._stop_waiting()
        self.largest_group = self.largest_before = 0

    def _stop_waiting(self) -> None:
        for kept in self.coming:
            if kept.arrived is not None:
                torch.cuda.current_stream(self.device).wait_event(kept.arrived)
                kept.arrived = None
        self.coming.clear()

    def _forget_the_used(self) -> None:
        while self.order and self.order[-1]() is None:
            self.order.pop()

    def _known(self, tensor: Tensor) -> Kept | None:
        source, kept = self.known.get((tensor.untyped_storage()._cdata, tensor._version), (None, None))
        # An address means the same storage only as long as that one lives.
        return None if source is None or kept is None or source.expired() else kept()

    def _send(self, source: torch.UntypedStorage) -> Kept:
        # A backward that is over has not asked for these.
        self._stop_waiting()
        kept = Kept(self.memory, source, self.group)
        self.order.append(weakref.ref(kept))
        host, device = kept.slot.memory[: kept.size], _bytes_of(source)
        if self.outward is None:
            host.copy_(device)
        else:
            self.outward.wait_stream(torch.cuda.current_stream(self.device))
            if kept.slot.used is not None:
                self.outward.wait_event(kept.slot.used)
            with torch.cuda.stream(self.outward):
                host.copy_(device, non_blocking=True)
            kept.slot.used = kept.sent = self.outward.record_event()
        self.leaving.append(kept)
        self.moved += kept.size
        self.leaving_bytes += kept.size
        self.group_bytes += kept.size
        self.largest_group = max(self.largest_group, self.group_bytes)
        while self.leaving_bytes > 2 * max(self.largest_group, self.largest_before):
            self._let_go(self.leaving[0])
        return kept

    def _let_go(self, kept: Kept) -> None:
        """Give its memory on the device to whatever computes after the copy."""
        if kept.sent is not None:
            torch.cuda.current_stream(self.device).wait_event(kept.sent)
        kept.source = None
        self.leaving.remove(kept)
        self.leaving_bytes -= kept.size

    def _fetch(self, kept: Kept) -> None:
        # Before the other stream is entered: the memory is the computing stream's.
        tensor = torch.empty(kept.size, dtype=torch.uint8, device=self.device)
        host = kept.slot.memory[: kept.size]
        if self.inward is None:
            tensor.copy_(host)
        else:
            # Not before what had this memory until now, and not before the copy to the host, which that waited for.
            self.inward.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self.inward):
                tensor.copy_(host, non_blocking=True)
            kept.slot.used = kept.arrived = self.inward.record_event()
        kept.back = tensor.untyped_storage()
        self.coming.append(kept)

    def _fetch_layer_before(self, kept: Kept) -> None:
        """Send for the rest of this layer and for all of the one whose backward is next."""
        self._forget_the_used()
        before: int | None = None
        for place in range(len(self.order) - 1, -1, -1):
            other = self.order[place]()
            if other is None or other.group > kept.group:
                continue
            if other.group != kept.group:
                before = other.group if before is None else before
                if other.group != before:
                    return
            if other.source is None and other.back is None:
                self._fetch(other)


_STORES: dict[torch.device, HostStore] = {}


def store_of(device: torch.device) -> HostStore:
    """The one of a device."""
    if device not in _STORES:
        _STORES[device] = HostStore(device)
    return _STORES[device]


def settle_all() -> None:
    """`HostStore.settle`, of every device."""
    for store in _STORES.values():
        store.settle()


def link_bytes_per_second(device: torch.device) -> float:
    """What pinned memory gives and takes, in the slower direction, with whoever else uses the link now; CUDA alone."""
    nbytes, rounds = 2**26, 8
    store = store_of(device)
    slot, tensor = store.memory.take(nbytes), torch.empty(nbytes, dtype=torch.uint8, device=device)
    host, found = slot.memory[:nbytes], []
    for target, source in ((host, tensor), (tensor, host)):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        target.copy_(source, non_blocking=True)
        start.record()
        for _ in range(rounds):
            target.copy_(source, non_blocking=True)
        end.record()
        end.synchronize()
        found.append(rounds * nbytes / (start.elapsed_time(end) / 1e3))
    store.memory.give(slot)
    return min(found)


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
