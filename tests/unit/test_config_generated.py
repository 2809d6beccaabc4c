"""Generated configurations: each validates and comes back from YAML as it was, or ends in its one sentence."""

from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from qlora_dist.config.errors import UserError
from qlora_dist.config.load import _section, from_yaml, to_yaml, validate
from qlora_dist.config.schema import RunConfig

# Values of every kind that YAML can hold; most are wrong for most fields.
ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 5000),
    st.floats(allow_nan=True, allow_infinity=True),
    st.text(max_size=12),
    st.sampled_from(
        ["auto", "none", "ddp", "nf4", "cosine", "ray", "torchrun", "bf16", "a/b", "rows.jsonl", "2e-4", "~"]
    ),
    st.lists(st.text(max_size=5), max_size=3),
    st.dictionaries(st.text(max_size=5), st.integers(), max_size=2),
)
PLAUSIBLE = {
    "name": ["run", "a.b"], "max_steps": [1, 50], "num_train_epochs": [1, 0.5], "global_batch_size": [8, 12],
    "per_device_train_batch_size": [1, 4], "gradient_accumulation_steps": [1, 2], "num_workers": [1, 2, [1, 2]],
    "eval": ["e.jsonl"], "eval_split": [0, 0.1, 5], "eval_steps": [10], "early_stopping_patience": [2],
    "strategy": ["auto", "none", "ddp"], "backend": ["ray", "torchrun", "none"], "warmup_steps": [0, 5],
    "path": ["adapters/a"], "r": [4, 64], "target_modules": ["all-linear", ["q_proj"]], "train": ["t.jsonl"],
}  # fmt: skip


def section(model: type[BaseModel]) -> st.SearchStrategy[dict[str, Any]]:
    """Some fields of a section, most with a value that could be right, and now and then an unknown one."""
    fields: dict[str, st.SearchStrategy[Any]] = {}
    for name, info in model.model_fields.items():
        inner = _section(model, name)
        if inner is not None:
            fields[name] = st.one_of(section(inner), section(inner), section(inner), ANYTHING)
            continue
        likely = list(PLAUSIBLE.get(name, []))
        if not info.is_required() and info.default_factory is None:
            likely.append(info.default)
        good = st.sampled_from(likely) if likely else ANYTHING
        # One of 16 is anything: there are over a hundred fields, and some configurations are to be valid. (`one_of`
        # takes a strategy that it is given several times once.)
        fields[name] = st.tuples(st.integers(0, 15), good, ANYTHING).map(lambda drawn: drawn[1 if drawn[0] else 2])
    unknown = st.dictionaries(st.sampled_from(["learning_rat", "lora_r", "x"]), ANYTHING, max_size=1)
    return st.tuples(st.fixed_dictionaries({}, optional=fields), st.one_of(st.just({}), st.just({}), unknown)).map(
        lambda parts: {**parts[0], **parts[1]}
    )


outcomes = {"valid": 0, "refused": 0}


@settings(
    max_examples=500, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip
@given(section(RunConfig))
def try_one(values: dict[str, Any]) -> None:
    whole = {"model": {"name": "m"}, "data": {"train": "t.jsonl"}, **values}
    for name, required in (("model", "name"), ("data", "train")):
        if isinstance(whole[name], dict):
            whole[name] = {required: "x.jsonl", **whole[name]}
    sentence = None
    try:
        config = validate(whole)
    except UserError as error:
        sentence = error.message
    if sentence is None:
        outcomes["valid"] += 1
        assert from_yaml(to_yaml(config)) == config
    else:
        outcomes["refused"] += 1
        assert sentence.strip()
        assert "\n" not in sentence
        assert len(sentence) < 600


def test_five_hundred_configurations() -> None:
    try_one()
    # Neither half may be empty, or the test would prove nothing of it.
    assert outcomes["valid"] >= 25, outcomes
    assert outcomes["refused"] >= 100, outcomes
