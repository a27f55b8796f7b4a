"""Training speed on this machine: megaseq beside the Trainer of transformers, the same model, data and token budget.

    python benchmarks/train_cpu.py --data-dir PATH_OF_MULTI30K

Both train the same shape (Marian's: post-norm, 256 wide, 3+3 layers, 4 heads, 1,024 hidden, dropout 0.1, 8,000 joint
pieces, one shared embedding) with AdamW, label smoothing 0.1 and clipping, on the same token ids, with about the same
number of target tokens a step. Each runs in child processes in turn (A B A B); the medians are compared. Unless
`--precision` names one, each side first tries the formats that the processor multiplies for a short time and keeps the
fastest. Counted are target
tokens that are no padding. Without `--data-dir` the text is generated.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SIDES = ("transformers", "megaseq")
PRECISIONS = {"transformers": ("fp32", "bf16_autocast"), "megaseq": ("fp32", "bf16", "bf16_autocast")}
MODEL_DIM, HIDDEN_DIM, NUM_HEADS, NUM_LAYERS, DROPOUT = 256, 1024, 4, 3, 0.1
VOCAB_SIZE, LABEL_SMOOTHING, LEARNING_RATE, CLIP_NORM = 8000, 0.1, 1e-3, 1.0
WARM_UP_STEPS = 4
MAX_LENGTH = 128
ROW_LENGTH = 512


def main() -> None:
    """Prepares the data, runs the children in turn, prints one table."""
    arguments = parse_arguments()
    if arguments.child:
        run_child = {"megaseq": train_megaseq, "transformers": train_transformers}[arguments.child]
        print("RESULT " + json.dumps(run_child(arguments)), flush=True)
        return
    with tempfile.TemporaryDirectory() as folder:
        arguments.work = Path(folder)
        prepare(arguments)
        chosen = {side: choose_precision(side, arguments=arguments) for side in arguments.sides}
        runs: dict[str, list[dict[str, float]]] = {side: [] for side in arguments.sides}
        for _ in range(arguments.rounds):
            for side in arguments.sides:
                seconds = arguments.seconds
                runs[side].append(spawn(side, precision=chosen[side], seconds=seconds, arguments=arguments))
        print_table(runs, chosen=chosen, ceiling=matmul_ceiling())


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="folder with train.de.gz and train.en.gz")
    parser.add_argument("--tokens", type=int, default=4096, help="target tokens a step, about")
    parser.add_argument("--seconds", type=float, default=30.0, help="timed seconds of each run, after warm-up")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side")
    parser.add_argument(
        "--precision", choices=("fp32", "bf16", "bf16_autocast"), help="for both; default: each its best"
    )
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--profile", action="store_true", help="child: print megaseq's costliest operations")
    parser.add_argument("--child", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def prepare(arguments: argparse.Namespace) -> None:
    """Writes text, the tokenizer's files and, for the peer, the token ids of all pairs into the work folder."""
    from megaseq.data.source import ParallelText
    from megaseq.data.tokenizer import SentencePiece
    from megaseq.data.vocabulary import Vocabulary

    if arguments.data_dir is None:
        write_generated(arguments.work)
        source = ParallelText.Params(source_files="train.de", target_files="train.en", data_dir=str(arguments.work))
    else:
        folder = str(arguments.data_dir.resolve())
        source = ParallelText.Params(source_files="train.de.gz", target_files="train.en.gz", data_dir=folder)
    params = Vocabulary.Params(source=SentencePiece.Params(vocab_size=VOCAB_SIZE))
    vocabulary = params.instantiate(learn_from=source, cache_dir=arguments.work / "cache")
    target = arguments.work / "vocabulary"
    target.mkdir()
    for name, data in vocabulary.save_files().items():
        (target / name).write_bytes(data)
    pairs: dict[str, list[list[int]]] = {"source": [], "target": []}
    for chunk in source.instantiate().stream():
        for side, texts in (("source", chunk.source), ("target", chunk.target)):
            ids = vocabulary.source.encode_batch([text.decode() for text in texts])
            pairs[side] += [[*map(int, item), vocabulary.source.eos_id] for item in ids]
    (arguments.work / "pairs.json").write_text(json.dumps(pairs))
    specials = {name: getattr(vocabulary.source, name) for name in ("vocab_size", "pad_id", "bos_id", "eos_id")}
    (arguments.work / "specials.json").write_text(json.dumps(specials))
    (arguments.work / "source.json").write_text(
        json.dumps({name: getattr(source, name) for name in ("source_files", "target_files", "data_dir")})
    )


