"""Random schedules of islands and of a coordinator that is killed anywhere: nothing is lost, nothing counted twice.

The world keeps what survives a kill (the log's lines, files) apart from what does not (the coordinator's state). Every
write to it may be the coordinator's last act, before it or after it. An "adapter" file holds how often each pack is in
it, so what a round really counted is seen in its files, not in the state machine's own books.
"""

import json
import random
from collections import Counter
from typing import Any

import pytest

from qlora_dist.coordinate import island_messages as say
from qlora_dist.coordinate.island_messages import Decision
from qlora_dist.coordinate.ranges import as_ranges, count
from qlora_dist.coordinate.rounds import Rounds, Terms

ISLANDS = "abc"


class Killed(Exception):
    """The coordinator ends here."""


class World:
    """The disk, the clock, three islands and a coordinator; every choice is drawn from `seed`.

    Args:
        kill_at: numbers of writes (before: 2 n, after: 2 n + 1) at which the coordinator is killed; None draws them.
    """

    def __init__(self, seed: int, kill_at: frozenset[int] | None = None):
        self.draw = random.Random(seed)
        self.fate = random.Random(seed + 1)
        self.kill_at = kill_at
        self.now, self.writes, self.kills, self.fenced, self.names = 0.0, 0, 0, 0, 0
        self.log: list[str] = []
        self.files: dict[str, Any] = {"adapter-start": []}
        self.terms = Terms(
            packs=self.draw.randint(40, 120),
            islands=self.draw.randint(1, 3),
            quorum=self.draw.choice([0.3, 0.6, 1.0]),
            deadline_s=20.0,
            start_timeout_s=5.0,
            late_rounds=self.draw.choice([0, 1, 2]),
            most_leases=self.draw.choice([1, 3, 9]),
            overlap=self.draw.random() < 0.4,
        )
        self.rounds = Rounds()
        self.sessions: dict[str, str] = {}
        self.works: dict[str, dict[str, Any]] = {}  # island -> the lease that it knows of
        self.ghosts: list[tuple[str, str, dict[str, Any]]] = []  # processes that will wake up when replaced

    # What survives a kill

    def _write(self, action: Any) -> None:
        for when in ("before", "after"):
            number = 2 * self.writes + (when == "after")
            if when == "after":
                action()
            if number in self.kill_at if self.kill_at is not None else self.fate.random() < 0.02:
                self.writes += 1
                raise Killed
        self.writes += 1

    def write_file(self, name: str, content: Any) -> None:
        self._write(lambda: self.files.update({name: json.loads(json.dumps(content))}))

    def take(self, decision: Decision) -> dict[str, Any]:
        for event in decision.events:
            self._write(lambda event=event: self.log.append(json.dumps(event)))
            self.rounds.apply(json.loads(self.log[-1]))
            self.check()
        return json.loads(json.dumps(decision.answer))

    def check(self) -> None:
        """Every pack is in exactly one place, and a replay of the log is the same state."""
        r = self.rounds
        held = [piece for one in [*r.leases.values(), *r.contributions.values()] for piece in one.pieces]
        everywhere = [*held, *r.free(self.terms.packs), *r.trained, *r.dropped]
        assert as_ranges(everywhere) == [(0, self.terms.packs)]  # raises where two overlap
        report = r.report(self.terms.packs)
        assert sum(value for name, value in report.items() if name.startswith("packs_")) == self.terms.packs

    def restart(self) -> None:
        before, self.kills = self.rounds, self.kills + 1
        self.rounds = replay(self.log)
        self.now += self.draw.choice([0.0, 1.0, 100.0])
        if not self._was_mid_event(before):
            assert self.rounds == before
        self.take(say.resume(self.rounds, self.now))

    def _was_mid_event(self, before: Rounds) -> bool:
        """Killed after its line was written and before it was applied: the replay is one event ahead."""
        return replay(self.log[:-1]) == before

    # What islands do

    def island_step(self, island: str) -> None:
        act = self.draw.random()
        session = self.sessions.get(island)
        if session is None or act < 0.05:  # starts, or is killed and starts again; the old process may wake up
            if session is not None and island in self.works:
                self.ghosts.append((island, session, self.works.pop(island)))
            self.names += 1
            self.sessions[island] = f"{island}{self.names}"
            self.take(say.join(self.rounds, self.terms, island, self.sessions[island], self.now))
        elif act < 0.07:
            self.take(say.leave(self.rounds, self.terms, island, session, "its node went away", self.now))
            self.works.pop(island, None)
            del self.sessions[island]
        elif island not in self.works:
            packs = self.draw.randint(1, 12)
            answer = self.take(say.lease(self.rounds, self.terms, island, session, packs, self.now))
            if answer["refused"] is not None:  # the coordinator was killed before it had taken down that it joined
                del self.sessions[island]
            elif answer["lease"] is not None:
                self.works[island] = answer
        elif act < 0.1:
            del self.works[island]  # it gives up on its lease: the next it asks for takes its place
        elif act < 0.75:
            self.send(island, session, self.works[island])
            if self.draw.random() < 0.1:
                self.send(island, session, self.works[island])
            del self.works[island]

    def send(self, island: str, session: str, work: dict[str, Any]) -> None:
        """Its file first, then the message; a part of the lease only, or something that is refused, now and then."""
        trained, name = work["ranges"], f"change-{work['lease']}-{session}"
        rest = random.Random(work["lease"])  # sent again it is the same
        if rest.random() < 0.2 and trained[0][1] - trained[0][0] > 1:
            trained = [[trained[0][0], rest.randint(trained[0][0] + 1, trained[0][1] - 1)]]
        self.write_file(name, trained)
        refused = f"island {island} sent numbers that are not finite" if rest.random() < 0.07 else None
        fields = {"trained": trained, "tokens": count(trained), "refused": refused, "file": name}
        self.take(say.contribute(self.rounds, self.terms, island, session, work["lease"], now=self.now, **fields))

    # What the coordinator does

    def coordinator_step(self) -> None:
        self.take(say.tick(self.rounds, self.terms, self.now))
        why = self.rounds.due(self.terms, self.now)
        if why is None:
            return
        number, collected = self.rounds.round, self.rounds.collect()
        for island in ISLANDS:  # others speak while the files are written
            if self.draw.random() < 0.2:
                self.island_step(island)
        base = self.files[self.current()]
        if self.draw.random() < 0.1:  # a second coordinator over the same log, at the same round
            self.coordinator_step()
        refused = {one.lease: "its norm" for one in collected[1:] if random.Random(-one.lease).random() < 0.3}
        counted = [one for one in collected if one.lease not in refused]
        self.names += 1
        name = f"adapter-{number}-{self.names}"
        self.write_file(name, base + [part for one in counted for part in self.files[one.facts["file"]]])
        ids = [one.lease for one in counted]
        commit = say.commit(self.rounds, self.terms, number, ids, refused, why, self.now, file=name)
        fenced = self.rounds.round != number
        self.fenced += fenced
        assert self.take(commit)["committed"] != fenced

    def current(self) -> str:
        return "adapter-start" if self.rounds.last is None else self.rounds.last["facts"]["file"]

    def run(self, most: int = 3000) -> None:
        for _ in range(most):
            if self.rounds.finished(self.terms.packs):
                break
            self.now += self.draw.choice([0.0, 1.0, 5.0])
            try:
                if self.draw.random() < 0.35:
                    self.coordinator_step()
                elif self.ghosts and self.draw.random() < 0.3:
                    self.send(*self.ghosts.pop())
                else:
                    self.island_step(self.draw.choice(ISLANDS))
            except Killed:
                while True:
                    try:
                        self.restart()
                        break
                    except Killed:
                        pass
        self.check_end()

    def check_end(self) -> None:
        events = [json.loads(line) for line in self.log]
        commits = [event for event in events if event["kind"] == "round_committed"]
        assert [event["round"] for event in commits] == list(range(len(commits))), "each round once, none left out"
        counted = [entry["lease"] for event in commits for entry in event["counted"]]
        assert len(counted) == len(set(counted))
        times = Counter(pack for start, end in self.files[self.current()] for pack in range(start, end))
        dropped = {pack for start, end in self.rounds.dropped for pack in range(start, end)}
        assert set(times.values()) <= {1}, "a pack was trained twice"
        assert times.keys() | dropped == set(range(self.terms.packs)), "a pack was lost"
        assert not times.keys() & dropped


