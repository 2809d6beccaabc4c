"""Which ranks keep a synchronous run waiting. Pure: no clock of its own, no files.

All ranks of such a run take equally long for a step, so what tells them apart is the time that each spends outside
collectives. A rank may have more to compute than the others by chance (longer sequences): it is a straggler only if it
takes longer for a step and for a position of it.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

# Slower than the usual rank by this factor, and by so many seconds a step, is slow; below the second factor is well.
SLOW, WELL = 1.2, 1.1
LEAST_EXCESS_S = 0.005
# A verdict for each round of so many seconds in which every rank has told of a step, and so many of them in a row.
ROUND_S = 2.0
ROUNDS = 3
LOOK = "look there at clocks and temperatures, at other processes, at swapping and at storage"
Counts = tuple[float, float, float]  # seconds outside collectives, steps, positions; since the attempt began


@dataclass
class Standing:
    """One rank: its counts when the round began and now, and how many rounds in a row it was slow or well."""

    began: Counts
    now: Counts
    slow: int = 0
    well: int = 0
    slow_since: float = 0.0

    def of_round(self) -> Counts:
        """The counts of this round alone."""
        seconds, steps, positions = (now - began for now, began in zip(self.now, self.began, strict=True))
        return seconds, steps, positions


@dataclass
class Stragglers:
    """The verdict on the ranks of one generation.

    Attributes:
        members: one {rank, host, pid} a rank.
        named: rank -> what is told of it, for those that are slow at the moment.
        busy_s: rank -> seconds a step outside collectives in the last round.
    """

    members: Sequence[dict[str, Any]] = ()
    standings: dict[int, Standing] = field(default_factory=dict)
    round_began: float = 0.0
    named: dict[int, dict[str, Any]] = field(default_factory=dict)
    busy_s: dict[int, float] = field(default_factory=dict)

    def take(self, rank: int, now: float, counts: Sequence[float]) -> list[dict[str, Any]]:
        """Take in a rank's counts at time `now`; what has changed, as fields of events, oftenest nothing.

        Returns:
            {rank, host, pid, busy_s, usual_s, over: whether it is one no longer, message} a rank.
        """
        seconds, steps, positions = counts
        if rank not in self.standings:
            self.standings[rank] = Standing((seconds, steps, positions), (seconds, steps, positions))
            self.round_began = now
            return []
        self.standings[rank].now = (seconds, steps, positions)
        told = len(self.standings) == len(self.members) > 1
        if not told or now - self.round_began < ROUND_S or any(s.of_round()[1] < 1 for s in self.standings.values()):
            return []
        return self._judge(now)

    def _judge(self, now: float) -> list[dict[str, Any]]:
        rounds = {rank: standing.of_round() for rank, standing in self.standings.items()}
        self.busy_s = {rank: seconds / steps for rank, (seconds, steps, _) in rounds.items()}
        per_position = {rank: seconds / max(positions, 1) for rank, (seconds, _, positions) in rounds.items()}
        # The lower of two middle ones: of two ranks the faster, and of two hosts one that is well.
        usual_s = statistics.median_low(self.busy_s.values())
        usual_position_s = statistics.median_low(per_position.values())
        changes = []
        for member in self.members:
            rank = member["rank"]
            busy_s, standing = self.busy_s[rank], self.standings[rank]
            ratio = min(busy_s / max(usual_s, 1e-9), per_position[rank] / max(usual_position_s, 1e-12))
            slow = ratio > SLOW and busy_s - usual_s > LEAST_EXCESS_S
            if slow and not standing.slow:
                standing.slow_since = self.round_began
            standing.slow = standing.slow + 1 if slow else 0
            standing.well = standing.well + 1 if ratio < WELL or busy_s - usual_s < LEAST_EXCESS_S else 0
            facts = {**member, "busy_s": busy_s, "usual_s": usual_s}
            if rank in self.named:
                if standing.well >= ROUNDS:
                    del self.named[rank]
                    changes.append({**facts, "over": True, "message": self._well_again(facts)})
                elif slow:
                    self.named[rank] = facts | {"sentence": self._sentence(facts)}
            elif standing.slow >= ROUNDS:
                sentence = self._sentence(facts)
                self.named[rank] = facts | {"sentence": sentence}
                seconds = now - standing.slow_since
                changes.append({**facts, "over": False, "message": f"{sentence}, for {seconds:.0f} s now: {LOOK}"})
            standing.began = standing.now
        self.round_began = now
        return changes

    def _sentence(self, facts: dict[str, Any]) -> str:
        usual = "the other rank's" if len(self.members) == 2 else "the usual rank's"
        return (
            f"rank {facts['rank']} (host {facts['host']}, pid {facts['pid']}) keeps the others waiting: it takes "
            f"{facts['busy_s']:.3g} s a step outside collectives, {facts['busy_s'] / max(facts['usual_s'], 1e-9):.1f} "
            f"times {usual} {facts['usual_s']:.3g} s"
        )

    def _well_again(self, facts: dict[str, Any]) -> str:
        return (
            f"rank {facts['rank']} (host {facts['host']}) no longer keeps the others waiting: {facts['busy_s']:.3g} s "
            f"a step outside collectives, the others {facts['usual_s']:.3g} s"
        )
