"""The token cache: a source's pairs as ids in memory-mapped files, tokenized once for each (texts, tokenizers)."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megaseq.data.build_once import build_once
from megaseq.data.columns import Column, ColumnWriter
from megaseq.data.problem import data_error
from megaseq.data.text_store import TextStore
from megaseq.data.tokenizer import Tokenizer
from megaseq.data.vocabulary import Vocabulary

FORMAT = 1
"""Raised when the files' layout changes."""
_CHUNK = 8192
_log = logging.getLogger(__name__)


class TokenCache:
    """Pairs of id sequences without special ids, found by index in O(1)."""

    def __init__(self, directory: Path, *, key: str, vocabulary: Vocabulary) -> None:
        self.key = key
        """Names the ids: equal keys, equal ids."""
        self.source = Column(directory, name="source", dtype=id_type(vocabulary.source))
        self.target = Column(directory, name="target", dtype=id_type(vocabulary.target))

    @classmethod
    def open(cls, texts: TextStore, *, vocabulary: Vocabulary, cache_dir: Path) -> TokenCache:
        """Opens the ids of `texts`; tokenizes first if `cache_dir` does not have them yet."""
        identity = f"tokens/{FORMAT}/{texts.key}/{vocabulary.fingerprint()}"
        key = hashlib.sha256(identity.encode()).hexdigest()[:32]
        directory = cache_dir / "tokens" / key

        def build(temporary: Path) -> None:
            began = time.monotonic()
            write_tokens(texts, vocabulary=vocabulary, directory=temporary)
            _log.info("tokenized %d pairs in %.1f s", len(texts), time.monotonic() - began)

        build_once(directory, build=build, what=f"token cache of {texts.location(0).rpartition(':')[0]}")
        cache = cls(directory, key=key, vocabulary=vocabulary)
        if len(cache.source) != len(texts) or len(cache.target) != len(texts):
            found = f"{len(cache.source)} and {len(cache.target)}"
            raise data_error(str(directory), f"have {len(texts)} pairs", found, "Remove this directory")
        return cache

    def __len__(self) -> int:
        return len(self.source)


def id_type(tokenizer: Tokenizer) -> npt.DTypeLike:
    """Returns the narrowest type that holds every id, little-endian."""
    return np.dtype("<u2") if tokenizer.vocab_size <= 1 << 16 else np.dtype("<u4")


def write_tokens(texts: TextStore, *, vocabulary: Vocabulary, directory: Path) -> None:
    """Tokenizes all of `texts` into the files of a cache; holds one chunk at a time."""
    for name, tokenizer in (("source", vocabulary.source), ("target", vocabulary.target)):
        tokenizer.num_threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
        column = texts.side(name)
        dtype = id_type(tokenizer)
        with ColumnWriter(directory, name=name) as writer:
            for start in range(0, len(column), _CHUNK):
                indices = np.arange(start, min(start + _CHUNK, len(column)), dtype=np.int64)
                encoded = tokenizer.encode_batch([text.decode() for text in column.read(indices)])
                writer.append(np.concatenate(encoded).astype(dtype), lengths=[len(ids) for ids in encoded])