def replay(log: list[str]) -> Rounds:
    rounds = Rounds()
    for line in log:
        rounds.apply(json.loads(line))
    return rounds


@pytest.mark.parametrize("seed", range(80))
def test_no_round_is_lost_or_counted_twice_and_every_pack_is_trained_once_or_reported(seed: int) -> None:
    world = World(seed)
    world.run()
    assert world.rounds.finished(world.terms.packs), "the schedule came to an end"


def test_the_schedules_have_in_them_what_they_are_for() -> None:
    seen: Counter[str] = Counter()
    for seed in range(80):
        world = World(seed)
        world.run()
        seen["kills"] += world.kills
        seen["fenced"] += world.fenced
        for event in (json.loads(line) for line in world.log):
            seen[event["kind"]] += 1
            if event["kind"] == "round_committed":
                seen[event["why"]] += 1
                seen["late"] += sum(entry["late"] > 0 for entry in event["counted"])
                seen["left out"] += len(event["refused"])
                seen["missed"] += len(event["missed"])
            seen["dropped"] += count(event.get("dropped", ()))
    least = dict.fromkeys(["everyone", "quorum", "deadline", "late", "left out", "missed", "dropped", "kills"], 40)
    least |= {"fenced": 20, "leases_ended": 5, "contribution_refused": 100, "island_left": 40, "rounds_resumed": 40}
    assert {name for name, number in least.items() if seen[name] < number} == set(), seen


@pytest.mark.parametrize("seed", [100, 103])
def test_the_coordinator_may_be_killed_at_every_point_of_a_schedule(seed: int) -> None:
    undisturbed = World(seed, kill_at=frozenset())
    undisturbed.run()
    assert undisturbed.kills == 0
    for point in range(2 * undisturbed.writes):
        world = World(seed, kill_at=frozenset({point}))
        world.run()
        assert world.kills == 1
        assert world.rounds.finished(world.terms.packs)
