"""Learning-rate schedules by transformers' names, as pure functions of the step."""

import math
from collections.abc import Callable

import torch

from qlora_dist.config.schema import TrainConfig


def build_schedule(config: TrainConfig, total_steps: int) -> Callable[[int], float]:
    """A function from the number of steps already taken to the learning rate of the next one.

    The factors are transformers' own (`get_scheduler`), taken from a scheduler over a stand-in parameter, so that
    nothing has to be saved or replayed at a resume.

    Args:
        total_steps: optimizer steps of the whole run, warm-up included.
    """
    # Imports bitsandbytes, which talks while doing so; the model room has it muted by now.
    from transformers import get_scheduler

    warmup = config.warmup_steps or math.ceil(config.warmup_ratio * total_steps)
    stand_in = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.learning_rate)
    scheduler = get_scheduler(config.lr_scheduler_type, stand_in, warmup, total_steps)
    (factor,) = scheduler.lr_lambdas
    return lambda steps_taken: config.learning_rate * factor(steps_taken)
