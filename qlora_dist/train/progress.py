"""What a run knows of its own course: part of every checkpoint, the same on every rank."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from qlora_dist.config.schema import EvalConfig
from qlora_dist.data.order import Position
from qlora_dist.train.step import LossScale


@dataclass
class Progress:
    """Counters after `step` optimizer steps.

    bad_steps: non-finite steps in a row; skipped_steps: of the whole run.
    best_eval_loss, best_step: of the lowest held-out loss so far; stale_evals: evaluations since without improvement.
    """

    step: int = 0
    position: Position = field(default_factory=Position)
    loss_scale: LossScale = field(default_factory=LossScale)
    bad_steps: int = 0
    skipped_steps: int = 0
    best_eval_loss: float = math.inf
    best_step: int = 0
    stale_evals: int = 0

    def note_evaluation(self, eval_loss: float, config: EvalConfig) -> bool:
        """Take in a held-out loss; True where it is the best so far."""
        enough = eval_loss < self.best_eval_loss - config.early_stopping_threshold
        self.stale_evals = 0 if enough else self.stale_evals + 1
        best = eval_loss < self.best_eval_loss
        if best:
            self.best_eval_loss, self.best_step = eval_loss, self.step
        return best

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; an infinity becomes None."""
        values = asdict(self) | {"position": self.position.to_dict()}
        return values | {"best_eval_loss": self.best_eval_loss if math.isfinite(self.best_eval_loss) else None}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Progress":
        """What `to_dict` gave."""
        best = values["best_eval_loss"]
        return cls(
            **values
            | {
                "position": Position.from_dict(values["position"]),
                "loss_scale": LossScale(**values["loss_scale"]),
                "best_eval_loss": math.inf if best is None else best,
            }
        )
