"""What a person's DeepSpeed JSON may say, and what it may not."""

import json
from pathlib import Path
from typing import Any

import pytest

from qlora_dist.config.deepspeed import deepspeed_settings
from qlora_dist.config.errors import UserError
from qlora_dist.config.load import load_config, to_yaml, with_absolute_paths
from qlora_dist.config.schema import RunConfig


def config_with(theirs: Any, folder: Path, strategy: str = "zero3", **shard: Any) -> RunConfig:
    file = folder / "ds.json"
    file.write_text(theirs if isinstance(theirs, str) else json.dumps(theirs))
    return RunConfig.model_validate(
        {
            "model": {"name": "m"},
            "data": {"train": "bundled:home_commands"},
            "train": {"global_batch_size": 16, "per_device_train_batch_size": 2, "max_grad_norm": 0.5},
            "launch": {"num_workers": 4},
            "shard": {"strategy": strategy, "deepspeed_config": str(file)} | shard,
        }
    )


def test_what_only_speeds_up_is_merged(tmp_path: Path) -> None:
    zero = {"stage": 3, "reduce_bucket_size": 5000, "stage3_prefetch_bucket_size": "auto", "overlap_comm": False}
    settings = deepspeed_settings(config_with({"zero_optimization": zero, "wall_clock_breakdown": True}, tmp_path))
    ours = deepspeed_settings(config_with({}, tmp_path))
    assert settings["wall_clock_breakdown"] is True
    assert settings["zero_optimization"] == ours["zero_optimization"] | {
        "reduce_bucket_size": 5000, "overlap_comm": False
    }  # fmt: skip


def test_what_trainer_users_have_in_their_file_is_taken_where_it_says_the_same(tmp_path: Path) -> None:
    same = {
        "train_batch_size": 16,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.5,
        "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000},
        "bf16": {"enabled": False},
    }
    assert deepspeed_settings(config_with(same, tmp_path)) == deepspeed_settings(config_with({}, tmp_path))


def test_accumulation_is_that_of_the_most_workers_as_the_global_batch_is(tmp_path: Path) -> None:
    config = config_with({"gradient_accumulation_steps": 2, "train_batch_size": 16}, tmp_path)
    config.launch.num_workers = [1, 4]
    assert deepspeed_settings(config)
    config.launch.num_workers = [1, 2]
    with pytest.raises(UserError, match="gradient_accumulation_steps is 2 there and 4 here"):
        deepspeed_settings(config)


@pytest.mark.parametrize(
    ("theirs", "key"),
    [
        ({"zero_optimization": {"stage": 2}}, "zero_optimization.stage is 2 there and 3 here"),
        ({"gradient_clipping": 1.0}, "gradient_clipping is 1.0 there and 0.5 here"),
        ({"train_micro_batch_size_per_gpu": 4}, "train_micro_batch_size_per_gpu is 4 there and 2 here"),
        ({"gradient_accumulation_steps": 3}, "gradient_accumulation_steps is 3 there and 2 here"),
        ({"bf16": {"enabled": True}}, "bf16.enabled is true there and false here"),
        ({"zero_optimization": {"offload_param": {"device": "cpu"}}}, 'offload_param.device is "cpu" there and "none"'),
        ({"zero_optimization": {"round_robin_gradients": True}}, "round_robin_gradients is true there and false here"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}, "optimizer.type is nothing that the JSON file"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler.type is nothing"),
        ({"zero_optimization": {"zenflow": {"topk_ratio": 0.1}}}, "zero_optimization.zenflow.topk_ratio is nothing"),
        ({"zero_optimization": 3}, "zero_optimization is 3 there"),
        ("[1, 2]", "cannot be read as DeepSpeed's JSON (it is no JSON object)"),
        ("{", "cannot be read as DeepSpeed's JSON (Expecting"),
    ],
)
def test_what_contradicts_ours_is_refused_by_its_name(theirs: Any, key: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        deepspeed_settings(config_with(theirs, tmp_path))
    assert refused.value.message.startswith("shard.deepspeed_config: ")
    assert key in refused.value.message


def test_a_contradiction_is_seen_when_the_configuration_is_read(tmp_path: Path) -> None:
    config = config_with({"gradient_clipping": 9.0}, tmp_path)
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    with pytest.raises(UserError, match=r"gradient_clipping is 9\.0 there"):
        load_config(tmp_path / "run.yaml")
    load_config(tmp_path / "run.yaml", ["train.max_grad_norm=9"])


def test_workers_find_the_file_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_with({}, tmp_path)
    monkeypatch.chdir(tmp_path)
    config.shard.deepspeed_config = Path("ds.json")
    assert with_absolute_paths(config).shard.deepspeed_config == tmp_path / "ds.json"


def test_offload_is_deepspeeds_offload(tmp_path: Path) -> None:
    zero = deepspeed_settings(config_with({}, tmp_path, offload=["optimizer", "shards"]))["zero_optimization"]
    assert zero["offload_optimizer"] == zero["offload_param"] == {"device": "cpu", "pin_memory": True}
    with pytest.raises(UserError, match="zero2 keeps the base whole"):
        deepspeed_settings(config_with({}, tmp_path, "zero2", offload=["shards"]))
