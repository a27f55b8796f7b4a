"""Beam search on CPU: megaseq against transformers' generate, same weights, same sources, same outputs.

    python benchmarks/decode_cpu.py [--data-dir DIR] [--run-dir RUN] [--size small|base] [--threads N] [--profile]

Both sides decode the same length-sorted batches, longest first, with beam 4 and the conventions of transformers. Each
runs at every batch size, in turns, batch after batch on all threads and, with several threads, also a batch on each
thread at once; it is judged by the best of its medians. With `--data-dir` the sources are those of the Multi30k
test set in pieces of a SentencePiece model of 8,000; otherwise random ids of like lengths. The rows of the table:

- `trained`: with `--run-dir`, the weights of a run of mt.multi30k.Small or Base, whose outputs end where they should,
  on the sources of `--data-dir`; both sides allow 64 tokens;
- `limit`: random weights that never end an output; all have 20 tokens: what a step costs when nothing ever finishes;
- `ending`: random weights with the end token so likely that outputs end at various steps, after 6 to 44 tokens.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from transformers import M2M100Config, M2M100ForConditionalGeneration, MarianConfig, MarianMTModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megaseq.base import NestedMap
from megaseq.decode import BeamSearch
from megaseq.decode.concurrent import map_concurrently
from megaseq.layers import families
from megaseq.layers.encoder_decoder import EncoderDecoder
from megaseq.train.host_memory import keep_freed_memory
from megaseq.train.saving import load_trained
from tests.parity import mapping

PAD, BOS, EOS, VOCAB, BEAM = 0, 2, 3, 8000, 4
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
    """Length-sorted batches, the longest first."""
    ordered = sorted(sources, key=len, reverse=True)
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


class Case(NamedTuple):
    """One row of the table: both models, their start token, and the limits of the outputs."""

    theirs: Any
    ours: EncoderDecoder
    start: int
    least: int
    most: int


def trained(run_dir: str) -> tuple[Case, Any]:
    """The model of a run in both houses, and the run's vocabulary."""
    model = load_trained(run_dir)
    ours: Any = model.task.eval()
    p = ours.params
    layer = p.decoder.layer
    theirs = M2M100ForConditionalGeneration(
        M2M100Config(
            vocab_size=ours.softmax_matrix().shape[0], d_model=p.model_dim, encoder_layers=p.encoder.num_layers,
            decoder_layers=p.decoder.num_layers, encoder_attention_heads=layer.self_attention.num_heads,
            decoder_attention_heads=layer.self_attention.num_heads, encoder_ffn_dim=layer.ffn.hidden_dim,
            decoder_ffn_dim=layer.ffn.hidden_dim, max_position_embeddings=512, pad_token_id=PAD, eos_token_id=EOS,
            bos_token_id=BOS, decoder_start_token_id=BOS, scale_embedding=True, activation_function="relu",
        )
    ).eval()  # fmt: skip
    # Each of our tensors is one of theirs, or several of theirs in a row: find out which by names, and copy back.
    state = dict(ours.state_dict())
    numbered = {name: torch.full(value.shape, float(n)) for n, (name, value) in enumerate(theirs.state_dict().items())}
    names = list(numbered)
    stand_in = SimpleNamespace(state_dict=lambda: numbered)
    with torch.no_grad():
        for mine, marks in mapping.bart(stand_in).items():
            firsts = marks if marks.dim() == 1 else marks[:, 0]
            for mark in firsts.unique_consecutive().tolist():
                theirs.state_dict()[names[int(mark)]].copy_(state[mine][firsts == mark])
    for side, stack in (("encoder", ours.encoder), ("decoder", ours.decoder)):
        table = getattr(theirs.model, side).embed_positions
        # Theirs counts from one behind the padding's row.
        places = torch.arange(table.weights.shape[0] - 1)
        table.weights[1:] = stack.positions.lookup(places, length=len(places), dtype=torch.float32)
        table.weights[0] = 0.0
    return Case(theirs, ours, start=BOS, least=0, most=64), model.vocabulary


def search(case: Case) -> BeamSearch:
    """Beam search by transformers' conventions, with its defaults."""
    params = BeamSearch.Params(
        num_hyps_per_beam=BEAM, target_sos_id=case.start, target_eos_id=EOS, target_seq_len=case.most,
        min_seq_len=case.least, length_penalty=1.0, candidates="merged", termination="heuristic",
        valid_eos_max_logit_delta=float("inf"), local_eos_threshold=float("-inf"), force_eos_in_last_step=False,
        keep_unfinished=True,
    )  # fmt: skip
    made: BeamSearch = params.instantiate()
    return made


