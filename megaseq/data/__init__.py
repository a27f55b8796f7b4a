"""Data: sources, tokenizers, caches, packing and bucketing, and inputs that resume exactly."""

from __future__ import annotations

from megaseq.data.bucketing import Bucketing
from megaseq.data.input import Input
from megaseq.data.mixture import Mixture
from megaseq.data.packing import Packing
from megaseq.data.source import GeneratedSource, Jsonl, ParallelText, Source, Tsv
from megaseq.data.tokenizer import Bytes, Characters, SentencePiece, Tokenizer, VocabularyFile
from megaseq.data.vocabulary import Vocabulary

__all__ = [
    "Bucketing",
    "Bytes",
    "Characters",
    "GeneratedSource",
    "Input",
    "Jsonl",
    "Mixture",
    "Packing",
    "ParallelText",
    "SentencePiece",
    "Source",
    "Tokenizer",
    "Tsv",
    "Vocabulary",
    "VocabularyFile",
]
