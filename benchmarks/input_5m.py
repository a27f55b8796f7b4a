"""Input of 5 million pairs: resident memory, time to the first batch, and tokens per second of batches.

    python benchmarks/input_5m.py

Writes two files of made-up text (about 1 GB) and its caches to a temporary directory, or to `--directory`, where a
second run finds them. Each measurement is taken in a process of its own, so that its peak is that process's alone.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

SPACE_LIMIT = 1 << 30
FIRST_BATCH_LIMIT_SECONDS = 5.0
WORDS = 30_000
_PIECES = ("an", "be", "che", "do", "ei", "fu", "gra", "hin", "is", "ko", "lu", "men", "no", "pa", "ren", "sch", "ta")


def write_text(directory: Path, *, pairs: int, seed: int = 1) -> None:
    """Writes `pairs` lines of 6 to 20 words a side, words by Zipf's law; about 10 to 30 tokens a side."""
    if (directory / "train.done").exists():
        return
    generator = np.random.default_rng(seed)
    weights = 1.0 / np.arange(10, WORDS + 10)
    cumulative = np.cumsum(weights / weights.sum())
    for side in ("src", "tgt"):
        pieces = generator.integers(0, len(_PIECES), size=(WORDS, 4))
        sizes = generator.integers(1, 5, size=WORDS)
        words = [side[0] + "".join(_PIECES[i] for i in row[:size]) for row, size in zip(pieces, sizes, strict=True)]
        with open(directory / f"train.{side}", "w") as file:
            for start in range(0, pairs, 50_000):
                lengths = np.random.default_rng([seed, start]).integers(6, 21, size=min(50_000, pairs - start))
                drawn = np.searchsorted(cumulative, generator.random(int(lengths.sum()))).tolist()
                ends = np.cumsum(lengths).tolist()
                lines = (
                    " ".join(words[i] for i in drawn[end - n : end])
                    for end, n in zip(ends, lengths.tolist(), strict=True)
                )
                file.write("\n".join(lines) + "\n")
    (directory / "train.done").touch()


def open_input(directory: Path) -> Any:
    """Opens the training input, making what is not there yet."""
    from megaseq.data import Input, Packing, ParallelText, Vocabulary

    source = ParallelText.Params(data_dir=str(directory), source_files="train.src", target_files="train.tgt")
    vocabulary = Vocabulary.Params(max_learning_lines=200_000).instantiate(
        learn_from=source, cache_dir=directory / "cache"
    )
    p = Input.Params(source=source, batching=Packing.Params(rows=64))
    return p.instantiate(vocabulary=vocabulary, cache_dir=directory / "cache")


def build_caches(directory: Path) -> dict[str, Any]:
    """Learns the tokenizer and tokenizes, unless that is done already."""
    began = time.monotonic()
    made = open_input(directory)
    return {"seconds": time.monotonic() - began, "pairs": made.num_examples}


def read_batches(directory: Path, seconds: float) -> dict[str, Any]:
    """Times the first batch, with opening everything, and then reads batches for some seconds."""
    import torch  # noqa: F401  Its import is not part of the input.

    from megaseq.data import Input  # noqa: F401

    began = time.monotonic()
    made = open_input(directory)
    stream = iter(made)
    next(stream)
    first = time.monotonic() - began
    tokens = room = batches = 0
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        batch = next(stream)
        tokens += int((batch.source.segment_ids > 0).sum()) + int((batch.target.segment_ids > 0).sum())
        room += batch.source.ids.numel() + batch.target.ids.numel()
        batches += 1
    took = time.monotonic() - began
    return {
        "first": first,
        "tokens_per_second": tokens / took,
        "batches_per_second": batches / took,
        "fill": tokens / room,
        "position": made.position,
    }


def measured(work: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Runs `work` in a new process and returns its result with `peak`, the most resident bytes that it had."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(sender, work, arguments))
    process.start()
    sender.close()
    try:
        result: dict[str, Any] = receiver.recv()
    except EOFError:
        sys.exit(f"input_5m: {work.__name__} failed.")
    finally:
        process.join()
    return result


def _run(sender: Connection, work: Callable[..., dict[str, Any]], arguments: tuple[Any, ...]) -> None:
    logging.basicConfig(level=logging.INFO, format="  %(message)s")
    peak = [0]
    threading.Thread(target=_watch, args=(peak,), daemon=True).start()
    result = work(*arguments)
    peak[0] = max(peak[0], _high_water())
    sender.send({**result, "peak": peak[0]})


def _watch(peak: list[int]) -> None:
    """Reads the resident memory as the kernel counts it, mapped pages of files included, ten times a second."""
    page = 4096
    while True:
        peak[0] = max(peak[0], int(Path("/proc/self/statm").read_text().split()[1]) * page)
        time.sleep(0.1)


def _high_water() -> int:
    """The kernel's own high-water mark of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def main() -> int:
    """Prints one table; returns 1 if a limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5_000_000)
    parser.add_argument("--seconds", type=float, default=30.0, help="how long batches are read")
    parser.add_argument("--directory", type=Path, help="keeps text and caches here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        directory = options.directory or Path(temporary)
        directory.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        write_text(directory, pairs=options.pairs)
        print(f"text      {options.pairs:,} pairs written in {time.monotonic() - began:.0f} s")
        built = measured(build_caches, directory)
        print(f"caches    built in {built['seconds']:.0f} s, peak resident {built['peak'] / 2**20:,.0f} MiB")
        read = measured(read_batches, directory, options.seconds)
    print(
        f"batches   first after {read['first']:.2f} s (limit {FIRST_BATCH_LIMIT_SECONDS:.0f} s once the caches stand)"
    )
    print(f"          {read['tokens_per_second']:,.0f} tokens/s, source and target, without padding")
    print(f"          {read['batches_per_second']:,.0f} batches/s, {read['fill']:.3f} of their room is tokens")
    peak = max(built["peak"], read["peak"])
    print(
        f"memory    peak resident {read['peak'] / 2**20:,.0f} MiB reading, {peak / 2**20:,.0f} MiB in all (limit 1,024)"
    )
    return int(peak > SPACE_LIMIT or read["first"] > FIRST_BATCH_LIMIT_SECONDS)


if __name__ == "__main__":
    sys.exit(main())
