"""Tokenizers behind one interface."""

from __future__ import annotations

from megaseq.data.tokenizer.byte_tokenizer import Bytes
from megaseq.data.tokenizer.sentence_piece import SentencePiece
from megaseq.data.tokenizer.table import Characters, VocabularyFile
from megaseq.data.tokenizer.tokenizer import Corpus, Tokenizer, build

__all__ = ["Bytes", "Characters", "Corpus", "SentencePiece", "Tokenizer", "VocabularyFile", "build"]
