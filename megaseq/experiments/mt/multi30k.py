"""Multi30k (Elliott et al. 2016): captions of images, German to English, 29,000 pairs.

`--data-dir` holds train, val and test_2016_flickr as `NAME.de.gz` and `NAME.en.gz`, from the multi30k/dataset
repository.
"""

from __future__ import annotations

from megaseq.base import register
from megaseq.checkpoint import Checkpointer
from megaseq.data.input import Input
from megaseq.data.packing import Packing
from megaseq.data.source import ParallelText
from megaseq.data.tokenizer import SentencePiece
from megaseq.data.vocabulary import Vocabulary
from megaseq.decode import BeamSearch
from megaseq.layers.embedding import Embedding
from megaseq.layers.families import add_experts, stacks
from megaseq.layers.positions import SinusoidalPositions
from megaseq.layers.routing import Router
from megaseq.learner import AdamW, Cosine, InverseSqrt, Learner, MovingAverage, Warmup
from megaseq.tasks.translation import Translation
from megaseq.train.experiment import Experiment
from megaseq.train.program import Program

SMALL_STEPS = 3000


@register
class Base(Experiment):
    """German to English, Transformer base: 6+6 layers, 512 wide."""

    model_dim = 512
    hidden_dim = 2048
    num_heads = 8
    num_layers = 6
    dropout = 0.3

    def vocabulary(self) -> Vocabulary.Params:
        return Vocabulary.Params(source=SentencePiece.Params(vocab_size=8000))

    def task(self) -> Translation.Params:
        sides = stacks(
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            hidden_dim=self.hidden_dim,
            dropout=self.dropout,
            positions=SinusoidalPositions.Params(),
        )
        return Translation.Params(
            model_dim=self.model_dim,
            source_embedding=Embedding.Params(scale_by_sqrt_dim=True),
            label_smoothing=0.1,
            search=BeamSearch.Params(num_hyps_per_beam=5, length_normalization=1.0),
            **sides,
        )

    def _text(self, name: str) -> ParallelText.Params:
        return ParallelText.Params(source_files=f"{name}.de.gz", target_files=f"{name}.en.gz")

    def train_input(self) -> Input.Params:
        return Input.Params(source=self._text("train"), batching=Packing.Params(rows=32, source_length=128))

    def eval_inputs(self) -> dict[str, Input.Params]:
        names = ("val", "test_2016_flickr")
        # A score is that of the whole set, so nothing is left out of it.
        return {name: Input.Params(source=self._text(name), too_long="truncate", empty="keep") for name in names}

    def learner(self) -> Learner.Params:
        return Learner.Params(
            learning_rate=1e-3,
            schedule=Warmup.Params(num_steps=2000, schedule=InverseSqrt.Params()),
            optimizer=AdamW.Params(beta2=0.98),
            ema=MovingAverage.Params(decay=0.999),
        )

    def train(self) -> Program.Params:
        return Program.Params(max_steps=20_000, eval_interval_steps=500, decode_interval_steps=2000)


@register
class Small(Base):
    """German to English for two CPU cores: 3+3 layers, 256 wide; 14 passes over the corpus."""

    model_dim = 256
    hidden_dim = 1024
    num_heads = 4
    num_layers = 3
    dropout = 0.2

    def train_input(self) -> Input.Params:
        # Half the tokens a step, twice the steps: with few passes it is the number of updates that counts.
        return super().train_input().replace(batching=Packing.Params(rows=16, source_length=128))

    def learner(self) -> Learner.Params:
        return Learner.Params(
            learning_rate=2e-3,
            schedule=Warmup.Params(num_steps=400, schedule=Cosine.Params(end_step=SMALL_STEPS)),
            optimizer=AdamW.Params(beta2=0.98),
            ema=MovingAverage.Params(decay=0.998),
        )

    def train(self) -> Program.Params:
        return Program.Params(max_steps=SMALL_STEPS, eval_interval_steps=250)

    def checkpoint(self) -> Checkpointer.Params:
        return Checkpointer.Params(interval_steps=250)


@register
class Experts(Small):
    """Small with four experts, of which a token has two, in every second layer."""

    num_layers = 4

    def task(self) -> Translation.Params:
        task = super().task()
        for stack in (task.encoder, task.decoder):
            add_experts(stack, num_experts=4, router=Router.Params(method="top2"))
        return task
