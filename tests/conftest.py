"""Fixtures that all tests share."""

from pathlib import Path

import pytest

from tests.tiny import make_tiny_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random fp32 Llama of 2 layers, hidden size 64, and its tokenizer."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))
