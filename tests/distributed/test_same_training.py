"""One, two and three workers train what a plain transformers + PEFT loop trains, step by step.

The ranks hold unequal numbers of loss-bearing tokens, and seven packs a batch in micro-batches of two leave a rank of
three with a padded micro-batch. Everything is fp32 on the CPU. The sums are taken in other orders, so single steps
differ by about 1e-7 relative, and 20 steps of an optimizer carry that along; 1e-4 leaves room for that and is far
below the effect of any wrong scale, which is a factor.
"""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, get_scheduler

from qlora_dist.config.schema import RunConfig
from tests.distributed.group import series, train_in_group

STEPS, BATCH, ROWS = 20, 7, 31
OPTIMS = ("adamw_torch", "sgd")
LEARNING_RATE = {"adamw_torch": 1e-3, "sgd": 0.1}
CLIP = 0.5
QUESTIONS = ["what is three and four", "list the files", "what is the capital of France, and of what is Paris it"]


def rows() -> list[dict[str, str]]:
    """Questions and answers of very different lengths."""
    return [
        {
            "question": QUESTIONS[n % 3] + "?" * (n % 5),
            "answer": " ".join(["multiply by", "3 + 4 = 7"][: 1 + n % 2] * (1 + n * n % 11)),
        }
        for n in range(ROWS)
    ]


def nf4_base(folder: Path) -> torch.nn.Module:
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=quantization, device_map={"": "cpu"}
    )


@pytest.fixture(scope="module")
def first_adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PEFT adapter made by stock PEFT in which neither factor is zero, so that both have gradients at once."""
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(5)
    model = get_peft_model(
        nf4_base(tiny_model),
        LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"),
    )
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def runs(tiny_model: Path, first_adapter: Path, tmp_path_factory: pytest.TempPathFactory):
    """A function that trains with so many workers (once) and returns {(optim, metric): {step: value}}."""
    data = tmp_path_factory.mktemp("data") / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows()))

    @cache
    def train(world_size: int, sabotage=None, steps: int = STEPS) -> dict[tuple[str, str], dict[int, float]]:
        folder = tmp_path_factory.mktemp(f"world{world_size}")
        configs = [
            RunConfig.model_validate(
                {
                    "output_dir": folder / optim,
                    "model": {"name": str(tiny_model), "compute_dtype": "fp32"},
                    "adapter": {"path": first_adapter},
                    "data": {"train": str(data), "shuffle": False},
                    "train": {
                        "max_steps": steps, "global_batch_size": BATCH, "per_device_train_batch_size": 2,
                        "learning_rate": LEARNING_RATE[optim], "lr_scheduler_type": "linear", "warmup_steps": 3,
                        "optim": optim, "weight_decay": 0.01 if optim == "adamw_torch" else 0.0, "max_grad_norm": CLIP,
                    },
                    "launch": {"backend": "torchrun", "num_workers": world_size},
                }
            )
            for optim in OPTIMS
        ]  # fmt: skip
        outcomes = train_in_group(configs, world_size, sabotage)
        assert all(outcome["state"] == "finished" for outcome in outcomes), outcomes
        return {(optim, metric): series(folder / optim, metric) for optim in OPTIMS for metric in ("loss", "grad_norm")}

    return train


def examples_of(base: Path) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The rows' token ids and labels, each [1, T], by stock transformers: only answers bear loss."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    examples = []
    for row in rows():
        question = [{"role": "user", "content": row["question"]}]
        exchange = [*question, {"role": "assistant", "content": row["answer"]}]
        whole = tokenizer.apply_chat_template(exchange, tokenize=False)
        prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
        encoded = tokenizer(whole, return_offsets_mapping=True, add_special_tokens=False)
        # The answer and the mark that ends it bear loss; the newline that the template puts after it does not.
        labels = [
            token if start >= len(prompt) and start < len(whole.rstrip()) else -100
            for token, (start, _) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        ]
        examples.append((torch.tensor([encoded["input_ids"]]), torch.tensor([labels])))
    return examples


def plain_loop(base: Path, adapter: Path, optim: str) -> tuple[list[float], list[float]]:
    """Transformers and PEFT, one row at a time, nothing of this project: losses and norms before clipping."""
    # In evaluation bitsandbytes would compute in bf16 on CPUs that have it.
    model = PeftModel.from_pretrained(nf4_base(base), adapter, is_trainable=True).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    rate = LEARNING_RATE[optim]
    optimizer = (
        torch.optim.AdamW(trained, lr=rate, weight_decay=0.01) if optim == "adamw_torch"
        else torch.optim.SGD(trained, lr=rate)
    )  # fmt: skip
    scheduler = get_scheduler("linear", optimizer, 3, STEPS)
    examples = examples_of(base)
    losses, norms = [], []
    starts = [start for _ in range(STEPS) for start in range(0, ROWS, BATCH)][:STEPS]
    for start in starts:
        batch = examples[start : start + BATCH]
        count = sum(int((labels[:, 1:] != -100).sum()) for _, labels in batch)
        total = 0.0
        for ids, labels in batch:
            logits = model(input_ids=ids).logits[:, :-1]
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
            )
            (loss / count).backward()
            total += loss.item() / count
        losses.append(total)
        norms.append(torch.nn.utils.clip_grad_norm_(trained, CLIP).item())
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return losses, norms


def worst_difference(ours: dict[int, float], reference: list[float]) -> float:
    assert list(ours) == list(range(1, len(reference) + 1))
    return max(abs(ours[step + 1] - value) / abs(value) for step, value in enumerate(reference))


@pytest.fixture(scope="module")
def references(tiny_model: Path, first_adapter: Path) -> dict[str, tuple[list[float], list[float]]]:
    return {optim: plain_loop(tiny_model, first_adapter, optim) for optim in OPTIMS}


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_losses_and_gradient_norms_are_the_plain_loops(runs, references, world_size: int) -> None:
    found = runs(world_size)
    for optim in OPTIMS:
        losses, norms = references[optim]
        assert max(norms) > CLIP > min(norms) or min(norms) > CLIP, "clipping is to be at work in this test"
        assert losses[-1] < losses[0], "the reference is to learn something"
        assert worst_difference(found[optim, "loss"], losses) < 1e-4
        assert worst_difference(found[optim, "grad_norm"], norms) < 1e-4


def leave_out_the_all_reduce(rank: int) -> None:
    from qlora_dist.shard import ddp

    class Nothing:
        def wait(self) -> None:
            pass

    ddp.Bucket.start = lambda bucket: setattr(bucket, "work", Nothing())


def average_instead_of_sum(rank: int) -> None:
    from qlora_dist.shard import ddp

    start = ddp.Bucket.start
    ddp.Bucket.start = lambda bucket: (bucket.flat.div_(2), start(bucket))[1]


@pytest.mark.parametrize("sabotage", [leave_out_the_all_reduce, average_instead_of_sum])
def test_the_comparison_sees_a_missing_all_reduce_and_a_wrong_scale(runs, references, sabotage) -> None:
    found = runs(2, sabotage, steps=4)
    for optim in OPTIMS:
        # The schedule of four steps takes another course after the second.
        first_two = {step: found[optim, "grad_norm"][step] for step in (1, 2)}
        assert worst_difference(first_two, references[optim][1][:2]) > 1e-2
