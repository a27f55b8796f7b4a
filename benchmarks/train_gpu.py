"""T5-large v1.1 on one GPU: sequences a second, share of the card's peak, memory; beside transformers under DeepSpeed.

    python benchmarks/train_gpu.py                       # some minutes on a card of 80 GB or more
    python benchmarks/train_gpu.py --rows 32 --sides megaseq --precision fp32

Both sides train the same shape, whose weights begin at random, in bf16 with fp32 masters and AdamW, on the same
batches of random ids: 512 source and 128 target tokens, none of them padding. Each runs in a process of its own; the
peer is transformers' T5 in DeepSpeed's engine, ZeRO stage 1, dropout as in ours. Columns: sequences a second; the share
that the model's products are of what the card multiplies at best (computed from the shape: forward pass and twice as
much backward, no product counted that is computed again); the most memory that was allocated; milliseconds of a step.
Without a GPU it runs in host memory, which shows that it runs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

SIDES = ("megaseq", "transformers")
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "B200": 2250e12}
"""Dense bf16 products a second by the makers' data sheets, by a part of the card's name."""
WARM_UP_STEPS = 3
TIMEOUT_SECONDS = 600


def main() -> None:
    """Runs a child for each side, prints one table."""
    arguments = parse_arguments()
    if arguments.child:
        print("RESULT " + json.dumps(measure(arguments)), flush=True)
        return
    print("side              sequences/s   of peak    memory      step")
    for side in arguments.sides:
        print(row(side, result=spawn(side)), flush=True)


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64, help="sequences a step")
    parser.add_argument("--source-length", type=int, default=512)
    parser.add_argument("--target-length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=20, help="timed, after three that are not")
    parser.add_argument("--model-dim", type=int, default=1024)
    parser.add_argument("--hidden-dim", type=int, default=2816)
    parser.add_argument("--num-heads", type=int, default=16)
    parser.add_argument("--num-layers", type=int, default=24, help="of the encoder, and of the decoder")
    parser.add_argument("--vocab-size", type=int, default=32_128)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--compiled", action="store_true", help="compile megaseq's layers")
    parser.add_argument("--peak-tflops", type=float, help="of the card; default: by its name")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--child", choices=SIDES, help=argparse.SUPPRESS)
    return parser.parse_args()


def spawn(side: str) -> dict[str, Any]:
    """Measures one side in a process of its own; says why if it fails."""
    command = [sys.executable, __file__, *sys.argv[1:], "--child", side]
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29431"}
    environment = {**alone, **os.environ}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, timeout=TIMEOUT_SECONDS)
    found = [line.removeprefix("RESULT ") for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not found:
        raise SystemExit(f"{side}: ended with exit code {done.returncode}; what it printed says why.")
    result: dict[str, Any] = json.loads(found[0])
    return result


def row(side: str, *, result: dict[str, Any]) -> str:
    """One line of the table."""
    share = f"{result['share']:8.1%}" if result["share"] is not None else "        "
    memory = f"{result['memory'] / 2**30:6.1f} GiB" if result["memory"] is not None else "          "
    return (
        f"{side:<16}{result['sequences']:13.2f}  {share}  {memory}{result['step'] * 1000:7.0f} ms   {result['device']}"
    )


def flops_of_a_sequence(arguments: argparse.Namespace) -> float:
    """Floating-point operations of the matrix products of a sequence, forward and backward."""
    source, target = arguments.source_length, arguments.target_length
    dim, hidden = arguments.model_dim, arguments.hidden_dim
    heads = 64 * arguments.num_heads
    projections, ffn = 4 * dim * heads, 3 * dim * hidden
    encoder = source * (projections + ffn) + 2 * source * source * heads
    own = target * projections + 2 * target * target * heads
    cross = (target + source) * projections / 2 + 2 * target * source * heads
    layers = arguments.num_layers * (encoder + own + cross + target * ffn)
    return float(6 * (layers + target * dim * arguments.vocab_size))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Trains some steps and returns sequences and seconds, bytes, and the share of the peak."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(0)
    shapes = [(arguments.rows, length) for length in (arguments.source_length, arguments.target_length)]
    source, target = (torch.randint(4, arguments.vocab_size, shape, generator=generator).to(device) for shape in shapes)
    step = {"megaseq": make_megaseq, "transformers": make_transformers}[arguments.child](arguments, device)
    seconds = []
    for number in range(WARM_UP_STEPS + arguments.steps):
        if number == WARM_UP_STEPS and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        begun = time.perf_counter()
        step(source, target, number)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
    median = statistics.median(seconds[WARM_UP_STEPS:])
    name = torch.cuda.get_device_name() if device.type == "cuda" else "host memory"
    peak = arguments.peak_tflops * 1e12 if arguments.peak_tflops else None
    peak = peak or next((peak for part, peak in PEAKS.items() if part in name), None)
    rate = arguments.rows / median
    return {
        "sequences": rate,
        "step": median,
        "share": None if peak is None else rate * flops_of_a_sequence(arguments) / peak,
        "memory": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
        "device": name,
    }


def make_megaseq(arguments: argparse.Namespace, device: Any) -> Callable[[Any, Any, int], None]:
    """A step of the engine."""
    import torch

    from megaseq.base import NestedMap
    from megaseq.layers.families import t5
    from megaseq.learner import AdamW, Constant, Learner
    from megaseq.tasks.translation import Translation
    from megaseq.train.engine import Engine

    model = t5(
        model_dim=arguments.model_dim,
        hidden_dim=arguments.hidden_dim,
        num_heads=arguments.num_heads,
        num_layers=arguments.num_layers,
        dropout=arguments.dropout,
    )
    model.source_vocab_size = model.target_vocab_size = arguments.vocab_size
    engine = Engine(
        Translation.Params.of(model),
        learner_params=Learner.Params(
            learning_rate=1e-4, schedule=Constant.Params(), optimizer=AdamW.Params(), clip_norm=1.0
        ),
        seed=1,
        precision=arguments.precision,
        device=device,
        compiled=arguments.compiled,
    )
    weights = torch.ones(arguments.rows, arguments.target_length, device=device)

    def step(source: Any, target: Any, number: int) -> None:
        ids = torch.cat([torch.zeros_like(target[:, :1]), target[:, :-1]], dim=1)
        batch = NestedMap(source=NestedMap(ids=source), target=NestedMap(ids=ids, labels=target, weights=weights))
        engine.train_step(batch, step=number)

    return step


def make_transformers(arguments: argparse.Namespace, device: Any) -> Callable[[Any, Any, int], None]:
    """A step of transformers' T5 in DeepSpeed's engine."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    from megaseq.train.updaters.deepspeed_package import load_deepspeed

    deepspeed = load_deepspeed(device)
    torch.manual_seed(1)
    config = T5Config(
        vocab_size=arguments.vocab_size,
        d_model=arguments.model_dim,
        d_kv=64,
        d_ff=arguments.hidden_dim,
        num_heads=arguments.num_heads,
        num_layers=arguments.num_layers,
        dropout_rate=arguments.dropout,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=0,
    )
    model = T5ForConditionalGeneration(config).train()
    settings = {"lr": 1e-4, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0, "torch_adam": True, "fused": True}
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=list(model.parameters()),
        config={
            "train_micro_batch_size_per_gpu": arguments.rows,
            "gradient_clipping": 1.0,
            "steps_per_print": 1_000_000_000,
            "bf16": {"enabled": arguments.precision == "bf16"},
            "zero_optimization": {"stage": 1},
            "optimizer": {"type": "AdamW", "params": settings},
        },
    )

    def step(source: Any, target: Any, number: int) -> None:
        loss = engine(input_ids=source, labels=target).loss
        engine.backward(loss)
        engine.step()
        loss.item()

    return step


if __name__ == "__main__":
    main()
