"""What a launcher has set by halves is one sentence, whoever reads it."""

from pathlib import Path

import pytest

from qlora_dist.cluster.doctor.group import place_of
from qlora_dist.cluster.doctor.wanted import Wanted, wanted_ports
from qlora_dist.cluster.torchrun import run_as_worker
from qlora_dist.config.errors import UserError
from tests.cluster.toys import toy_config

WHOLE = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29400"}


@pytest.mark.parametrize(
    ("variable", "value", "sentence"),
    [
        ("MASTER_ADDR", None, "MASTER_ADDR is not set, though RANK and WORLD_SIZE are; "),
        ("MASTER_PORT", None, "MASTER_PORT is not set, though RANK and WORLD_SIZE are; "),
        ("MASTER_PORT", "70000", "MASTER_PORT is '70000' and not a whole number up to 65535; "),
        ("RANK", "x", "RANK is 'x' and not a whole number up to 1; "),
        ("RANK", "2", "RANK is '2' and not a whole number up to 1; "),
        ("WORLD_SIZE", "two", "WORLD_SIZE is 'two' and not a whole number; "),
        ("LOCAL_RANK", "-1", "LOCAL_RANK is '-1' and not a whole number; "),
    ],
)
def test_the_variable_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str, value: str | None, sentence: str
) -> None:
    environ = {name: text for name, text in (WHOLE | {variable: value}).items() if text is not None}
    with pytest.raises(UserError) as raised:
        place_of(environ)
    assert sentence in raised.value.message
    for name in WHOLE:
        monkeypatch.delenv(name, raising=False)
    for name, text in environ.items():
        monkeypatch.setenv(name, text)
    with pytest.raises(UserError) as raised:
        run_as_worker(toy_config(backend="torchrun", num_workers=2), tmp_path)
    assert sentence in raised.value.message


def test_a_port_without_a_launcher_is_read_likewise() -> None:
    with pytest.raises(UserError, match="MASTER_PORT is 'http' and not a whole number up to 65535"):
        wanted_ports(Wanted("/r"), {"MASTER_PORT": "http"})
