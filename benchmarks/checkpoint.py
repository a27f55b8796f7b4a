"""Time of saving and restoring, and how long training stands still for it, in one process and on several ranks.

    python benchmarks/checkpoint.py --megabytes 90 --ranks 1 4

The state is that of a Transformer with fp32 parameters of so many megabytes, and Adam's two moments: three times that.
`replicated` is data parallel without ZeRO, `shared` has a run of every tensor's elements on each rank, as ZeRO does.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megaseq.checkpoint import Checkpointer, Piece, Ranks, fragment_pieces, whole_piece

WIDTH = 512


def pieces_of(*, megabytes: float, rank: int, ranks: int, shared: bool) -> list[Piece]:
    """This rank's pieces of matrices [2048, 512]."""
    shape = (4 * WIDTH, WIDTH)
    count = max(1, round(megabytes * 1e6 / 4 / (shape[0] * shape[1])))
    found: list[Piece] = []
    for index in range(count):
        for prefix in ("task", "learner.first_moment.task", "learner.second_moment.task"):
            name = f"{prefix}.layers.{index}.weight"
            if not shared:
                found.append(whole_piece(name, torch.rand(shape)))
                continue
            total = shape[0] * shape[1]
            first, stop = total * rank // ranks, total * (rank + 1) // ranks
            found += fragment_pieces(name, torch.rand(stop - first), first=first, shard=None, global_shape=shape)
    return found


def measure(rank: int, size: int, folder: str, options: argparse.Namespace, shared: bool, results: Any) -> None:
    """Saves and restores several times on one rank; rank 0 tells the medians."""
    torch.set_num_threads(1)
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    ranks = Ranks()
    checkpointer = Checkpointer.Params(keep_last=1).instantiate(directory=Path(folder) / "checkpoints", ranks=ranks)
    pieces = pieces_of(megabytes=options.megabytes, rank=rank, ranks=size, shared=shared)
    stalls, writes, restores = [], [], []
    for step in range(1, options.repeats + 2):
        ranks.gather(None)
        begin = time.perf_counter()
        checkpointer.save(step=step, tensors=pieces, state={})
        stalls.append(max(ranks_max(ranks, checkpointer)))
        checkpointer.wait()
        writes.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        checkpointer.restore(tensors=pieces)
        restores.append(time.perf_counter() - begin)
    if rank == 0:
        kept = [sorted(values[1:])[len(values[1:]) // 2] for values in (stalls, writes, restores)]
        results.put([stalls[0], *kept])
    if size > 1:
        dist.barrier()
        dist.destroy_process_group()


def ranks_max(ranks: Ranks, checkpointer: Checkpointer) -> list[float]:
    """The stall of each rank; their writers are left in peace: the process group of training is asked."""
    stalls: list[Any] = [checkpointer.stall_seconds]
    if ranks.size > 1:
        stalls = [None] * ranks.size
        dist.all_gather_object(stalls, checkpointer.stall_seconds)
    return stalls


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=90.0, help="of fp32 parameters")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", help="where to write; a temporary directory if not given")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    print(f"{'ranks':>5}  {'state':<10}  {'first stall':>11}  {'stall':>7}  {'written':>7}  {'restored':>8}   seconds")
    context = multiprocessing.get_context("spawn")
    for size in options.ranks:
        for shared in (False, True) if size > 1 else (False,):
            with tempfile.TemporaryDirectory(dir=options.folder) as folder:
                results = context.Queue()
                processes = [
                    context.Process(target=measure, args=(rank, size, folder, options, shared, results))
                    for rank in range(size)
                ]
                for process in processes:
                    process.start()
                first, stall, write, restore = results.get()
                for process in processes:
                    process.join()
            kind = "shared" if shared else "replicated" if size > 1 else "whole"
            print(f"{size:>5}  {kind:<10}  {first:>11.3f}  {stall:>7.3f}  {write:>7.2f}  {restore:>8.2f}", flush=True)


if __name__ == "__main__":
    main()
