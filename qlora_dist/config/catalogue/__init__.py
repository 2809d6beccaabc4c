"""Every error that a person can mend, by its code: the sentence and the mend. docs/errors.md is made from it."""

from qlora_dist.config.catalogue.checkpoint import CHECKPOINT
from qlora_dist.config.catalogue.data import DATA
from qlora_dist.config.catalogue.entry import Mendable

# In the order of docs/errors.md.
AREAS: dict[str, dict[str, Mendable]] = {
    "Data": DATA,
    "Checkpoints and the run folder": CHECKPOINT,
}
CATALOGUE: dict[str, Mendable] = {code: entry for area in AREAS.values() for code, entry in area.items()}


def told(code: str, /, **facts: object) -> str:
    """The sentence of the error `code`, with its mend.

    Raises:
        KeyError: there is no such code, or a fact is missing.
    """
    return CATALOGUE[code].told(**facts)
