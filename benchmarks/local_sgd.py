"""DiLoCo beside synchronous training: the same model, data and number of steps, loss and bytes.

    python benchmarks/local_sgd.py --data-dir PATH_OF_MULTI30K [--workers 2 4] [--steps N] [--inner-steps H]

A tiny Transformer learns Multi30k. The synchronous run sees the whole batch at every step; of N workers each sees an
N-th of it. As in the paper, the workers part when the model has learned something: they begin with weights, moments
and data position of the synchronous run after `--common-steps`. Workers are threads here, but they meet at a real
server over TCP, and the bytes are those that went through it. What synchronous training on N workers sends is reckoned,
not measured: a ring all-reduce of fp32 gradients sends 2 (N - 1) / N times the parameters from each worker at every
step.

Columns: loss of the validation set (label smoothing included) after the last step, relative to the synchronous one;
bytes that a worker sends after it has joined, and what synchronous training would send for each of them. A worker
receives as much as it sends, but where changes are compressed, once more all parameters at the end.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megaseq.base import apply_overrides, registry
from megaseq.cli.overrides import set_data_dir
from megaseq.data.vocabulary import Vocabulary
from megaseq.parallel.place import Place
from megaseq.parallel.process import Team
from megaseq.train import parts
from megaseq.train.engine import Engine
from megaseq.train.evaluation import evaluate
from megaseq.train.experiment import Run
from megaseq.train.local_sgd.params import LocalSGD
from megaseq.train.local_sgd.server import OuterServer
from megaseq.train.local_sgd.worker import Worker

TINY = {
    "task": "model_dim=96 encoder.num_layers=1 decoder.num_layers=1 encoder.dropout=0.1 decoder.dropout=0.1",
    "task.encoder.layer": "self_attention.num_heads=4 ffn.hidden_dim=192",
    "task.decoder.layer": "self_attention.num_heads=4 cross_attention.num_heads=4 ffn.hidden_dim=192",
    "learner": "ema=null schedule.num_steps=50",
    "train_input.batching": "source_length=64",
}


class Trained(NamedTuple):
    """What came of a run."""

    loss: float
    sent_bytes: float
    """By one worker."""


class Common(NamedTuple):
    """Where the synchronous run stood when the workers part."""

    tensors: dict[str, torch.Tensor]
    learner: dict[str, Any]
    data: dict[str, Any]


def run_params(arguments: argparse.Namespace) -> Run.Params:
    """The tiny experiment."""
    params: Run.Params = registry.params("mt.multi30k.Small")
    sizes = (
        f"vocabulary.source.vocab_size={arguments.vocab_size} train_input.batching.rows={arguments.rows} "
        f"learner.learning_rate={arguments.learning_rate} learner.schedule.schedule.end_step={arguments.steps} "
        f"train.max_steps={arguments.steps} train.precision=fp32"
    )
    tiny = [f"{path}.{item}" for path, items in TINY.items() for item in items.split()]
    apply_overrides(params, assignments=[*tiny, *sizes.split()])
    set_data_dir(params, str(arguments.data_dir))
    return params


class Bench:
    """The data, once for all runs."""

    def __init__(self, arguments: argparse.Namespace, *, cache: Path) -> None:
        self.arguments = arguments
        self.params = run_params(arguments)
        self.cache = cache
        self._common: Common | None = None
        self.vocabulary: Vocabulary = self.params.vocabulary.instantiate(
            learn_from=self.params.train_input.source, cache_dir=cache
        )

    def train(self, *, workers: int, **settings: object) -> Trained:
        """Trains with so many workers; 1 is synchronous training, without a server."""
        results: dict[int, Trained] = {}
        server = OuterServer("127.0.0.1:0")
        server.start()

        def work(index: int) -> None:
            torch.set_num_threads(1)
            local = LocalSGD.Params(workers=workers, worker=index, address=server.address, **settings)
            results[index] = self._work(local if workers > 1 else LocalSGD.Params(), index=index, workers=workers)

        threads = [threading.Thread(target=work, args=(index,)) for index in range(workers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        server.close()
        return Trained(loss=results[0].loss, sent_bytes=max(result.sent_bytes for result in results.values()))

    def _work(self, local: LocalSGD.Params, *, index: int, workers: int) -> Trained:
        p = self.params
        engine = Engine(
            parts.task_params(p, vocabulary=self.vocabulary),
            learner_params=p.learner,
            seed=p.seed,
            precision=p.train.precision,
        )
        data = parts.train_input(p, vocabulary=self.vocabulary, cache=self.cache, data_rank=index, data_ranks=workers)
        first, sent = 0, 0.0
        if self._common is not None:
            for piece in engine.pieces():
                piece.tensor.copy_(self._common.tensors[piece.name])
            engine.loaded(learner_state=self._common.learner)
            data.load_state_dict(self._common.data)
            first = self.arguments.common_steps
        worker = Worker.of(local, engine=engine, team=Team(Place()))
        if worker is not None:
            worker.join()
            sent = -worker.figures()["local_sgd/sent_bytes"]
        batches = iter(data)
        for step in range(first, self.arguments.steps):
            if worker is None and self._common is None and step == self.arguments.common_steps:
                tensors = {name: tensor.clone() for name, tensor in engine.state_tensors().items()}
                self._common = Common(tensors, learner=engine.learner.state(), data=data.state_dict())
            engine.train_step(next(batches), step=step)
            if worker is not None:
                worker.after_step(last=step + 1 == self.arguments.steps)
        if worker is not None:
            sent += worker.figures()["local_sgd/sent_bytes"]
            worker.leave(finished=True)
        return Trained(loss=self._loss(engine) if index == 0 else 0.0, sent_bytes=sent)

    def _loss(self, engine: Engine) -> float:
        inputs = parts.eval_inputs(self.params, vocabulary=self.vocabulary, cache=self.cache, names=("val",))
        with engine.evaluating(averaged=False) as task:
            return evaluate(task, batches=inputs["val"].epoch_batches())["loss"]

    def num_parameters(self) -> int:
        """Elements that are exchanged."""
        task = parts.task_params(self.params, vocabulary=self.vocabulary).instantiate()
        return sum(parameter.numel() for parameter in task.parameters())


def main() -> None:
    """Reads the options, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--common-steps", type=int, default=300, help="synchronous steps before the workers part")
    parser.add_argument("--inner-steps", type=int, default=50)
    parser.add_argument("--outer-learning-rate", type=float, default=0.8)
    parser.add_argument("--outer-momentum", type=float, default=0.3)
    parser.add_argument("--compressions", nargs="+", default=["none", "int8"], choices=["none", "bfloat16", "int8"])
    parser.add_argument("--rows", type=int, default=8, help="rows of 64 tokens of the whole batch")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--vocab-size", type=int, default=2000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(arguments, cache=Path(folder))
        count = bench.num_parameters()
        print(f"{count / 1e6:.2f} M parameters, {arguments.steps} steps, exchanges every {arguments.inner_steps}")
        print(
            f"{'workers':>7} {'sent as':>8} {'loss':>8} {'excess':>8} {'MB sent':>9} {'synchronous':>12} {'share':>9}"
        )
        began = time.perf_counter()
        basis = bench.train(workers=1).loss
        print(
            f"{1:7} {'':>8} {basis:8.4f} {'':>8} {'':>9} {'':>12} {'':>9}  {time.perf_counter() - began:.0f} s",
            flush=True,
        )
        for workers in arguments.workers:
            for compression in arguments.compressions:
                began = time.perf_counter()
                done = bench.train(
                    workers=workers,
                    inner_steps=arguments.inner_steps,
                    compression=compression,
                    outer_learning_rate=arguments.outer_learning_rate,
                    outer_momentum=arguments.outer_momentum,
                )
                every_step = (arguments.steps - arguments.common_steps) * 4.0 * count * 2 * (workers - 1) / workers
                print(
                    f"{workers:7} {compression:>8} {done.loss:8.4f} {done.loss / basis - 1:8.2%} "
                    f"{done.sent_bytes / 1e6:9.2f} {every_step / 1e6:12.1f} 1/{every_step / done.sent_bytes:<7.1f} "
                    f" {time.perf_counter() - began:.0f} s",
                    flush=True,
                )


if __name__ == "__main__":
    main()
