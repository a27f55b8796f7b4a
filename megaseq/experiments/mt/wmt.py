"""WMT 2014 (Bojar et al. 2014): news, English to German, 4.5 million pairs.

`--data-dir` holds `train.*.en.gz` and `train.*.de.gz`, which may be several files a side, and newstest2013 and
newstest2014 as `NAME.en` and `NAME.de`.
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
from megaseq.layers.families import stacks
from megaseq.layers.positions import SinusoidalPositions
from megaseq.learner import AdamW, InverseSqrt, Learner, Warmup
from megaseq.tasks.translation import Translation
from megaseq.train.experiment import Experiment
from megaseq.train.program import Program


@register
class Big(Experiment):
    """English to German, Transformer big: 6+6 layers, 1024 wide (Vaswani et al. 2017, table 3)."""

    model_dim = 1024
    hidden_dim = 4096
    num_heads = 16
    num_layers = 6
    dropout = 0.3
    warm_up_steps = 4000

    def vocabulary(self) -> Vocabulary.Params:
        return Vocabulary.Params(source=SentencePiece.Params(vocab_size=37_000, model_type="bpe"))

    def task(self) -> Translation.Params:
        sides = stacks(
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            hidden_dim=self.hidden_dim,
            dropout=self.dropout,
            residual="post",
            positions=SinusoidalPositions.Params(),
        )
        return Translation.Params(
            model_dim=self.model_dim,
            source_embedding=Embedding.Params(scale_by_sqrt_dim=True),
            label_smoothing=0.1,
            search=BeamSearch.Params(num_hyps_per_beam=4, length_normalization=0.6),
            **sides,
        )

    def train_input(self) -> Input.Params:
        text = ParallelText.Params(source_files="train.*.en.gz", target_files="train.*.de.gz")
        # 25,000 tokens a side, as in the paper; 128 rows can be dealt out to 128 data ranks.
        return Input.Params(source=text, batching=Packing.Params(rows=128, source_length=200))

    def eval_inputs(self) -> dict[str, Input.Params]:
        names = ("newstest2013", "newstest2014")
        return {
            name: Input.Params(
                source=ParallelText.Params(source_files=f"{name}.en", target_files=f"{name}.de"),
                too_long="truncate",
                empty="keep",
            )
            for name in names
        }

    def learner(self) -> Learner.Params:
        return Learner.Params(
            # The peak of d^-0.5 min(step^-0.5, step warm_up^-1.5), equation 3.
            learning_rate=(self.model_dim * self.warm_up_steps) ** -0.5,
            schedule=Warmup.Params(num_steps=self.warm_up_steps, schedule=InverseSqrt.Params()),
            optimizer=AdamW.Params(beta2=0.98, epsilon=1e-9),
            weight_decay=0.0,
        )

    def train(self) -> Program.Params:
        return Program.Params(max_steps=300_000, eval_interval_steps=5000, decode_interval_steps=50_000)

    def checkpoint(self) -> Checkpointer.Params:
        # The paper averages the last 20 checkpoints: `megaseq checkpoint average`.
        return Checkpointer.Params(interval_steps=1500, keep_last=20)
