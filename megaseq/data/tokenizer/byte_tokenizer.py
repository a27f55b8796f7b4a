"""Bytes as ids: no vocabulary to learn, no unknown text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megaseq.data.tokenizer.tokenizer import NUM_SPECIAL, Ids, Tokenizer


class Bytes(Tokenizer):
    """Each UTF-8 byte is one id, after the special ids; tags follow the 256 bytes (ByT5, Xue et al. 2022)."""

    class Params(Tokenizer.Params):
        pass

    params: Params

    @property
    def vocab_size(self) -> int:
        return NUM_SPECIAL + 256 + len(self.params.tags)

    def _encode(self, texts: Sequence[str], *, seed: int | None) -> list[Ids]:
        del seed
        return [np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int32) + NUM_SPECIAL for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text; bytes that are not UTF-8, as a model may produce them, become U+FFFD."""
        pieces: list[bytes] = []
        for i in ids:
            if NUM_SPECIAL <= i < NUM_SPECIAL + 256:
                pieces.append(bytes([i - NUM_SPECIAL]))
            elif NUM_SPECIAL + 256 <= i < self.vocab_size:
                pieces.append(f"{self.params.tags[i - NUM_SPECIAL - 256]} ".encode())
            elif i == self.unk_id:
                pieces.append("\ufffd".encode())
        return b"".join(pieces).decode(errors="replace")

    def _tag_id(self, tag: str) -> int:
        return NUM_SPECIAL + 256 + self.params.tags.index(tag)
