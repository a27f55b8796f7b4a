"""A run small enough to train in a test: reverses short words, spelt in bytes."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch

from megaseq.base import NestedMap
from megaseq.checkpoint import Checkpointer
from megaseq.data import Bucketing, Bytes, Input, Packing, ParallelText, Vocabulary
from megaseq.decode import BeamSearch
from megaseq.layers.embedding import Embedding
from megaseq.layers.families import stacks
from megaseq.layers.positions import SinusoidalPositions
from megaseq.learner import AdamW, Constant, Learner
from megaseq.tasks.translation import Translation
from megaseq.train.experiment import Run
from megaseq.train.program import Program
from megaseq.train.tracking import Tracking


def write_words(directory: Path, *, name: str = "train", count: int = 200, seed: int = 1) -> None:
    """Writes NAME.in and NAME.out: words, and the same backwards."""
    draw = random.Random(f"{name}/{seed}")
    words = ["".join(draw.choices("abcdef", k=draw.randint(1, 7))) for _ in range(count)]
    (directory / f"{name}.in").write_text("".join(f"{word}\n" for word in words), encoding="utf-8")
    (directory / f"{name}.out").write_text("".join(f"{word[::-1]}\n" for word in words), encoding="utf-8")


def text_of(directory: Path, name: str) -> ParallelText.Params:
    """Params of the text that `write_words` has written."""
    return ParallelText.Params(data_dir=str(directory), source_files=f"{name}.in", target_files=f"{name}.out")


def task_params(**changes: Any) -> Translation.Params:
    """One layer on each side, 16 wide."""
    return Translation.Params(
        model_dim=16,
        source_embedding=Embedding.Params(scale_by_sqrt_dim=True),
        search=BeamSearch.Params(num_hyps_per_beam=2, target_seq_len=12),
        **stacks(num_layers=1, num_heads=2, hidden_dim=32, dropout=0.0, positions=SinusoidalPositions.Params()),
    ).replace(**changes)


def run_params(directory: Path, *, max_steps: int = 8, packed: bool = True, **learner: Any) -> Run.Params:
    """Params of a whole run on the words in `directory`, which are written."""
    write_words(directory)
    write_words(directory, name="valid", count=6)
    batching = Packing.Params(rows=4, source_length=32) if packed else Bucketing.Params(max_tokens=64)
    return Run.Params(
        name="test.Tiny",
        vocabulary=Vocabulary.Params(source=Bytes.Params()),
        task=task_params(),
        train_input=Input.Params(source=text_of(directory, "train"), batching=batching),
        eval_inputs={"valid": Input.Params(source=text_of(directory, "valid"), batching=batching)},
        learner=Learner.Params(
            **{"learning_rate": 1e-2, "schedule": Constant.Params(), "optimizer": AdamW.Params(), **learner}
        ),
        train=Program.Params(
            max_steps=max_steps,
            log_interval_steps=1,
            eval_interval_steps=4,
            precision="fp32",
            num_samples=2,
        ),
        checkpoint=Checkpointer.Params(interval_steps=4),
        tracking=Tracking.Params(progress="none"),
    )


def random_batch(*, rows: int = 8, length: int = 9, vocab_size: int = 30, seed: int = 0) -> NestedMap:
    """A batch of random tokens with padding at the ends, rows of unequal length."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, length + 1, (rows, 2), generator=generator)

    def side(column: int) -> NestedMap:
        positions = torch.arange(length).expand(rows, length)
        present = positions < lengths[:, column : column + 1]
        ids = torch.randint(4, vocab_size, (rows, length), generator=generator)
        return NestedMap(ids=ids * present, segment_ids=present.long(), positions=torch.where(present, positions, 0))

    source, target = side(0), side(1)
    target.labels = torch.randint(4, vocab_size, (rows, length), generator=generator) * target.segment_ids
    target.weights = target.segment_ids.float()
    return NestedMap(source=source, target=target)