def write_generated(folder: Path) -> None:
    """Writes 29,000 pairs of made-up sentences with the lengths of image captions."""
    draw = random.Random(1)
    letters = "abcdefghijklmnoprstuvwz"
    words = ["".join(draw.choices(letters, k=draw.randint(2, 9))) for _ in range(12000)]
    weights = [1 / rank for rank in range(1, len(words) + 1)]
    for name in ("train.de", "train.en"):
        lines = (" ".join(draw.choices(words, weights, k=max(3, round(draw.gauss(11, 3.5))))) for _ in range(29000))
        (folder / name).write_text("\n".join(lines) + "\n")


def choose_precision(side: str, *, arguments: argparse.Namespace) -> str:
    """Returns the format that is fastest in a short run, or the one that was asked for."""
    if arguments.precision:
        return str(arguments.precision)
    import torch

    from megaseq.train.precision import has_native_bf16

    formats = PRECISIONS[side]
    if not has_native_bf16(torch.device("cpu")):
        # Emulated products are so slow that not even a short run would end.
        formats = tuple(name for name in formats if not name.startswith("bf16"))
    if len(formats) == 1:
        return formats[0]
    seconds = min(10.0, arguments.seconds)
    speeds = {
        precision: spawn(side, precision=precision, seconds=seconds, arguments=arguments)["tokens_per_second"]
        for precision in formats
    }
    return max(speeds, key=lambda name: speeds[name])


def spawn(side: str, *, precision: str, seconds: float, arguments: argparse.Namespace) -> dict[str, float]:
    """Runs one side in a process of its own and returns what it measured."""
    command = [sys.executable, __file__, "--child", side, "--work", str(arguments.work), "--precision", precision]
    command += ["--seconds", str(seconds), "--tokens", str(arguments.tokens)]
    command += ["--profile"] if arguments.profile else []
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=True)
    result: dict[str, float] = {}
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            result = json.loads(line.removeprefix("RESULT "))
        elif arguments.profile:
            print(line)
    print(
        f"  {side:12s} {precision:13s} {result['tokens_per_second']:8.0f} target tokens/s "
        f"{result['tokens_per_cpu_second']:8.0f} a CPU second  "
        f"loss {result['loss']:.3f} after {result['steps']:.0f} steps",
        flush=True,
    )
    return result


def timed(steps: Iterator[tuple[float, float]], *, seconds: float) -> dict[str, float]:
    """Runs (target tokens, loss a token) steps until `seconds` are over, not counting the first ones."""
    tokens, count, loss = 0.0, 0, 0.0
    start, cpu = time.perf_counter(), time.process_time()
    for index, (weight, loss) in enumerate(steps):  # noqa: B007
        if index < WARM_UP_STEPS:
            start, cpu = time.perf_counter(), time.process_time()
            continue
        tokens, count = tokens + weight, count + 1
        if time.perf_counter() - start > seconds:
            break
    elapsed = time.perf_counter() - start
    cpu = time.process_time() - cpu
    return {"tokens_per_second": tokens / elapsed, "tokens_per_cpu_second": tokens / cpu, "steps": count, "loss": loss}


