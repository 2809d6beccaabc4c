"""Which layers' activations wait in host memory: copies that hide behind the forward, before anything is recomputed."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from qlora_dist.plan.activations import BYTES_PER_SECOND, KINDS, Choice, Gain, HostKind, Kind, by_worth, choose, fill

# On the device there are so many layers' copies at a time, leaving in the forward and coming back in the backward.
LAYERS_UNDER_WAY = 2
# Of the link's measured rate what copies beside a computation get; of a link that nobody has measured (8 lanes of
# PCIe 4.0), bytes a second.
LINK_SHARE, SLOW_LINK = 0.95, 12e9
# A backward takes at least as many times its forward.
BACKWARD = 2.0
# As many counts of layers are tried, of each thing that can be on the host.
COUNTS = 40


@dataclass(frozen=True)
class Link:
    """Between a device and its host.

    bytes_per_second: of the slower direction. forward_seconds: a layer's forward, behind which copies hide.
    host_bytes: what may be on the host at a time.
    """

    bytes_per_second: float
    forward_seconds: float
    host_bytes: float


@dataclass(frozen=True)
class Placed:
    """A plan of all layers, and what is predicted of it.

    size: bytes of the device beyond what the leanest plan without the host takes; may be negative.
    saved: seconds of a micro-batch against that plan. waited: of these spent, for copies that do not hide.
    copied: bytes to the host, of a micro-batch.
    """

    choices: list[Choice]
    size: float
    saved: float
    waited: float = 0.0
    copied: float = 0.0


def place(
    layers: Sequence[dict[Kind, Gain]],
    inputs: Sequence[int],
    room: float,
    link: Link | None = None,
    kinds: Iterable[Kind] = KINDS,
) -> Placed:
    """The plan that saves the most time within `room`; the leanest there is where none fits.

    All counts of layers whose attention, and whose input, waits on the host are tried, evenly spread so that the link
    is evenly used; `choose` fills what is left of the room. So more room is never predicted slower.

    Args:
        inputs: bytes of each layer's input.
        room: bytes of the device beyond what the leanest plan without the host takes; negative where that is too much.
        link: None where nothing may go to the host.
        kinds: what may be kept.
    """
    allowed = frozenset(kinds)
    best = plain = on_device(layers, room, allowed)
    wanted = by_worth(layers, allowed)
    if link is None or link.bytes_per_second <= 0 or link.forward_seconds <= 0:
        return plain
    for attention in _counts(len(layers) if "attention" in allowed else 0):
        for count in _counts(len(layers)):
            if not attention and not count:
                continue
            hosted = spread(len(layers), attention, count)
            found = _with_host(layers, inputs, hosted, room, link, wanted)
            if found is not None and _rank(found, room) > _rank(best, room):
                best = found
    return best


def on_device(layers: Sequence[dict[Kind, Gain]], room: float, kinds: Iterable[Kind] = KINDS) -> Placed:
    """The plan that leaves the host out."""
    choices: list[Choice] = [frozenset(kept) for kept in choose(layers, max(room, 0.0), kinds)]
    return Placed(choices, *_worth(layers, choices))


def spread(layers: int, attention: int, inputs: int) -> list[frozenset[HostKind]]:
    """What of each layer is on the host: attention evenly, inputs first where attention stays, then evenly too."""
    hosted: list[set[HostKind]] = [set() for _ in range(layers)]
    for number in range(attention):
        hosted[number * layers // attention].add("attention_on_host")
    for group in ([n for n in range(layers) if not hosted[n]], [n for n in range(layers) if hosted[n]]):
        count = min(inputs, len(group))
        for number in range(count):
            hosted[group[number * len(group) // count]].add("input_on_host")
        inputs -= count
    return [frozenset(one) for one in hosted]


def waited_seconds(copied: Sequence[float], link: Link) -> float:
    """What a forward and its backward wait for copies of so many bytes a layer.

    A layer's copy begins at the end of its forward, after those before it; a layer begins once no more is under way,
    its own included, than `LAYERS_UNDER_WAY` times the largest layer's. What is left after the last layer hides behind
    the head, and is still on the device when it is needed. A copy back has the backward of the layer after it.
    """
    rate, most = link.bytes_per_second * LINK_SHARE, LAYERS_UNDER_WAY * max(copied, default=0.0)
    waited = clock = free_at = under_way = 0.0
    leaving: deque[tuple[float, float]] = deque()
    for size in copied:
        under_way += size
        while under_way > most:
            end, oldest = leaving.popleft()
            waited, clock = waited + max(0.0, end - clock), max(clock, end)
            under_way -= oldest
        clock += link.forward_seconds
        free_at = max(free_at, clock) + size / rate
        leaving.append((free_at, size))
    return waited + sum(max(0.0, size / rate - BACKWARD * link.forward_seconds) for size in copied)


def describe_worth(placed: Placed, link: Link | None) -> str:
    """What is predicted, for a person: the milliseconds that the plan saves, and what the link does for them."""
    saved = f"{1e3 * placed.saved:.0f} ms a micro-batch less than all recomputed, as predicted"
    if not placed.copied or link is None:
        return saved
    return (
        f"{saved}, with {1e3 * placed.waited:.0f} ms of waiting ({placed.copied / 2**30:.1f} GiB at "
        f"{link.bytes_per_second / 1e9:.0f} GB/s, a layer's forward {1e3 * link.forward_seconds:.1f} ms)"
    )


def _with_host(
    layers: Sequence[dict[Kind, Gain]],
    inputs: Sequence[int],
    hosted: Sequence[frozenset[HostKind]],
    room: float,
    link: Link,
    wanted: Sequence[tuple[int, Kind, int]],
) -> Placed | None:
    """The rest of the room filled; None where the host has too little memory."""
    elsewhere = ["attention_on_host" in one for one in hosted]
    from_inputs = [size if "input_on_host" in one else 0 for size, one in zip(inputs, hosted, strict=True)]
    away = [
        layer["attention"].size - layer["attention"].stays if is_so else 0
        for layer, is_so in zip(layers, elsewhere, strict=True)
    ]
    copied = [size + other for size, other in zip(from_inputs, away, strict=True)]
    if sum(copied) > link.host_bytes:
        return None
    stays = sum(layer["attention"].stays for layer, is_so in zip(layers, elsewhere, strict=True) if is_so)
    taken = LAYERS_UNDER_WAY * max(copied) - sum(from_inputs)
    kept = fill(wanted, elsewhere, room - taken - stays)
    size, saved = _worth(layers, kept)
    size -= sum(away)
    waited = waited_seconds(copied, link)
    # Copies take a share of the device's memory bandwidth, out and back.
    cost = waited + 2 * sum(copied) / BYTES_PER_SECOND
    choices = [Choice(one) | Choice(other) for one, other in zip(kept, hosted, strict=True)]
    return Placed(choices, size + taken, saved - cost, waited, sum(copied))


def _rank(placed: Placed, room: float) -> tuple[bool, float, float]:
    """Plans that fit first, the fastest of them; else the smallest."""
    fits = placed.size <= room
    return fits, placed.saved if fits else -placed.size, -placed.copied


def _worth(layers: Sequence[dict[Kind, Gain]], choices: Sequence[Choice]) -> tuple[float, float]:
    """Bytes of the device, and seconds."""
    gains = [layer[kind] for layer, choice in zip(layers, choices, strict=True) for kind in KINDS if kind in choice]
    return sum(gain.size for gain in gains), sum(gain.seconds for gain in gains)


def _counts(most: int) -> Iterator[int]:
    """0 to `most`, all of them where they are few."""
    step = max(1, -(-most // COUNTS))
    yield from range(0, most, step)
    yield most
