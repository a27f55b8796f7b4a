"""Translation: an encoder-decoder trained on pairs of texts by cross entropy, decoded by a search."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Self

from torch import Tensor

from megaseq.base import Configurable, NestedMap
from megaseq.base.fields import fields_of
from megaseq.decode import BeamSearch, Hypothesis, Search
from megaseq.kernels.cross_entropy import CrossEntropy, linear_cross_entropy
from megaseq.layers.encoder_decoder import EncoderDecoder
from megaseq.layers.units import OUTPUT
from megaseq.tasks.base import BaseTask, LossOutput


class Translation(BaseTask, EncoderDecoder):
    """Maps a source text to a target text; also summarisation, and everything else that is text to text."""

    class Params(BaseTask.Params, EncoderDecoder.Params):
        label_smoothing: float = 0.0
        """Share of the target distribution that is uniform over the vocabulary (Szegedy et al., 2016)."""
        z_loss: float = 0.0
        """Factor of log(normaliser)^2 in the loss, which keeps logits near their natural scale (PaLM uses 1e-4)."""
        search: Search.Params = BeamSearch.Params()
        """How the task decodes: beam search, greedy or sampling."""

        @classmethod
        def of(cls, model: EncoderDecoder.Params, **options: Any) -> Self:
            """Returns the task with the layers of `model`, one of `layers.families`, say, and these `options`."""
            own = {name: model.get(name) for name in fields_of(EncoderDecoder.Params) if name != "cls"}
            return cls(**own | options)

        def validate(self) -> Iterator[Any]:
            """Reports values out of range."""
            yield from super().validate()
            if not 0.0 <= self.label_smoothing < 1.0:
                yield f"label_smoothing: must be in [0, 1), but is {self.label_smoothing}. 0.1 is usual."
            if self.z_loss < 0.0:
                yield f"z_loss: must not be negative, but is {self.z_loss}. Use 0 for none."

    params: Params

    def __init__(self, p: Params) -> None:
        super().__init__(p)
        self._loss = CrossEntropy(
            label_smoothing=p.label_smoothing,
            z_loss=p.z_loss,
            scale=self.output_scale,
            soft_cap=p.logits_soft_cap,
        )

    def compute_loss(self, batch: NestedMap) -> LossOutput:
        """Returns the loss of the target labels of `batch` (source and target, [B, S] and [B, T]), summed.

        Metrics: `nll`, negative log likelihood without smoothing in nats a token, and `accuracy`, the share of labels
        that have the highest logit.
        """
        self.begin_losses()
        return self._loss_of(self.decode_hidden(batch.target, memory=self.encode(batch.source)), batch=batch)

    def output_of(self, carry: Mapping[str, Tensor], *, batch: NestedMap) -> LossOutput:
        """Returns what `compute_loss` does, of what the last of `units` left."""
        return self._loss_of(carry[OUTPUT], batch=batch)

    def _loss_of(self, hidden: Tensor, *, batch: NestedMap) -> LossOutput:
        head = self.softmax_weights()
        sums = linear_cross_entropy(
            hidden.reshape(-1, hidden.shape[-1]),
            weight=head.weight,
            bias=head.bias,
            labels=batch.target.labels.reshape(-1),
            weights=batch.target.weights.reshape(-1),
            settings=self._loss,
            vocabulary=self.vocabulary_share(),
        )
        total = sums.weight.detach()
        metrics = {"nll": (sums.nll.detach(), total), "accuracy": (sums.correct.detach(), total)}
        if self.params.z_loss:
            metrics["z_loss"] = (sums.z_loss.detach(), total)
        added = self.take_losses()
        if added is None:
            return LossOutput(loss_sum=sums.loss, weight=total, metrics=metrics)
        loss, of_layers = added
        return LossOutput(
            loss_sum=sums.loss + loss.to(sums.loss.dtype), weight=total, metrics=metrics | dict(of_layers)
        )

    def decode(
        self, source: NestedMap, *, search: Configurable.Params, keys: Tensor | None = None
    ) -> list[list[Hypothesis]]:
        """Decodes `source` (ids, segment_ids, positions [B, S], one text a row); see `Search.search`.

        A search without own special tokens has those of the task's search, which are the vocabulary's.
        """
        own, search = self.params.search, search.copy()
        for name in ("target_sos_id", "target_eos_id"):
            if search.get(name) is None:
                search.set(name, own.get(name))
        searcher: Search = search.instantiate()
        return searcher.search(self, source=source, keys=keys)

    def default_search(self) -> Configurable.Params:
        """Returns `search` of the params."""
        return self.params.search
