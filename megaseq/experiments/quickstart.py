"""The first experiment to run: learns from data it makes itself, in a few minutes, on two CPU cores."""

from __future__ import annotations

from megaseq.base import register
from megaseq.data.input import Input
from megaseq.data.numbers import TAGS
from megaseq.data.numbers import Numbers as NumbersSource
from megaseq.data.packing import Packing
from megaseq.data.tokenizer import SentencePiece
from megaseq.data.vocabulary import Vocabulary
from megaseq.decode import BeamSearch
from megaseq.layers.embedding import Embedding
from megaseq.layers.families import stacks
from megaseq.layers.positions import SinusoidalPositions
from megaseq.learner import AdamW, Learner, Linear, Warmup
from megaseq.tasks.translation import Translation
from megaseq.train.experiment import Experiment
from megaseq.train.program import Program

MAX_STEPS = 900


@register
class Numbers(Experiment):
    """Numbers, dates and times in English words, translated to German and French words."""

    def vocabulary(self) -> Vocabulary.Params:
        return Vocabulary.Params(source=SentencePiece.Params(vocab_size=400, tags=TAGS))

    def task(self) -> Translation.Params:
        return Translation.Params(
            model_dim=128,
            source_embedding=Embedding.Params(scale_by_sqrt_dim=True),
            search=BeamSearch.Params(num_hyps_per_beam=4),
            **stacks(num_layers=2, num_heads=4, hidden_dim=512, dropout=0.0, positions=SinusoidalPositions.Params()),
        )

    def train_input(self) -> Input.Params:
        return Input.Params(
            source=NumbersSource.Params(num_examples=40_000),
            batching=Packing.Params(rows=16, source_length=128),
        )

    def eval_inputs(self) -> dict[str, Input.Params]:
        source = NumbersSource.Params(num_examples=1000, held_out=True)
        return {"held_out": Input.Params(source=source, too_long="truncate")}

    def learner(self) -> Learner.Params:
        return Learner.Params(
            learning_rate=3e-3,
            schedule=Warmup.Params(num_steps=100, schedule=Linear.Params(end_step=MAX_STEPS)),
            optimizer=AdamW.Params(beta2=0.98),
        )

    def train(self) -> Program.Params:
        return Program.Params(max_steps=MAX_STEPS, log_interval_steps=50, eval_interval_steps=300)
