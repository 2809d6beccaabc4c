"""How base weights reach one rank among those of its node, and where they go; the loader knows no more than this."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch

from qlora_dist.model.tensors import LazyTensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")


class Placement(Protocol):
    """Given to the loader from outside. All ranks of a node load the same base, call the same methods in turn."""

    @property
    def splits_work(self) -> bool:
        """Whether other ranks wait for this one to read, or the model is not kept whole here."""

    def once(self, make: Callable[[], T]) -> T:
        """What `make` gives on the one rank of the node that reads, on all of them; it has to be small.

        Raises:
            UserError: on all ranks, where `make` raises it on that one.
        """

    def share(self, find: Callable[[], dict[str, LazyTensor]], device: torch.device) -> dict[str, LazyTensor]:
        """The tensors that `find` names on the rank that reads, which makes them; the others are sent them.

        The ranks have to ask for the same tensors in the same order.

        Args:
            device: where the tensors go on their way to the others.

        Raises:
            UserError: as for `once`; also by a tensor that is asked for.
        """

    def filling(self, model: "PreTrainedModel") -> None:
        """Take up what is filled so far; called before each tensor of `model` is made."""

    def filled(self, model: "PreTrainedModel") -> None:
        """Take up the rest: every weight is there, those that are tied are the same."""


class Alone:
    """One rank that reads all and keeps all."""

    splits_work = False

    def once(self, make: Callable[[], T]) -> T:
        """See `Placement.once`."""
        return make()

    def share(self, find: Callable[[], dict[str, LazyTensor]], device: torch.device) -> dict[str, LazyTensor]:
        """See `Placement.share`."""
        return find()

    def filling(self, model: "PreTrainedModel") -> None:
        """See `Placement.filling`."""

    def filled(self, model: "PreTrainedModel") -> None:
        """See `Placement.filled`."""
