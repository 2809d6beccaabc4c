"""Every error that a person can mend, by its code: the sentence and the mend. docs/errors.md is made from it."""

from qlora_dist.config.catalogue.adapter import ADAPTER
from qlora_dist.config.catalogue.aggregation import AGGREGATION
from qlora_dist.config.catalogue.benchmarks import BENCHMARKS
from qlora_dist.config.catalogue.checkpoint import CHECKPOINT
from qlora_dist.config.catalogue.configuration import CONFIGURATION
from qlora_dist.config.catalogue.contradictions import CONTRADICTIONS
from qlora_dist.config.catalogue.data import DATA
from qlora_dist.config.catalogue.entry import Mendable
from qlora_dist.config.catalogue.launching import LAUNCHING
from qlora_dist.config.catalogue.model import MODEL
from qlora_dist.config.catalogue.sharding import SHARDING
from qlora_dist.config.catalogue.tracking import TRACKING
from qlora_dist.config.catalogue.training import TRAINING

# In the order of docs/errors.md.
AREAS: dict[str, dict[str, Mendable]] = {
    "Configuration": CONFIGURATION,
    "Settings that do not go together": CONTRADICTIONS,
    "Launching and workers": LAUNCHING,
    "Training": TRAINING,
    "Sharding": SHARDING,
    "Data": DATA,
    "Base models": MODEL,
    "Adapters": ADAPTER,
    "Combining adapters": AGGREGATION,
    "Checkpoints and the run folder": CHECKPOINT,
    "Looking at runs": TRACKING,
    "Benchmarks": BENCHMARKS,
}
CATALOGUE: dict[str, Mendable] = {code: entry for area in AREAS.values() for code, entry in area.items()}


def told(code: str, /, **facts: object) -> str:
    """The sentence of the error `code`, with its mend.

    Raises:
        KeyError: there is no such code, or a fact is missing.
    """
    return CATALOGUE[code].told(**facts)
