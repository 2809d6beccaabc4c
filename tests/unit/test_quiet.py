"""What libraries say of themselves stays off the terminal; what they warn of does not."""

import logging

from qlora_dist.model.quiet import quiet_libraries


def test_deepspeeds_word_on_its_accelerator_is_dropped_and_its_warnings_are_not() -> None:
    with quiet_libraries():
        pass
    logger = logging.getLogger("DeepSpeed")

    def passes(message: str) -> bool:
        return bool(logger.filter(logging.LogRecord("DeepSpeed", logging.WARNING, "", 0, message, None, None)))

    assert not passes("Setting accelerator to CPU. If you have GPU or other accelerator, we were unable to detect it.")
    assert passes("the loss scale is too small")
