"""Decoding: beam search, greedy search, sampling, constraints; sees a model through `StepDecoder` only."""

from __future__ import annotations

from megaseq.decode.beam_search import BeamSearch, beam_search
from megaseq.decode.errors import DecodeError
from megaseq.decode.greedy import GreedySearch, greedy_search
from megaseq.decode.hypothesis import Hypothesis
from megaseq.decode.protocol import StepDecoder
from megaseq.decode.search import Search

__all__ = [
    "BeamSearch",
    "DecodeError",
    "GreedySearch",
    "Hypothesis",
    "Search",
    "StepDecoder",
    "beam_search",
    "greedy_search",
]
