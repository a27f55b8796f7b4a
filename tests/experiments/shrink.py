"""Makes any experiment small enough to take one step in a test, without its data."""

from __future__ import annotations

from pathlib import Path

from megaseq.data import Bucketing, Bytes, GeneratedSource, Packing, ParallelText, Source
from megaseq.data.tokenizer import Tokenizer
from megaseq.layers.attention import Attention
from megaseq.layers.feed_forward import FeedForward
from megaseq.layers.transformer import Stack
from megaseq.train.experiment import Run

LINES = ("a b c d", "e f g", "h i j k l", "m n o", "p q r s", "t u v w", "x y z", "a c e g")


def shrink(params: Run.Params, *, directory: Path) -> Run.Params:
    """Returns `params` with a model 16 wide of one layer, byte tokenizers and a text of eight lines."""
    small = params.copy()
    for suffix in ("in", "out"):
        (directory / f"tiny.{suffix}").write_text("".join(f"{line}\n" for line in LINES * 8), encoding="utf-8")
    _shrink_data(small, directory=directory)
    _shrink_model(small)
    small.train.max_steps = 1
    small.train.accumulation = 1
    small.train.precision = "fp32"
    small.train.log_interval_steps = 1
    small.tracking.progress = "none"
    small.tracking.wandb = False
    return small


def _shrink_data(params: Run.Params, *, directory: Path) -> None:
    for path, tokenizer in params.vocabulary.find(Tokenizer):
        params.vocabulary.set(path, Bytes.Params(tags=tokenizer.tags))
    text = ParallelText.Params(data_dir=str(directory), source_files="tiny.in", target_files="tiny.out")
    for data in (params.train_input, *params.eval_inputs.values()):
        data.num_workers = 0
        for path, source in data.find(Source):
            if isinstance(source, GeneratedSource.Params):
                source.num_examples = 64
            else:
                data.set(path, text.replace(tag=source.tag))
        if isinstance(data.batching, Packing.Params):
            data.batching.rows, data.batching.source_length = 2, 128
        elif isinstance(data.batching, Bucketing.Params):
            data.batching = Bucketing.Params(max_tokens=256)


def _shrink_model(params: Run.Params) -> None:
    task = params.task
    for _, stack in task.find(Stack):
        stack.num_layers, stack.layers = 1, {}
    for _, attention in task.find(Attention):
        attention.num_heads = 2
        if attention.num_key_value_heads is not None:
            attention.num_key_value_heads = 1
    for _, ffn in task.find(FeedForward):
        ffn.hidden_dim = 32
    task.set("model_dim", 16)