def megaseq_steps(arguments: argparse.Namespace) -> Iterator[tuple[float, float]]:
    """Trains with megaseq's engine and input; yields target tokens and loss a token of each step."""
    from megaseq.data.input import Input
    from megaseq.data.packing import Packing
    from megaseq.data.source import ParallelText
    from megaseq.layers.embedding import Embedding
    from megaseq.layers.families import stacks
    from megaseq.layers.positions import SinusoidalPositions
    from megaseq.learner import AdamW, Learner
    from megaseq.tasks.translation import Translation
    from megaseq.train.engine import Engine
    from megaseq.train.experiment import Run
    from megaseq.train.parts import read_vocabulary, set_up_process, task_params, train_input
    from megaseq.train.program import Program

    sides = stacks(
        num_layers=NUM_LAYERS,
        num_heads=NUM_HEADS,
        hidden_dim=HIDDEN_DIM,
        dropout=DROPOUT,
        attention_dropout=0.0,
        activation_dropout=0.0,
        positions=SinusoidalPositions.Params(),
        residual="post",
    )
    task = Translation.Params(
        model_dim=MODEL_DIM,
        source_embedding=Embedding.Params(scale_by_sqrt_dim=True),
        label_smoothing=LABEL_SMOOTHING,
        **sides,
    )
    source = ParallelText.Params(**json.loads((arguments.work / "source.json").read_text()))
    row = min(ROW_LENGTH, arguments.tokens)
    params = Run.Params(
        name="benchmark",
        vocabulary=vocabulary_params(),
        task=task,
        train_input=Input.Params(
            source=source, batching=Packing.Params(rows=arguments.tokens // row, source_length=row)
        ),
        learner=Learner.Params(learning_rate=LEARNING_RATE, clip_norm=CLIP_NORM, optimizer=AdamW.Params()),
        train=Program.Params(max_steps=1_000_000, precision=arguments.precision),
    )
    set_up_process(params)
    vocabulary = read_vocabulary(params, directory=arguments.work / "vocabulary")
    batches = train_input(params, vocabulary=vocabulary, cache=arguments.work / "cache")
    engine = Engine(
        task_params(params, vocabulary=vocabulary),
        learner_params=params.learner,
        seed=1,
        precision=params.train.precision,
    )

    for step, batch in enumerate(batches):
        result = engine.train_step(batch, step=step)
        yield result.weight, result.loss_sum / result.weight


def train_megaseq(arguments: argparse.Namespace) -> dict[str, float]:
    """Times megaseq's steps."""
    steps = megaseq_steps(arguments)
    if arguments.profile:
        profile(steps)
    return timed(steps, seconds=arguments.seconds)


def vocabulary_params() -> Any:
    """The joint vocabulary of both sides."""
    from megaseq.data.tokenizer import SentencePiece
    from megaseq.data.vocabulary import Vocabulary

    return Vocabulary.Params(source=SentencePiece.Params(vocab_size=VOCAB_SIZE))


def profile(steps: Iterator[tuple[float, float]]) -> None:
    """Prints where a few steps spend their time."""
    import torch

    for _ in range(WARM_UP_STEPS):
        next(steps)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for _ in range(5):
            next(steps)
    print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=35, max_name_column_width=50))


def train_transformers(arguments: argparse.Namespace) -> dict[str, float]:
    """Trains with transformers' Seq2SeqTrainer, batches grouped by length."""
    import torch
    from transformers import MarianConfig, MarianMTModel, Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainerCallback

    pairs = json.loads((arguments.work / "pairs.json").read_text())
    special = json.loads((arguments.work / "specials.json").read_text())
    examples = [
        {"input_ids": source, "labels": target, "length": max(len(source), len(target))}
        for source, target in zip(pairs["source"], pairs["target"], strict=True)
        if max(len(source), len(target)) <= MAX_LENGTH
    ]
    mean = statistics.fmean(len(example["labels"]) for example in examples)
    config = MarianConfig(
        vocab_size=special["vocab_size"],
        d_model=MODEL_DIM,
        encoder_layers=NUM_LAYERS,
        decoder_layers=NUM_LAYERS,
        encoder_attention_heads=NUM_HEADS,
        decoder_attention_heads=NUM_HEADS,
        encoder_ffn_dim=HIDDEN_DIM,
        decoder_ffn_dim=HIDDEN_DIM,
        activation_function="relu",
        dropout=DROPOUT,
        attention_dropout=0.0,
        activation_dropout=0.0,
        scale_embedding=True,
        max_position_embeddings=MAX_LENGTH + 2,
        pad_token_id=special["pad_id"],
        eos_token_id=special["eos_id"],
        decoder_start_token_id=special["bos_id"],
        forced_eos_token_id=None,
    )
    counts: list[int] = []

    def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
        def padded(name: str, fill: int) -> Any:
            rows = [torch.tensor(item[name]) for item in items]
            return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)

        ids, labels = padded("input_ids", special["pad_id"]), padded("labels", -100)
        counts.append(int((labels != -100).sum()))
        start = labels.new_full((len(items), 1), special["bos_id"])
        decoder_ids = torch.cat([start, labels[:, :-1].masked_fill(labels[:, :-1] == -100, special["pad_id"])], dim=1)
        mask = (ids != special["pad_id"]).long()
        return {"input_ids": ids, "attention_mask": mask, "labels": labels, "decoder_input_ids": decoder_ids}

    clock = _Clock(arguments.seconds)

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = clock.tick()

    trainer = Seq2SeqTrainer(
        model=MarianMTModel(config),
        args=Seq2SeqTrainingArguments(
            output_dir=str(arguments.work / "trainer"),
            per_device_train_batch_size=max(1, round(arguments.tokens / mean)),
            max_steps=1_000_000,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            max_grad_norm=CLIP_NORM,
            label_smoothing_factor=LABEL_SMOOTHING,
            train_sampling_strategy="group_by_length",
            length_column_name="length",
            bf16=arguments.precision != "fp32",
            use_cpu=True,
            report_to=[],
            logging_strategy="no",
            save_strategy="no",
            disable_tqdm=True,
            remove_unused_columns=False,
        ),
        train_dataset=examples,  # type: ignore[arg-type]
        data_collator=collate,
        callbacks=[Stop()],
    )
    loss = trainer.train().training_loss
    elapsed = clock.times[-1] - clock.times[WARM_UP_STEPS - 1]
    # The loader collates ahead of the step that it is for, so the batches are counted from the front.
    timed_counts = counts[WARM_UP_STEPS : len(clock.times)]
    return {
        "tokens_per_second": sum(timed_counts) / elapsed,
        "tokens_per_cpu_second": sum(timed_counts) / (clock.cpu_times[-1] - clock.cpu_times[WARM_UP_STEPS - 1]),
        "steps": len(timed_counts),
        "loss": loss,
    }


