"""Time to pack 5 million pairs on one core in C++ and in NumPy, and how full the rows of Multi30k are.

    python benchmarks/packing.py [--pairs 5000000] [--data-dir DIR]

DIR holds train.de.gz and train.en.gz; without it, only the time is measured. The pairs' lengths are those of captions:
log-normal with a median of 15 tokens, the target in proportion, with noise.
"""

from __future__ import annotations

import argparse
import gzip
import io
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import sentencepiece
from rich.console import Console
from rich.table import Table

from megaseq.base import native
from megaseq.data.bucketing import Bucketing
from megaseq.data.order import num_windows, permute, window_range
from megaseq.data.packing import Packing
from megaseq.data.plan import Batching

Lengths = npt.NDArray[Any]


def main() -> None:
    """Prints the two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5_000_000)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--vocab-size", type=int, default=8000)
    arguments = parser.parse_args()
    console = Console()
    console.print(native.describe())
    console.print(time_table(arguments.pairs))
    if arguments.data_dir is not None:
        console.print(fill_table(*multi30k_lengths(arguments.data_dir, arguments.vocab_size)))


def time_table(pairs: int) -> Table:
    """Times a whole epoch: its order, and the plan of each of its windows. All of it is single-threaded."""
    generator = np.random.default_rng(0)
    source = np.clip(np.rint(generator.lognormal(2.7, 0.35, pairs)), 4, 100).astype(np.uint16)
    target = np.clip(np.rint(0.96 * source + generator.normal(0, 2.5, pairs)), 3, 100).astype(np.uint16)
    table = Table("implementation", "order, CPU s", "packing, CPU s", "pairs/s", "source fill", "target fill")
    table.title = f"One epoch of {pairs:,} pairs, rows of 256 tokens, one core"
    for name, switch in (("C++", "1"), ("NumPy", "0")):
        os.environ["MEGASEQ_NATIVE"] = switch
        if switch == "1" and not native.available():
            table.add_row(name, "not built", "", "", "", "")
            continue
        order_seconds, pack_seconds, fill = time_epoch(source, target)
        seconds = order_seconds + pack_seconds
        row = (name, f"{order_seconds:.2f}", f"{pack_seconds:.2f}", f"{pairs / seconds:,.0f}")
        table.add_row(*row, f"{fill[0]:.4f}", f"{fill[1]:.4f}")
    os.environ.pop("MEGASEQ_NATIVE")
    return table


def time_epoch(source: Lengths, target: Lengths) -> tuple[float, float, tuple[float, float]]:
    """Returns the seconds of the order and of the packing, and the last window's fill."""
    batching = Packing.Params().instantiate()
    batching.fit(source_lengths=source, target_lengths=target)
    size, window = len(source), batching.params.window
    order_seconds = pack_seconds = 0.0
    fill = (0.0, 0.0)
    for index in range(num_windows(size=size, window=window)):
        start, stop = window_range(size=size, window=window, index=index)
        begin = time.process_time()
        order = permute(seed=1, epoch=0, size=size, start=start, stop=stop)
        middle = time.process_time()
        lengths: dict[str, Any] = {"source_lengths": source[order], "target_lengths": target[order]}
        plan = batching.plan(seed=1, epoch=0, window=index, **lengths)
        order_seconds += middle - begin
        pack_seconds += time.process_time() - middle
        fill = plan.fill(**lengths)
    return order_seconds, pack_seconds, fill


def multi30k_lengths(data_dir: Path, vocab_size: int) -> tuple[Lengths, Lengths]:
    """Returns the tokens of each pair, end of sentence included, under joint SentencePiece pieces."""
    sides = []
    for language in ("de", "en"):
        with gzip.open(data_dir / f"train.{language}.gz", "rt", encoding="utf-8") as file:
            sides.append(file.read().splitlines())
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sides[0] + sides[1]), model_writer=model, vocab_size=vocab_size, minloglevel=2
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    source, target = (np.array([len(ids) + 1 for ids in processor.encode(side)], dtype=np.uint16) for side in sides)
    return source, target


def fill_table(source: Lengths, target: Lengths) -> Table:
    """Compares the part of the tokens that is not padding, empty rows of the last batch included."""
    table = Table("batching", "shape", "batches", "source fill", "target fill")
    table.title = f"Multi30k, {len(source):,} pairs: non-pad fraction of all batches of an epoch"
    order = permute(seed=1, epoch=0, size=len(source))
    source, target = source[order], target[order]
    longest = int(max(source.max(), target.max()))
    choices: list[tuple[str, Batching]] = [
        (f"packing, {8192 // length} rows", Packing.Params(source_length=length, rows=8192 // length).instantiate())
        for length in (128, 256, 512)
    ]
    bucketing = Bucketing.Params(max_tokens=8192, num_buckets=16, max_length=longest).instantiate()
    random = Bucketing.Params(max_tokens=8192, bucket_upper_bound=(longest,)).instantiate()
    for name, batching in [*choices, ("bucketing, 16 buckets", bucketing), ("no bucketing", random)]:
        batching.fit(source_lengths=source, target_lengths=target)
        plan = batching.plan(seed=1, epoch=0, window=0, source_lengths=source, target_lengths=target)
        shapes = sorted(set(zip(plan.source_lengths.tolist(), plan.target_lengths.tolist(), strict=True)))
        shape = f"{shapes[0][0]} x {shapes[0][1]}" if len(shapes) == 1 else f"{len(shapes)} shapes"
        fill = plan.fill(source_lengths=source, target_lengths=target)
        table.add_row(name, shape, str(plan.num_batches), f"{fill[0]:.4f}", f"{fill[1]:.4f}")
    return table


if __name__ == "__main__":
    main()
