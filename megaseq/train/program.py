"""The schedule of a training job: how long, how precise, and what runs between the steps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from megaseq.base import REQUIRED, Configurable, Problem
from megaseq.train.activation_checkpointing import ActivationCheckpointing
from megaseq.train.early_stop import EarlyStop
from megaseq.train.local_sgd.params import LocalSGD


class Program(Configurable):
    """Trains in one process, with evaluation and decoding in between; Lingvo calls this a program schedule."""

    class Params(Configurable.Params):
        max_steps: int = REQUIRED
        """Optimiser steps of the whole run, counted from its very first; a resumed run does what is left of them."""
        max_minutes: float = 0.0
        """Wall-clock minutes of one process after which it ends as if max_steps were reached; 0: no limit."""
        accumulation: int = 1
        """Micro-batches that a batch's rows are split into; the update does not depend on it, the memory does."""
        precision: Literal["auto", "fp32", "bf16", "bf16_autocast"] = "auto"
        """bf16: weights and activations in bfloat16, fp32 masters in the learner, norms and softmax in fp32.
        bf16_autocast: fp32 weights, matrix products in bfloat16. auto: bf16 where the device computes it natively."""
        device: Literal["auto", "cpu", "cuda"] = "auto"
        """Where the model computes. auto: the GPU where torch sees one, else the CPU."""
        log_interval_steps: int = 100
        """Steps between two lines of training figures."""
        eval_interval_steps: int = 1000
        """Steps between two evaluations of the loss on the evaluation inputs; 0: only at the end."""
        decode_interval_steps: int = 0
        """Steps between two decodings of the evaluation inputs; 0: only at the end."""
        eval_at_end: bool = True
        """Whether to evaluate after the last step."""
        decode_at_end: bool = True
        """Whether to decode after the last step."""
        eval_names: tuple[str, ...] = ()
        """Evaluation inputs whose loss is computed; empty: all."""
        decode_names: tuple[str, ...] = ()
        """Evaluation inputs that are decoded; empty: all."""
        decode_max_examples: int = 0
        """Examples of each input that a decoding between steps takes; 0: all. The one at the end takes all."""
        num_samples: int = 3
        """Decoded examples shown after a decoding."""
        num_threads: int = 0
        """Threads of a matrix product; 0: torch's own choice. Bitwise resumption needs the same number."""
        cache_dir: str = ""
        """Where token caches are kept; empty: in the run directory."""
        activation_checkpointing: ActivationCheckpointing.Params = ActivationCheckpointing.Params()
        """What layers keep for the backward pass, and what they compute again."""
        compile: bool = False
        """Whether torch.compile compiles each Transformer layer at its first call, which takes minutes."""
        local_sgd: LocalSGD.Params = LocalSGD.Params()
        """Workers that train on their own and meet now and then, instead of at every step."""
        early_stop: EarlyStop.Params = EarlyStop.Params()
        """Ends the run when a figure stops getting better."""

        def validate(self) -> Iterator[Problem | str]:
            """Reports values out of range."""
            yield from super().validate()
            for name in ("max_steps", "accumulation", "log_interval_steps"):
                value = getattr(self, name)
                if isinstance(value, int) and value < 1:
                    yield f"{name}: must be at least 1, but is {value}. Raise it."
            for name in ("eval_interval_steps", "decode_interval_steps", "decode_max_examples", "num_threads"):
                if getattr(self, name) < 0:
                    yield f"{name}: must not be negative, but is {getattr(self, name)}. Use 0 or more."

    params: Params

    def eval_due(self, step: int) -> bool:
        """Whether the loss on the evaluation inputs is to be computed after `step` steps."""
        p = self.params
        return p.eval_interval_steps > 0 and step % p.eval_interval_steps == 0

    def decode_due(self, step: int) -> bool:
        """Whether the evaluation inputs are to be decoded after `step` steps."""
        p = self.params
        return p.decode_interval_steps > 0 and step % p.decode_interval_steps == 0
