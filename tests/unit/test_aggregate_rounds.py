"""Leases, messages, checks and the outer step together: islands train a small low-rank regression."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora_dist.aggregate.changes import Tensors, apply_change, change_of
from qlora_dist.aggregate.exchange import Encoder, Header, as_contribution, decode
from qlora_dist.aggregate.outer import OuterSettings, OuterState, outer_step
from qlora_dist.aggregate.safety import refuse, refuse_round
from qlora_dist.coordinate import island_messages as say
from qlora_dist.coordinate.island_messages import Decision
from qlora_dist.coordinate.ranges import count
from qlora_dist.coordinate.rounds import Rounds, Terms

A, B = "q.lora_A.weight", "q.lora_B.weight"
BASE, BATCH, SYNC_EVERY, PACKS = "f" * 64, 2, 10, 800


def new_adapter() -> Tensors:
    return {A: torch.randn(4, 24, generator=torch.Generator().manual_seed(0)) / 5, B: torch.zeros(16, 4)}


def target() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(16, 4, generator=generator) @ torch.randn(4, 24, generator=generator) / 5


def loss_of(adapter: Tensors, packs: list[int]) -> Tensor:
    """Mean squared error on packs of 8 rows each; negative numbers are held-out packs."""
    losses = []
    for pack in packs:
        generator = torch.Generator().manual_seed(10_000 + pack)
        x = torch.randn(8, 24, generator=generator)
        y = x @ target().T + 0.3 * torch.randn(8, 16, generator=generator)
        losses.append((x @ adapter[A].T @ adapter[B].T - y).square().mean())
    return torch.stack(losses).mean()


def held_out(adapter: Tensors) -> float:
    return float(loss_of(adapter, list(range(-64, 0))).detach())


@dataclass
class Trainer:
    """An adapter under Adam, whose moments outlive rounds."""

    parameters: Tensors = field(default_factory=lambda: {n: t.requires_grad_() for n, t in new_adapter().items()})

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.Adam(self.parameters.values(), lr=0.01)

    def train(self, packs: list[int], batch: int) -> None:
        for start in range(0, len(packs), batch):
            self.optimizer.zero_grad()
            loss_of(self.parameters, packs[start : start + batch]).backward()
            self.optimizer.step()

    def take(self, adapter: Tensors, reset: list[str]) -> None:
        with torch.no_grad():
            for name, tensor in adapter.items():
                self.parameters[name].copy_(tensor)
                if name in reset:
                    self.optimizer.state[self.parameters[name]].clear()


def islands_train(method: Any, bits: Any) -> tuple[Tensors, Rounds, list[int]]:
    """The adapter, the rounds and the bytes of every message; island `b` sends a NaN once, half of a lease once."""
    terms, rounds = Terms(packs=PACKS, islands=2), Rounds()

    def take(decision: Decision) -> dict[str, Any]:
        for event in decision.events:
            rounds.apply(event)
        return decision.answer

    exact, shared, state, moved = new_adapter(), new_adapter(), OuterState(), []
    islands = {name: (Trainer(), Encoder(bits)) for name in "ab"}
    down = Encoder(bits)
    for name in islands:
        take(say.join(rounds, terms, name, name, 0.0))
    while not rounds.finished(PACKS):
        files = {}
        for name, (trainer, up) in islands.items():
            lease = take(say.lease(rounds, terms, name, name, BATCH * SYNC_EVERY, 0.0))
            if lease["lease"] is None:
                continue
            trained = lease["ranges"]
            if (name, rounds.round) == ("b", 3):
                trained = [[trained[0][0], trained[0][0] + 10]]
            trainer.train([pack for start, end in trained for pack in range(start, end)], BATCH)
            change = change_of(trainer.parameters, shared)
            if (name, rounds.round) == ("b", 5):
                change[A][0, 0] = float("nan")
            header = Header("change", name, lease["round"], lease["lease"], 8 * count(trained), BASE)
            data, _ = up.encode(change, header)
            moved.append(len(data))
            message = as_contribution(decode(data))
            reason = refuse(message, shared, BASE)
            answer = take(
                say.contribute(rounds, terms, name, name, message.lease, trained, message.tokens, 0.0, refused=reason)
            )
            assert answer["accepted"] == (reason is None)
            files[message.lease] = data
        if (why := rounds.due(terms, 1e9)) is None:
            continue
        collected = [
            as_contribution(decode(files[one.lease]), say.discount(rounds, terms, one)) for one in rounds.collect()
        ]
        refused = refuse_round(collected, shared, BASE, state.known_norms())
        counted = [one for one in collected if one.lease not in refused]
        outcome = outer_step(OuterSettings(method=method, outer_momentum=0.6), state, exact, counted)
        header = Header("change", "", rounds.round, 0, 0, BASE)
        data, decoded = down.encode(change_of(outcome.adapter, exact), header)
        exact, state = outcome.adapter, outcome.state
        take(say.commit(rounds, terms, rounds.round, [one.lease for one in counted], refused, why, 0.0))
        shared = apply_change(shared, decoded)
        for trainer, up in islands.values():
            trainer.take(shared, outcome.reset)
            up.forget(outcome.reset)
            moved.append(len(data))
    return exact, rounds, moved


@pytest.mark.parametrize("method", ["mean", "diloco", "svd"])
@pytest.mark.parametrize("bits", [4, 32])
def test_islands_learn_what_data_parallel_training_learns(method: str, bits: int) -> None:
    ddp = Trainer()
    ddp.train(list(range(PACKS)), 2 * BATCH)
    reference, start = held_out(ddp.parameters), held_out(new_adapter())
    adapter, rounds, moved = islands_train(method, bits)
    assert rounds.trained == [(0, PACKS)], "what was refused or left over was trained in another round"
    assert rounds.dropped == []
    assert rounds.round == 21, "20 of two full leases, one more for the NaN's packs and the rest of the half lease"
    # Both end at the noise of the targets (0.09); it is a check that the parts fit, not a claim about methods.
    assert reference < 0.03 * start
    assert held_out(adapter) < 1.03 * reference
    assert max(moved) < {4: 700, 32: 1300}[bits], "160 elements: mostly header"
