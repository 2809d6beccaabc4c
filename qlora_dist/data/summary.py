"""What a person is told of the data before training: a table, what to look at, and one example."""

from itertools import groupby
from typing import Any

from transformers import PreTrainedTokenizerBase

from qlora_dist.data.tokens import TokenTable

EXAMPLE_CHARS = 240
EXAMPLE_PIECES = 8
REASONS = {
    "too_long": "too long",
    "too_short": "too short",
    "no_loss": "nothing to learn",
    "refused": "refused by the chat template",
}

# Text, and whether it bears loss.
Piece = tuple[str, bool]


def data_record(name: str, table: TokenTable) -> dict[str, Any]:
    """The numbers of one split, as the event log keeps them."""
    summary, intake = table.summary, table.summary.intake
    dropped = {REASONS.get(reason, reason): count for reason, count in summary.dropped.items() if count}
    return {
        "split": name,
        "format": intake.format if intake else None,
        "rows": intake.rows if intake else summary.rows,
        "documents": summary.documents,
        "dropped": {**(intake.dropped if intake else {}), **dropped},
        "truncated": summary.truncated,
        "tokens": summary.tokens,
        "loss_tokens": summary.loss_tokens,
        "longest": summary.longest,
        "packs": table.num_packs,
        "packing_efficiency": summary.packing_efficiency if table.packs is not None else None,
    }


def data_line(record: dict[str, Any]) -> str:
    """A split's record in one line."""
    dropped = "".join(f", {count:,} dropped ({reason})" for reason, count in record["dropped"].items())
    truncated = f", {record['truncated']:,} truncated" if record["truncated"] else ""
    full = record["packing_efficiency"]
    packs = "" if full is None else f" in {record['packs']:,} packs ({100 * full:.1f} % full)"
    return (
        f"{record['split']}: {record['documents']:,} of {record['rows']:,} rows{packs}, {record['tokens']:,} tokens, "
        f"{record['loss_tokens']:,} bear loss{truncated}{dropped}"
    )


def data_notices(name: str, table: TokenTable) -> list[str]:
    """Sentences on what a person may want to mend: bad rows left out, repeated rows, held-out rows that leaked."""
    intake = table.summary.intake
    if intake is None:
        return []
    notices = [
        f"{name}: left out {intake.dropped[reason]:,} rows ({reason}); the first: {sentence}"
        for reason, sentence in intake.first_bad.items()
    ]
    if intake.duplicates and "duplicate" not in intake.dropped:
        notices.append(
            f"{name}: {intake.duplicates:,} rows repeat earlier ones; data.filter.drop_duplicates: true leaves them out"
        )
    if intake.leaked and "leaked" not in intake.dropped:
        notices.append(
            f"{name}: {intake.leaked:,} held-out rows are training rows too, so the held-out loss flatters; "
            "data.filter.drop_leaked: true leaves them out"
        )
    return notices


def example_pieces(table: TokenTable, tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
    """The beginning of the first document in runs of tokens that do and do not bear loss, long ones shortened."""
    ids, mask = table.document(0)
    pieces: list[Piece] = []
    start = 0
    for learned, run in groupby(mask.tolist()):
        end = start + sum(1 for _ in run)
        pieces.append((_shortened(str(tokenizer.decode(ids[start:end]))), learned))
        start = end
        if len(pieces) == EXAMPLE_PIECES:
            break
    return pieces


def example_line(pieces: list[Piece]) -> str:
    """The pieces in one line, in brackets what bears no loss."""
    text = "".join(text if learned else f"[{text}]" for text, learned in pieces)
    return "[no loss] and loss: " + text.replace("\r", "\\r").replace("\n", "\\n")


def _shortened(text: str) -> str:
    half = EXAMPLE_CHARS // 2
    return text if len(text) <= EXAMPLE_CHARS else f"{text[:half]} ... {text[-half:]}"
