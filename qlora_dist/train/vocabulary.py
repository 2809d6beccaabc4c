"""Whether the base has an embedding for every token of the data."""

from typing import Any

from torch import nn

from qlora_dist.config.errors import UserError
from qlora_dist.data.table import TokenTable


def check_vocabulary(base: nn.Module, tokenizer: Any, tables: list[TokenTable]) -> None:
    """Refuse a tokenizer that came from another model, as soon as a token of the data lies beyond the embeddings.

    On a GPU such a token ends in a failed device-side assertion, which names nothing.

    Args:
        base: with `get_input_embeddings()`, as transformers' models have it.
        tables: every token that training and evaluation will see.

    Raises:
        UserError: a token of the data, or the padding token, has no embedding.
    """
    # Of the whole table, of which a rank may hold a shard.
    embeddings: int = base.get_input_embeddings().num_embeddings  # type: ignore[operator]
    # Most tokenizers are smaller than their model: then no table has to be read.
    if max(tokenizer.get_vocab().values(), default=0) < embeddings:
        return
    largest = max([tokenizer.pad_token_id, *(int(table.input_ids.max(initial=0)) for table in tables)])
    if largest >= embeddings:
        raise UserError(
            "tokenizer-of-another-model", model=tokenizer.name_or_path, token=tokenizer.convert_ids_to_tokens(largest),
            id=largest, embeddings=embeddings,
        )  # fmt: skip
