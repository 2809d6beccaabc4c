"""Loading, overrides, and the one sentence that each mistake ends in."""

from pathlib import Path

import pytest

from qlora_dist.config.errors import UserError
from qlora_dist.config.load import SYNONYMS, from_yaml, load_config, setting_names, to_yaml, with_absolute_paths
from qlora_dist.config.schema import RunConfig

MINIMAL = "model: {name: m}\ndata: {train: t.jsonl}\n"
HELD_OUT = MINIMAL.replace("t.jsonl", "t.jsonl, eval: e.jsonl")


def load(tmp_path: Path, text: str, *overrides: str) -> RunConfig:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    return load_config(path, overrides)


@pytest.mark.parametrize(
    ("text", "overrides", "sentence"),
    [
        (MINIMAL, ["train.learning_rte=3"], "train.learning_rte is not a setting (given as train.learning_rte=3); "
         "did you mean train.learning_rate?"),
        (MINIMAL, ["learning_rate=3"], "did you mean train.learning_rate?"),
        (MINIMAL, ["lora_r=3"], "did you mean adapter.r?"),
        (MINIMAL + "train:\n  max_steps: abc\n", [], "max_steps is 'abc' (FILE, line 4); it must be a whole number"),
        (MINIMAL + "train:\n  max_steps: -1\n", [], "train.max_steps is -1 (FILE, line 4); it must be greater than 0"),
        (MINIMAL + "foo: 1\n", [], "foo is not a setting (FILE, line 3); the settings there are name,"),
        (MINIMAL, ["shard.strategy=zero9"], "it must be 'auto', 'none', 'ddp'"),
        (MINIMAL, ["adapter.init_lora_weights=gausian"], "it must be true or false or 'gaussian', 'orthogonal', "),
        (MINIMAL, ["adapter.target_modules={a: 1}"], "it must be text or a list"),
        (MINIMAL, ["name=a/b"], "it must be letters, digits"),
        (MINIMAL, ["train=3"], "train is 3, but it is a section (given as train=3)"),
        (MINIMAL, ["model.name.x=3"], "model.name is a value, not a section"),
        (MINIMAL, ["train.max_steps"], "is no override; write section.field=value"),
        ("data: {train: y}\n", [], "model is missing (FILE); add it"),
        ("a: [1", [], "FILE, line 1: "),
        ("seed: 1\nseed: 2\n", [], "FILE, line 2: the key 'seed' is written twice; remove one"),
        ("name: x\nseed: 2001-13-45\n", [], "FILE, line 2: 2001-13-45 without quotes is no text, and no date or"),
        ("name: x\nseed: 0b_\n", [], "FILE, line 2: 0b_ without quotes is no text, and no date or number"),
        ("name: x\nseed: \x01\n", [], "FILE, line 2: YAML does not allow the character U+0001; mend the YAML there"),
        ("? [a]\n: 1\n", [], "FILE, line 1: a list or mapping cannot be a key; write"),
        ("a: " + 3000 * "[", [], "FILE, line 1: nested too deeply; mend"),
        (MINIMAL, ["name=2001-13-45"], "'name=2001-13-45': 2001-13-45 without quotes is no text"),
        (MINIMAL, ["train={max_steps: 1, max_steps: 2}"], "': the key 'max_steps' is written twice"),
        (MINIMAL, ["name=[1"], "'name=[1': expected ',' or ']'"),
        ("", [], "FILE holds no settings"),
        ("- 1\n", [], "FILE holds no settings"),
        (MINIMAL, ["train.max_steps=3", "train.num_train_epochs=1"], "max_steps and train.num_train_epochs are both"),
        (MINIMAL, ["train.warmup_steps=3", "train.warmup_ratio=0.1"], "warmup_steps and train.warmup_ratio are both"),
        (MINIMAL, ["train.warmup_steps=30", "train.max_steps=10"], "would never reach its peak"),
        (MINIMAL, ["train.global_batch_size=8", "train.gradient_accumulation_steps=3"], "launch.num_workers is 3"),
        (MINIMAL, ["train.global_batch_size=2", "train.per_device_train_batch_size=4"], "lower the first"),
        (MINIMAL, ["data.filter.min_chars=3", "data.filter.max_chars=2"], "min_chars (3) is more than data.filter.max"),
        (HELD_OUT, ["data.eval_split=0.1"], "data.eval and data.eval_split are both set"),
        (MINIMAL, ["data.eval_split=1.5"], "neither a share below 1 nor a whole number of rows"),
        (MINIMAL, ["eval.eval_steps=5"], "eval.eval_steps is set but there are no held-out rows"),
        (HELD_OUT, ["eval.early_stopping_patience=2"], "set eval.eval_steps"),
        (HELD_OUT, ["eval.eval_steps=5", "eval.load_best_model_at_end=true", "checkpoint.keep_best=0"], "to 1 or"),
        (MINIMAL, ["adapter.path=a", "adapter.r=4"], "adapter.r would be ignored"),
        (MINIMAL, ["launch.num_workers=2", "shard.strategy=none"], "set shard.strategy to auto, ddp, fsdp,"),
        (MINIMAL, ["launch.num_workers=2", "launch.backend=none"], "set launch.backend to ray or torchrun"),
        (MINIMAL, ["launch.backend=none", "launch.address=auto"], "launch.address is for Ray"),
        (MINIMAL, ["launch.num_workers=[3, 2]"], "launch.num_workers is [3, 2], whose first number is the larger"),
        (MINIMAL, ["launch.num_workers=[1, 2, 3]"], "it must be a whole number above 0, or two of them: [least, most]"),
        (MINIMAL, ["launch.num_workers=[0, 2]"], "launch.num_workers is [0, 2] (given as launch.num_workers=[0, 2])"),
        (MINIMAL, ["launch.num_workers=many"], "it must be a whole number above 0"),
        (MINIMAL, ["launch.num_workers=[1, 2]", "launch.backend=none"], "set launch.backend to ray or torchrun"),
        (MINIMAL, ["output_dir=s3://bucket/run"], "a run folder is on a filesystem that all nodes mount"),
        (HELD_OUT, ["eval.sample_prompts=1", "data.assistant_only_loss=false"], "needs answers to begin somewhere"),
    ],
)  # fmt: skip
def test_each_mistake_is_one_sentence(tmp_path: Path, text: str, overrides: list[str], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        load(tmp_path, text, *overrides)
    message = caught.value.message
    assert sentence.replace("FILE", str(tmp_path / "x.yaml")) in message
    assert "\n" not in message


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "quickstart.yaml").write_text(MINIMAL)
    with pytest.raises(UserError, match=r"did you mean .*quickstart\.yaml"):
        load_config(tmp_path / "quikstart.yaml")