class _Clock:
    """Notes when steps end and says when the timed seconds are over."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.times: list[float] = []
        self.cpu_times: list[float] = []

    def tick(self) -> bool:
        """Notes the end of a step; True once the time is over."""
        self.times.append(time.perf_counter())
        self.cpu_times.append(time.process_time())
        if len(self.times) <= WARM_UP_STEPS:
            return False
        return self.times[-1] - self.times[WARM_UP_STEPS - 1] > self.seconds


def matmul_ceiling() -> float:
    """GFLOP/s of a large fp32 matrix product on all threads."""
    import torch

    size = 2048
    a, b, out = torch.randn(size, size), torch.randn(size, size), torch.empty(size, size)
    seconds = []
    for _ in range(8):
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds) / 1e9


def flops_per_target_token() -> float:
    """Floating-point operations of matrix products, forward and backward, for one target and one source token."""
    attention, ffn = 4 * MODEL_DIM**2, 2 * MODEL_DIM * HIDDEN_DIM
    encoder, decoder = NUM_LAYERS * (attention + ffn), NUM_LAYERS * (2 * attention + ffn)
    return 6.0 * (encoder + decoder + VOCAB_SIZE * MODEL_DIM)


def print_table(runs: dict[str, list[dict[str, float]]], *, chosen: dict[str, str], ceiling: float) -> None:
    """Prints the medians, their ratio, and how far from the machine's matrix speed each side is."""
    columns = ("side", "precision", "target tokens/s", "of a CPU second", "runs", "GFLOP/s")
    print(f"\n| {' | '.join(columns)} | of {ceiling:.0f} (2048-wide fp32 product) |")
    print("|---|---|---|---|---|---|---|")
    medians, cpu_medians = {}, {}
    for side, results in runs.items():
        speeds = [result["tokens_per_second"] for result in results]
        medians[side] = statistics.median(speeds)
        cpu_medians[side] = statistics.median(result["tokens_per_cpu_second"] for result in results)
        rate = medians[side] * flops_per_target_token() / 1e9
        shown = " ".join(f"{speed:.0f}" for speed in speeds)
        print(
            f"| {side} | {chosen[side]} | {medians[side]:.0f} | {cpu_medians[side]:.0f} | {shown} | {rate:.0f} | "
            f"{rate / ceiling:.0%} |"
        )
    if len(medians) == len(SIDES):
        print(
            f"\nmegaseq trains {medians['megaseq'] / medians['transformers']:.2f} times as fast, "
            f"{cpu_medians['megaseq'] / cpu_medians['transformers']:.2f} times by CPU time."
        )


if __name__ == "__main__":
    main()
