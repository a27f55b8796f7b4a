"""Runs a function on several ranks, forked from a server that has torch and DeepSpeed imported already."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def _server() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.distributed.preload"])
    return context


def _rank_main(
    function: Callable[..., Any], rank: int, world_size: int, store: str, connection: Any, arguments: Sequence[Any]
) -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    torch.set_num_threads(1)
    try:
        if world_size > 1:
            dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
        result = function(rank, *arguments)
        connection.send(("done", result))
        # A rank that leaves early would break the collectives by which the others leave.
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()
    except BaseException:
        connection.send(("failed", traceback.format_exc()))
        connection.close()
        os._exit(1)
    connection.close()
    os._exit(0)


def run_ranks(
    function: Callable[..., Any], *, world_size: int, arguments: Sequence[Any] = (), timeout_seconds: float = 400.0
) -> list[Any]:
    """Calls `function(rank, *arguments)` on `world_size` gloo ranks; returns what each returned, by rank.

    Args:
        function: at the top of an importable module.
        world_size: processes; one needs no process group and gets none.
        arguments: picklable.
        timeout_seconds: after which all are killed and the test fails.

    Raises:
        AssertionError: a rank failed, with its traceback, or did not end in time.
    """
    context = _server()
    results: dict[int, Any] = {}
    with tempfile.TemporaryDirectory(prefix="megaseq-ranks-") as scratch:
        store = str(Path(scratch) / "store")
        pipes, processes = [], []
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(
                target=_rank_main, args=(function, rank, world_size, store, sender, tuple(arguments)), daemon=True
            )
            process.start()
            sender.close()
            pipes.append(receiver)
            processes.append(process)
        deadline = time.monotonic() + timeout_seconds
        waiting = dict(zip(pipes, range(world_size), strict=True))
        try:
            while waiting:
                ready = multiprocessing.connection.wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
                if not ready:
                    raise AssertionError(f"ranks {sorted(waiting.values())} did not end in {timeout_seconds:g} s")
                for pipe in ready:
                    rank = waiting.pop(pipe)
                    try:
                        state, value = pipe.recv()
                    except EOFError:
                        raise AssertionError(f"rank {rank} died without a word") from None
                    if state == "failed":
                        raise AssertionError(f"rank {rank} failed:\n{value}")
                    results[rank] = value
            for process in processes:
                process.join(timeout=30)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                    process.join()
    return [results[rank] for rank in range(world_size)]