def run_ours(case: Case, *, data: list[NestedMap], at_once: int = 1) -> Outputs:
    """Decodes all batches with megaseq."""
    beam = search(case)

    def decode(batch: NestedMap) -> Outputs:
        return [hyps[0].ids for hyps in beam.search(case.ours, source=batch)]

    return [ids for batch in map_concurrently(decode, items=data, workers=at_once) for ids in batch or ()]


def run_theirs(case: Case, *, data: list[NestedMap], at_once: int = 1) -> Outputs:
    """Decodes all batches with transformers."""

    def decode(batch: NestedMap) -> Outputs:
        rows = case.theirs.generate(
            batch.ids, attention_mask=batch.segment_ids, num_beams=BEAM, do_sample=False, early_stopping=False,
            max_new_tokens=case.most, min_new_tokens=case.least, length_penalty=1.0,
        )[:, 1:].tolist()  # fmt: skip
        return [tuple(row[: row.index(EOS)] if EOS in row else row) for row in rows]

    return [ids for batch in map_concurrently(decode, items=data, workers=at_once) for ids in batch or ()]


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


def compare(name: str, *, case: Case, sources: list[list[int]], args: argparse.Namespace) -> None:
    """Prints one row of the table."""
    clock = time.process_time if args.cpu_time else time.perf_counter
    best: dict[str, tuple[float, str]] = {}
    for size, at_once in itertools.product(args.batch_sizes, sorted({1, args.threads})):
        data = batches(sources, size=size)
        run_ours(case, data=data[-1:]), run_theirs(case, data=data[-1:])
        times: dict[str, list[float]] = {"ours": [], "theirs": []}
        for _ in range(args.repeats):
            seconds, mine = timed(partial(run_ours, case, data=data, at_once=at_once), clock=clock)
            times["ours"].append(seconds)
            seconds, other = timed(partial(run_theirs, case, data=data, at_once=at_once), clock=clock)
            times["theirs"].append(seconds)
        for side, values in times.items():
            rate = len(sources) / statistics.median(values)
            best[side] = max(best.get(side, (0.0, "")), (rate, f"{at_once} x {size}"))
    pairs = [(unpadded(a), unpadded(b)) for a, b in zip(mine, other, strict=True)]
    same = sum(a == b for a, b in pairs) / len(pairs)
    length = sum(len(a) for a, _ in pairs) / len(pairs)
    (mine_rate, mine_size), (their_rate, their_size) = best["ours"], best["theirs"]
    print(
        f"{name:8} {mine_rate:8.1f} ({mine_size:7}) {their_rate:12.1f} ({their_size:7}) {mine_rate / their_rate:8.2f}"
        f" {same:10.1%} {length:8.1f}",
        flush=True,
    )


def main() -> None:
    """Reads the options, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", default=None)
    parser.add_argument("--run-dir", default=None, help="a trained run; needs --data-dir")
    parser.add_argument("--size", choices=sorted(SIZES), default="small")
    parser.add_argument("--sources", type=int, default=256)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--eos-bias", type=float, default=4.5, help="bias of the end token in the row `ending`")
    parser.add_argument("--cpu-time", action="store_true", help="count CPU seconds, for a machine with other work")
    parser.add_argument("--profile", action="store_true", help="print where megaseq's time goes instead")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()  # As the command line does; it helps both sides.
    sources = read_sources(args.data_dir, count=args.sources)
    if args.profile:
        _, ours = models(args.size, eos_bias=-1e4)
        with torch.profiler.profile() as profiler:
            run_ours(Case(None, ours, PAD, 0, 20), data=batches(sources, size=args.batch_sizes[0])[:4])
        print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=40))
        return
    unit = "CPU second" if args.cpu_time else "second"
    print(f"beam {BEAM}, {len(sources)} sources, {args.threads} threads; sentences a {unit} (batches at once x size)")
    print(f"{'outputs':8} {'megaseq':>18} {'transformers':>22} {'ratio':>8} {'same':>10} {'tokens':>8}")
    if args.run_dir:
        case, vocabulary = trained(args.run_dir)
        lines = gzip.decompress((Path(args.data_dir) / "test_2016_flickr.de.gz").read_bytes()).decode().splitlines()
        encoded = [[*ids, EOS] for ids in vocabulary.source.encode_batch(lines[: args.sources])]
        compare("trained", case=case, sources=encoded, args=args)
    for name, bias, least, most in (("limit", -1e4, 0, 20), ("ending", args.eos_bias, 6, 44)):
        theirs, ours = models(args.size, eos_bias=bias)
        compare(name, case=Case(theirs, ours, PAD, least, most), sources=sources, args=args)


if __name__ == "__main__":
    main()
