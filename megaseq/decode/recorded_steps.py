"""Steps of a search that are recorded once and then done again without Python: CUDA graphs."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable

import torch

from megaseq.decode.errors import DecodeError
from megaseq.decode.loop_state import Running
from megaseq.decode.protocol import Fixing, StepDecoder

Capture = Callable[[Callable[[], None]], Callable[[], None]]
"""Takes a function that waits for nothing and does the same ops on the same memory each time; returns what does it."""

FIRST_ROOM = 32
"""Tokens that the decoder's caches have room for at first; twice as many whenever they are full."""


class RecordedSteps:
    """Does the steps of a search, most of them from a recording.

    A recording holds as long as the number of sources and the room in the caches stay: each time that they change, one
    step is done by Python, so that all kernels are compiled and set up, and the next one is recorded.
    """

    def __init__(
        self,
        step: Callable[[int], None],
        *,
        run: Running,
        decoder: StepDecoder,
        capture: Capture,
        num_hyps: int,
        num_steps: int,
        first: int,
    ) -> None:
        """Makes room in the decoder.

        Args:
            step: Does one step by Python, given its number; changes `run`.
            run: What the search goes on with, before its first step.
            decoder: The model.
            capture: Records.
            num_hyps: K, hypotheses of a source after the first step.
            num_steps: The most steps that there are.
            first: The first step that is like all later ones.

        Raises:
            DecodeError: The decoder cannot keep its memory in place.
        """
        self._step = step
        self._run = run
        self._capture = capture
        self._num_hyps, self._num_steps, self._first = num_hyps, num_steps, first
        if not isinstance(decoder, Fixing):
            raise DecodeError(
                f"device_loop_graph: must meet a decoder that has `fix`, but {type(decoder).__name__} has none. "
                "Set device_loop_graph to false."
            )
        self._decoder: Fixing = decoder
        self._room = 0
        self._is_warm = False
        self._replay: Callable[[], None] | None = None
        self._make_room(min(FIRST_ROOM, num_steps))

    def __call__(self, step: int) -> None:
        """Does step `step`; they come in order, from 0."""
        if step == self._room:
            self._make_room(min(2 * self._room, self._num_steps))
        if step < self._first or not self._is_warm:
            self._step(step)
            self._is_warm = step >= self._first
            return
        if self._replay is None:
            self._replay = self._capture(self._once)
        self._replay()

    def forget(self) -> None:
        """Gives up the recording, whose tensors are no longer those of the search."""
        self._replay, self._is_warm = None, False

    def _make_room(self, num_tokens: int) -> None:
        self.forget()
        self._run.state, self._room = self._decoder.fix(self._run.state, num_hyps=self._num_hyps, num_tokens=num_tokens)

    def _once(self) -> None:
        """A step whose results lie where what it began with lay."""
        run = self._run
        loop, tokens = run.loop, run.tokens
        run.loop = copy.copy(loop)
        self._step(self._first)
        loop.copy_(run.loop)
        run.loop, run.tokens = loop, tokens.copy_(run.tokens)


def capture_cuda_graph(body: Callable[[], None]) -> Callable[[], None]:
    """Records what `body` launches on the present GPU, without running it; returns what runs it, as often as wanted.

    What `body` makes for itself lives in memory of the graph's own. It must have run once, so that all kernels are
    compiled.

    Raises:
        DecodeError: `body` waits for the GPU, or does something else that a graph cannot hold.
    """
    graph = torch.cuda.CUDAGraph()
    stream: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    present = torch.cuda.current_stream()
    stream.wait_stream(present)
    # A tensor that the garbage collector frees meanwhile would have its memory asked about, which ends a capture.
    collects = gc.isenabled()
    gc.disable()
    try:
        with torch.cuda.stream(stream):
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                body()
            finally:
                graph.capture_end()
    except RuntimeError as error:
        # The end of a capture that has failed fails too: the first error says why.
        first = error.__context__ or error
        raise DecodeError(
            f"device_loop_graph: must meet a model whose steps a CUDA graph can hold, but {str(first).splitlines()[0]} "
            "Set device_loop_graph to false."
        ) from error
    finally:
        if collects:
            gc.enable()
    present.wait_stream(stream)
    return graph.replay
