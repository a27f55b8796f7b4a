"""Beam search on CPU: megaseq against transformers' generate, same weights, same sources, same outputs.

    python benchmarks/decode_cpu.py [--data-dir DIR] [--size small|base] [--threads N] [--profile]

Both sides decode the same length-sorted batches with beam 4 and the conventions of transformers; each runs at every
batch size, in turns, and is judged by the best of its medians. With `--data-dir` the sources are those of the Multi30k
test set in pieces of a SentencePiece model of 8,000; otherwise random ids of like lengths. The weights are random. Two
rows: `limit`, where no output ends before the length of the batch's longest source; and `ending`, where outputs may be
half to twice as long and the end token is made so likely that they end on their own at various steps, as those of
trained models do.
"""

from __future__ import annotations

import argparse
import gzip
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import MarianConfig, MarianMTModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megaseq.base import NestedMap
from megaseq.decode import BeamSearch
from megaseq.layers import families
from megaseq.layers.encoder_decoder import EncoderDecoder
from tests.parity import mapping

PAD, EOS, VOCAB, BEAM = 0, 3, 8000, 4
SIZES = {
    "small": dict(model_dim=256, hidden_dim=1024, num_heads=4, num_layers=3),
    "base": dict(model_dim=512, hidden_dim=2048, num_heads=8, num_layers=6),
}
Outputs = list[tuple[int, ...]]


def read_sources(data_dir: str | None, *, count: int) -> list[list[int]]:
    """Ids of each source, the end token included."""
    if data_dir is None:
        generator = torch.Generator().manual_seed(1)
        lengths = (torch.randn(count, generator=generator) * 5 + 14).round().clamp(5, 40).int().tolist()
        return [[*torch.randint(4, VOCAB, (n - 1,), generator=generator).tolist(), EOS] for n in lengths]
    import sentencepiece

    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "train"
        with text.open("wb") as out:
            for language in ("de", "en"):
                out.write(gzip.decompress((Path(data_dir) / f"train.{language}.gz").read_bytes()))
        sentencepiece.SentencePieceTrainer.train(
            input=str(text), model_prefix=f"{folder}/model", vocab_size=VOCAB, pad_id=0, unk_id=1, bos_id=2, eos_id=3,
            minloglevel=2,
        )  # fmt: skip
        model = sentencepiece.SentencePieceProcessor(model_file=f"{folder}/model.model")
        lines = gzip.decompress((Path(data_dir) / "test_2016_flickr.de.gz").read_bytes()).decode().splitlines()
        return [[*ids, EOS] for ids in model.encode(lines[:count])]


def batches(sources: list[list[int]], *, size: int) -> list[NestedMap]:
    """Length-sorted batches."""
    ordered = sorted(sources, key=len)
    made = []
    for start in range(0, len(ordered), size):
        rows = ordered[start : start + size]
        width = max(map(len, rows))
        ids = torch.tensor([row + [PAD] * (width - len(row)) for row in rows])
        made.append(NestedMap(ids=ids, segment_ids=(ids != PAD).long()))
    return made


def models(size: str, *, eos_bias: float) -> tuple[MarianMTModel, EncoderDecoder]:
    """The same random weights in both houses."""
    shape = SIZES[size]
    torch.manual_seed(1)
    theirs = MarianMTModel(
        MarianConfig(
            vocab_size=VOCAB, d_model=shape["model_dim"], encoder_layers=shape["num_layers"],
            decoder_layers=shape["num_layers"], encoder_attention_heads=shape["num_heads"],
            decoder_attention_heads=shape["num_heads"], encoder_ffn_dim=shape["hidden_dim"],
            decoder_ffn_dim=shape["hidden_dim"], max_position_embeddings=256, pad_token_id=PAD, eos_token_id=EOS,
            decoder_start_token_id=PAD, forced_eos_token_id=None, bos_token_id=None, scale_embedding=True,
            activation_function="swish",
        )
    ).eval()  # fmt: skip
    theirs.generation_config.bad_words_ids = None
    theirs.generation_config.forced_eos_token_id = None
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.dim() > 1 and "embed_positions" not in name:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
        theirs.final_logits_bias[0, EOS] = eos_bias
    p = families.marian(**shape, dropout=0.0).replace(source_vocab_size=VOCAB, target_vocab_size=VOCAB)
    ours: EncoderDecoder = p.instantiate()
    mapping.load(ours, weights=mapping.bart(theirs))
    return theirs, ours.eval()


