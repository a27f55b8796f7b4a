"""Beam search on a GPU: a whole loop of steps, driven by the host, kept on the device, or recorded in a CUDA graph.

    python benchmarks/decode_gpu.py [--batch-sizes N ...] [--steps N] [--repeats N] [--model-dim N] [--num-layers N]

A model of Transformer-base's size with random weights in bf16 (in host memory fp32) decodes random sources with beam 4;
no output may end before the last step, so that all loops do the same steps. The loops take turns, and each is judged by
its median. `host`: the host looks at each step which sources are done; `device`: nothing waits for the host; `graph`:
as `device`, and a step is recorded and done again from the record, which needs a GPU. The table says how many
milliseconds a step takes, how many tokens of best hypotheses a second are decoded, and how many sources have the output
of `host`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megaseq.base import NestedMap
from megaseq.decode import BeamSearch
from megaseq.layers import families
from megaseq.layers.base import initialize
from megaseq.layers.encoder_decoder import EncoderDecoder

VOCAB, START, END, BEAM, SOURCE_LENGTH = 32000, 2, 3, 4, 32
LOOPS: dict[str, dict[str, bool]] = {
    "host": {"device_loop": False},
    "device": {"device_loop": True},
    "graph": {"device_loop": True, "device_loop_graph": True},
}
Outputs = list[tuple[int, ...]]


def model_of(*, model_dim: int, num_layers: int, vocab_size: int, device: torch.device) -> EncoderDecoder:
    """A model with random weights; heads are 64 wide where that divides."""
    num_heads = max(1, model_dim // 64)
    p = families.marian(
        model_dim=model_dim, hidden_dim=4 * model_dim, num_heads=num_heads, num_layers=num_layers, dropout=0.0
    )
    model: EncoderDecoder = p.replace(source_vocab_size=vocab_size, target_vocab_size=vocab_size).instantiate()
    initialize(model, seed=1)
    return model.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32).eval()


def sources(count: int, *, vocab_size: int, device: torch.device) -> NestedMap:
    """Random ids [count, S], none of them padding."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(4, vocab_size, (count, SOURCE_LENGTH), generator=generator).to(device)
    return NestedMap(ids=ids, segment_ids=torch.ones_like(ids))


def search_of(loop: str, *, steps: int) -> BeamSearch:
    """Beam search that makes exactly `steps` steps."""
    p = BeamSearch.Params(
        num_hyps_per_beam=BEAM, target_sos_id=START, target_eos_id=END, target_seq_len=steps, min_seq_len=steps - 1
    )
    made: BeamSearch = p.replace(**LOOPS[loop]).instantiate()
    return made


def decode(search: BeamSearch, *, model: EncoderDecoder, source: NestedMap) -> tuple[float, Outputs]:
    """Seconds, and the best output of each source."""
    start = time.perf_counter()
    outputs = [hyps[0].ids for hyps in search.search(model, source=source)]
    return time.perf_counter() - start, outputs


def measure(model: EncoderDecoder, *, source: NestedMap, steps: int, repeats: int) -> dict[str, Any]:
    """By loop: (median of the seconds, outputs), or in one line why it does not run."""
    found: dict[str, Any] = {}
    searches = {loop: search_of(loop, steps=steps) for loop in LOOPS}
    for loop, search in searches.items():
        try:
            # Compiles, and records the graph.
            found[loop] = ([], decode(search, model=model, source=source)[1])
        except Exception as error:  # A graph may refuse what torch cannot record; the others are wanted all the same.
            found[loop] = next(iter(str(error).splitlines()), type(error).__name__)
    for _ in range(repeats):
        for loop, search in searches.items():
            if not isinstance(found[loop], str):
                found[loop][0].append(decode(search, model=model, source=source)[0])
    return {loop: one if isinstance(one, str) else (statistics.median(one[0]), one[1]) for loop, one in found.items()}


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description="Times whole loops of beam search.")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--model-dim", type=int, default=512)
    parser.add_argument("--num-layers", type=int, default=6)
    parser.add_argument("--vocab-size", type=int, default=VOCAB)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model_of(
        model_dim=arguments.model_dim,
        num_layers=arguments.num_layers,
        vocab_size=arguments.vocab_size,
        device=device,
    )
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "host memory"
    print(f"{where}, torch {torch.__version__}, beam {BEAM}, {arguments.steps} steps\n")
    print("| batch | loop | ms a step | tokens a second | outputs as host's |")
    print("|---|---|---|---|---|")
    for size in arguments.batch_sizes:
        source = sources(size, vocab_size=arguments.vocab_size, device=device)
        found = measure(model, source=source, steps=arguments.steps, repeats=arguments.repeats)
        for loop, one in found.items():
            if isinstance(one, str):
                print(f"| {size} | {loop} | {one} | | |")
                continue
            seconds, outputs = one
            first = next(other[1] for other in found.values() if not isinstance(other, str))
            same = sum(ours == theirs for ours, theirs in zip(outputs, first, strict=True))
            rate = sum(map(len, outputs)) / seconds
            print(f"| {size} | {loop} | {1e3 * seconds / arguments.steps:.3g} | {rate:.0f} | {same} of {size} |")


if __name__ == "__main__":
    main()
