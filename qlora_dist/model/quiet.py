"""Keeps known chatter of the libraries off stderr; every other warning passes."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

KNOWN_CHATTER = (
    "Failed to load CPU gemm_4bit_forward",  # bitsandbytes: an optional kernel package that is not needed
    "Setting accelerator to CPU",  # deepspeed, where it happens to be installed
)
KNOWN_WARNINGS = (
    r".*`is_gradient_checkpointing` is deprecated",  # peft asks transformers by the old name
    r".*MatMul8bitLt: inputs will be cast",
)


def _is_news(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(KNOWN_CHATTER)


def mute_known_chatter() -> None:
    """Drop the known useless log lines of bitsandbytes and deepspeed; call it before either is imported."""
    for name in ("bitsandbytes.backends.cpu.ops", "DeepSpeed", "DeepSpeedAccelerator", "deepspeed"):
        logger = logging.getLogger(name)
        if _is_news not in logger.filters:
            logger.addFilter(_is_news)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """No progress bars and no known chatter from transformers, peft and bitsandbytes inside the block."""
    from transformers.utils import logging as transformers_logging

    mute_known_chatter()
    had_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            for pattern in KNOWN_WARNINGS:
                warnings.filterwarnings("ignore", message=pattern)
            yield
    finally:
        if had_bars:
            transformers_logging.enable_progress_bar()
