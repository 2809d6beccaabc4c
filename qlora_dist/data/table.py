"""The flat table of tokens that every rank trains from."""

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from qlora_dist.data.filters import Intake
from qlora_dist.data.packing import Packs


@dataclass(frozen=True, slots=True)
class TokenSummary:
    """What became of the rows.

    Attributes:
        rows: rows read.
        documents: rows kept.
        truncated: documents cut at `max_length`.
        dropped: rows left out, by reason: `too_long`, `no_loss` (no loss-bearing token within `max_length`),
            `too_short`, `refused` (by the chat template).
        tokens: tokens of all documents.
        loss_tokens: predictions that bear loss (a document's first token is never one).
        longest: tokens of the longest document.
        packs: packs made of the documents; as many as documents where they are not packed.
        packing_efficiency: `tokens` over the `packs * max_length` that full packs would hold.
        intake: what became of the rows before this; None where they came from no source.
    """

    rows: int
    documents: int
    truncated: int
    dropped: dict[str, int]
    tokens: int
    loss_tokens: int
    longest: int
    packs: int
    packing_efficiency: float
    intake: Intake | None = None


@dataclass(frozen=True, eq=False)
class TokenTable:
    """Documents one after the other. A pack is what takes one line of a micro-batch: one document, or several.

    Attributes:
        input_ids: int32 [tokens].
        loss_mask: bool [tokens]; whether predicting this token bears loss, False at a document's first token.
        offsets: int64 [documents + 1]; document d is `offsets[d]:offsets[d + 1]`.
        summary: what became of the rows.
        prompts: the last message before the answer, of the first documents, to show beside a model's answer.
        packs: which documents share a pack; None where each is a pack by itself.
    """

    input_ids: np.ndarray
    loss_mask: np.ndarray
    offsets: np.ndarray
    summary: TokenSummary
    prompts: tuple[str, ...] = ()
    packs: Packs | None = None

    @property
    def num_documents(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_packs(self) -> int:
        return self.num_documents if self.packs is None else len(self.packs.offsets) - 1

    def document(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids (int32 [T]) and loss mask (bool [T]) of a document, as views."""
        if not 0 <= index < self.num_documents:
            raise IndexError(f"document {index} of {self.num_documents}")
        start, end = self.offsets[index], self.offsets[index + 1]
        return self.input_ids[start:end], self.loss_mask[start:end]

    def documents_of(self, pack: int) -> list[int]:
        """The documents of a pack, in their order in it."""
        if not 0 <= pack < self.num_packs:
            raise IndexError(f"pack {pack} of {self.num_packs}")
        if self.packs is None:
            return [pack]
        return self.packs.documents[self.packs.offsets[pack] : self.packs.offsets[pack + 1]].tolist()

    def pack(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids (int32 [T]) and loss mask (bool [T]) of a pack: its documents one after the other."""
        ids, masks = zip(*(self.document(document) for document in self.documents_of(index)), strict=True)
        return (ids[0], masks[0]) if len(ids) == 1 else (np.concatenate(ids), np.concatenate(masks))

    @cached_property
    def pack_tokens(self) -> np.ndarray:
        """Tokens of each pack, int64 [packs]."""
        return self._per_pack(np.diff(self.offsets))

    @cached_property
    def pack_loss_tokens(self) -> np.ndarray:
        """Loss-bearing predictions of each pack, int64 [packs]."""
        # A document is never empty, so reduceat's special case for empty slices does not arise.
        return self._per_pack(np.add.reduceat(self.loss_mask, self.offsets[:-1], dtype=np.int64))

    def _per_pack(self, per_document: np.ndarray) -> np.ndarray:
        if self.packs is None:
            return per_document
        return np.add.reduceat(per_document[self.packs.documents], self.packs.offsets[:-1])

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the tokens, the mask, the documents' borders and the packs; a resumed run compares it."""
        arrays = [(self.offsets, "<i8"), (self.input_ids, "<i4"), (self.loss_mask, "|b1")]
        if self.packs is not None:
            arrays += [(self.packs.documents, "<i8"), (self.packs.offsets, "<i8")]
        digest = hashlib.sha256()
        for array, dtype in arrays:
            digest.update(np.ascontiguousarray(array, dtype=dtype).data)
        return digest.hexdigest()
