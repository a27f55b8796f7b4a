"""Decoding: beam search, greedy search, sampling, constraints; sees a model through `StepDecoder` only."""

from __future__ import annotations

from megaseq.decode.beam_search import BeamSearch, beam_search
from megaseq.decode.constraints import LogitsProcessor
from megaseq.decode.errors import DecodeError
from megaseq.decode.greedy import GreedySearch, greedy_search
from megaseq.decode.hypothesis import Hypothesis
from megaseq.decode.processors import (
    BadWords,
    ForcedBos,
    ForcedEos,
    ForcedTokens,
    NoRepeatNgrams,
    RepetitionPenalty,
    SuppressedTokens,
)
from megaseq.decode.protocol import StepDecoder
from megaseq.decode.sampling import Sampler, sample
from megaseq.decode.search import Search

__all__ = [
    "BadWords",
    "BeamSearch",
    "DecodeError",
    "ForcedBos",
    "ForcedEos",
    "ForcedTokens",
    "GreedySearch",
    "Hypothesis",
    "LogitsProcessor",
    "NoRepeatNgrams",
    "RepetitionPenalty",
    "Sampler",
    "Search",
    "StepDecoder",
    "SuppressedTokens",
    "beam_search",
    "greedy_search",
    "sample",
]