def test_overrides_win_and_keep_their_yaml_type(tmp_path: Path) -> None:
    config = load(
        tmp_path, MINIMAL + "train: {max_steps: 3}\n",
        "train.max_steps=7", "train.learning_rate=2e-4", "adapter.target_modules=[q_proj, v_proj]", "resume=none",
    )  # fmt: skip
    assert config.train.max_steps == 7
    assert config.train.learning_rate == 2e-4
    assert config.adapter.target_modules == ["q_proj", "v_proj"]
    assert config.resume == "none"


def test_what_show_prints_loads_to_the_same_config(tmp_path: Path) -> None:
    config = load(tmp_path, HELD_OUT, "adapter.path=some/adapter", "eval.eval_steps=3", "model.cache_quantized=a/b")
    assert from_yaml(to_yaml(config)) == config


def test_the_global_batch_follows_from_its_factors(tmp_path: Path) -> None:
    factors = ["train.per_device_train_batch_size=2", "train.gradient_accumulation_steps=3", "launch.num_workers=4"]
    assert load(tmp_path, MINIMAL, *factors).global_batch_size == 24
    assert load(tmp_path, MINIMAL, *factors, "train.global_batch_size=24").global_batch_size == 24


def test_auto_strategy_depends_on_the_number_of_workers(tmp_path: Path) -> None:
    assert load(tmp_path, MINIMAL).strategy == "none"
    assert load(tmp_path, MINIMAL, "launch.num_workers=2").strategy == "ddp"
    # One worker of such a range is still one of a group that may grow.
    assert load(tmp_path, MINIMAL, "launch.num_workers=[1, 2]").strategy == "ddp"


def test_a_range_of_workers_has_one_global_batch(tmp_path: Path) -> None:
    config = load(tmp_path, MINIMAL, "train.per_device_train_batch_size=2", "launch.num_workers=[1, 4]")
    launch = config.launch
    assert (launch.min_workers, launch.max_workers, launch.elastic) == (1, 4, True)
    assert config.global_batch_size == 8
    assert from_yaml(to_yaml(config)) == config
    fixed = load(tmp_path, MINIMAL, "launch.num_workers=[2, 2]").launch
    assert (fixed.min_workers, fixed.max_workers, fixed.elastic) == (2, 2, False)


def test_every_synonym_points_at_a_setting_that_exists() -> None:
    assert set(SYNONYMS.values()) <= set(setting_names())


def test_every_setting_of_the_json_schema_is_described_or_named_in_the_fields_words() -> None:
    properties = RunConfig.model_json_schema()["$defs"]
    assert properties["TrainConfig"]["properties"]["global_batch_size"]["description"]
    assert properties["AdapterConfig"]["additionalProperties"] is False


def test_paths_that_exist_become_absolute_and_names_stay(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("")
    config = load(tmp_path, MINIMAL, "data.train=rows.jsonl", "model.name=some/hub-id", "adapter.path=a")
    absolute = with_absolute_paths(config)
    assert absolute.data.train == str(tmp_path / "rows.jsonl")
    assert absolute.model.name == "some/hub-id"
    assert absolute.adapter.path == tmp_path / "a"
    assert absolute.output_dir == tmp_path / "runs" / "qlora"