def search(steps: int, *, least: int) -> BeamSearch:
    """Beam search by transformers' conventions, with its defaults."""
    params = BeamSearch.Params(
        num_hyps_per_beam=BEAM, target_sos_id=PAD, target_eos_id=EOS, target_seq_len=steps, length_penalty=1.0,
        candidates="merged", termination="heuristic", valid_eos_max_logit_delta=float("inf"),
        local_eos_threshold=float("-inf"), force_eos_in_last_step=False, keep_unfinished=True,
        min_seq_len=least,
    )  # fmt: skip
    made: BeamSearch = params.instantiate()
    return made


def run_ours(model: EncoderDecoder, *, data: list[NestedMap], factor: int = 1) -> Outputs:
    """Decodes all batches with megaseq."""
    outputs = []
    for batch in data:
        width = batch.ids.shape[1]
        found = search(factor * width, least=width // 2).search(model, source=batch)
        outputs += [hyps[0].ids for hyps in found]
    return outputs


def run_theirs(model: Any, *, data: list[NestedMap], factor: int = 1) -> Outputs:
    """Decodes all batches with transformers."""
    outputs: Outputs = []
    for batch in data:
        rows = model.generate(
            batch.ids, attention_mask=batch.segment_ids, num_beams=BEAM, do_sample=False, early_stopping=False,
            max_new_tokens=factor * batch.ids.shape[1], min_new_tokens=batch.ids.shape[1] // 2, length_penalty=1.0,
        )[:, 1:].tolist()  # fmt: skip
        outputs += [tuple(row[: row.index(EOS)] if EOS in row else row) for row in rows]
    return outputs


def timed(call: Callable[[], Outputs], *, clock: Callable[[], float]) -> tuple[float, Outputs]:
    """Seconds, and what it gave."""
    start = clock()
    outputs = call()
    return clock() - start, outputs


def unpadded(ids: tuple[int, ...]) -> tuple[int, ...]:
    """Without trailing padding."""
    while ids and ids[-1] == PAD:
        ids = ids[:-1]
    return ids


def compare(name: str, *, sources: list[list[int]], sizes: list[int], repeats: int, args: argparse.Namespace) -> None:
    """Prints one row of the table."""
    theirs, ours = models(args.size, eos_bias=args.eos_bias if name == "ending" else -1e4)
    factor = 2 if name == "ending" else 1
    clock = time.process_time if args.cpu_time else time.perf_counter
    best: dict[str, tuple[float, int]] = {}
    same = length = 0.0
    for size in sizes:
        data = batches(sources, size=size)
        run_ours(ours, data=data[:1]), run_theirs(theirs, data=data[:1])
        times: dict[str, list[float]] = {"ours": [], "theirs": []}
        for _ in range(repeats):
            seconds, mine = timed(lambda data=data: run_ours(ours, data=data, factor=factor), clock=clock)
            times["ours"].append(seconds)
            seconds, other = timed(lambda data=data: run_theirs(theirs, data=data, factor=factor), clock=clock)
            times["theirs"].append(seconds)
        pairs = [(unpadded(a), unpadded(b)) for a, b in zip(mine, other, strict=True)]
        same = sum(a == b for a, b in pairs) / len(pairs)
        length = sum(len(a) for a, _ in pairs) / len(pairs)
        for side, values in times.items():
            rate = len(sources) / statistics.median(values)
            best[side] = max(best.get(side, (0.0, 0)), (rate, size))
    (mine_rate, mine_size), (their_rate, their_size) = best["ours"], best["theirs"]
    print(
        f"{name:8} {mine_rate:10.1f} ({mine_size:3}) {their_rate:14.1f} ({their_size:3}) {mine_rate / their_rate:8.2f}"
        f" {same:10.1%} {length:8.1f}",
        flush=True,
    )


def main() -> None:
    """Reads the options, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", default=None)
    parser.add_argument("--size", choices=sorted(SIZES), default="small")
    parser.add_argument("--sources", type=int, default=256)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--eos-bias", type=float, default=4.5, help="bias of the end token in the row `ending`")
    parser.add_argument("--cpu-time", action="store_true", help="count CPU seconds, for a machine with other work")
    parser.add_argument("--profile", action="store_true", help="print where megaseq's time goes instead")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sources = read_sources(args.data_dir, count=args.sources)
    if args.profile:
        _, ours = models(args.size, eos_bias=-1e4)
        data = batches(sources, size=args.batch_sizes[0])
        with torch.profiler.profile() as profiler:
            run_ours(ours, data=data[:4])
        print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=40))
        return
    print(f"{args.size}, beam {BEAM}, {len(sources)} sources, {args.threads} threads; sentences/s (best batch size)")
    print(f"{'outputs':8} {'megaseq':>16} {'transformers':>20} {'ratio':>8} {'same':>10} {'tokens':>8}")
    for name in ("limit", "ending"):
        compare(name, sources=sources, sizes=args.batch_sizes, repeats=args.repeats, args=args)


if __name__ == "__main__":
    main()
