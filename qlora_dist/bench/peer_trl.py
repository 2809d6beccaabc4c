"""TRL's SFTTrainer over a peer's model: its loop, collator and loss, timed from step begin to step end."""

import time
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch.utils.data import SequentialSampler
from transformers import AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from qlora_dist.bench.peer_process import LEAST_STEPS, figures
from qlora_dist.bench.peers import Job


class StepTimes(TrainerCallback):
    """Takes the time of each step up to its end on the device, and ends the run when the time is up."""

    def __init__(self, on_gpu: bool, least: int, deadline: float):
        self.on_gpu, self.least, self.deadline = on_gpu, least, deadline
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.started = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop it."""
        if self.on_gpu:
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.started)
        control.should_training_stop |= time.monotonic() > self.deadline and len(self.seconds) >= self.least

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Keep the loss."""
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))


def train(model: Any, job: Job, warm_up: int, steps: int, deadline: float) -> dict[str, Any]:
    """The steps by SFTTrainer with its defaults, but for what all peers share; figures as of `take_steps`."""
    on_gpu = job.device.startswith("cuda")
    input_ids_SBT = load_file(job.batches)["input_ids"]
    rows = Dataset.from_dict({"input_ids": input_ids_SBT.flatten(0, 1).tolist()})
    times = StepTimes(on_gpu, warm_up + LEAST_STEPS, deadline)
    config = SFTConfig(
        output_dir=str(job.batches.parent / "trl"), per_device_train_batch_size=input_ids_SBT.shape[1],
        max_steps=warm_up + steps, optim="adamw_8bit", learning_rate=1e-4, lr_scheduler_type="constant",
        logging_steps=1, report_to="none", save_strategy="no", max_length=job.max_length, disable_tqdm=True,
        bf16=True, use_cpu=not on_gpu, gradient_checkpointing=True, gradient_accumulation_steps=1,
        gradient_checkpointing_kwargs={"use_reentrant": False}, dataset_kwargs={"skip_prepare_dataset": True},
    )  # fmt: skip
    trainer = SFTTrainer(
        model=model, args=config, train_dataset=rows, processing_class=AutoTokenizer.from_pretrained(job.base),
        callbacks=[times],
    )  # fmt: skip
    # The batches as they were drawn for all; the trainer would shuffle their rows.
    trainer._get_train_sampler = lambda *_: SequentialSampler(rows)  # type: ignore[method-assign]
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    return figures(model, job, times.seconds, times.losses, warm_up, tuple(input_ids_SBT.shape[1:]))
