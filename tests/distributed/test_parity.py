"""The table of layouts: each trains as one process does. A row: (name, params of `parallel`, ranks, other options)."""

from __future__ import annotations

import tempfile
from typing import Any

import pytest

from .parity import check_layout

Row = tuple[str, dict[str, Any], int, dict[str, Any]]

BF16: dict[str, Any] = {"precision": "bf16", "accumulation": 2, "rtol": 1e-2, "parameter_tolerance": 1e-2}

EXPERTS: dict[str, Any] = {
    f"{stack}.layers.1.ffn.{name}": value
    for stack in ("encoder", "decoder")
    for name, value in {
        "cls": "megaseq.layers.moe.MixtureOfExperts",
        "num_experts": 4,
        "hidden_dim": 32,
        "router.jitter": 0.01,
    }.items()
}
"""A mixture of experts in every second layer."""
BALANCED = EXPERTS | {
    f"{stack}.layers.1.ffn.router.{name}": value
    for stack in ("encoder", "decoder")
    for name, value in {"balance_loss": 0.5, "z_loss": 0.1}.items()
}
"""Losses of routers that weigh as much as the task's."""
MIXED = BALANCED | {path.replace("layers.1", "layers.0"): value for path, value in BALANCED.items()}
"""A mixture of experts in every layer, so in every stage."""
DROPPING = EXPERTS | {f"{stack}.layers.1.ffn.router.capacity_factor": 1.0 for stack in ("encoder", "decoder")}
KEY_HEADS: dict[str, Any] = {
    "encoder.layer.self_attention.num_key_value_heads": 1,
    "decoder.layer.self_attention.num_key_value_heads": 1,
    "decoder.layer.cross_attention.num_key_value_heads": 2,
}
"""Fewer key heads than tensor ranks."""

INTERLEAVED: dict[str, Any] = {"pipeline.schedule": "interleaved"}
ZERO_BUBBLE: dict[str, Any] = {"pipeline.schedule": "zero_bubble_v"}
GROUPS: dict[str, Any] = {"data": 4, "expert": 2}
"""Two groups of ranks that hold the same experts."""
CORNERS: dict[str, Any] = {"data": 2, "expert": 2}
"""No two ranks of a stage hold the same experts."""
OVERLAP: dict[str, Any] = {"zero.stage": 2, "zero.overlap": True, "zero.bucket_elements": 2000}
OFFLOAD: dict[str, Any] = {"zero.stage": 3, "zero.offload_optimizer": "cpu", "zero.offload_parameters": "cpu"}
NVME: dict[str, Any] = {"zero.offload_optimizer": "nvme", "zero.nvme_path": tempfile.gettempdir()}
CUBE: dict[str, Any] = {"data": 2, "tensor": 2, "pipe": 2}

ROWS: list[Row] = [
    ("accumulation4", {}, 1, {"accumulation": 4}),
    ("dp2", {"data": 2}, 2, {}),
    ("dp2-varying", {"data": 2}, 2, {"varying": True}),
    ("dp2-without-overlap", {"data": 2, "zero.bucket_elements": 2000, "zero.overlap": False}, 2, {}),
    ("dp4", {"data": 4}, 4, {}),
    ("dp2-zero1", {"data": 2, "zero.stage": 1}, 2, {}),
    ("dp2-zero2", {"data": 2, "zero.stage": 2}, 2, {}),
    ("dp2-zero3", {"data": 2, "zero.stage": 3}, 2, {}),
    ("dp2-zero3-divided", {"data": 2, "zero.stage": 3, "zero.persistence_elements": 0}, 2, {"varying": True}),
    ("dp2-zero2-accumulation4", {"data": 2, "zero.stage": 2}, 2, {"accumulation": 4}),
    ("dp2-zero1-offload", {"data": 2, "zero.stage": 1, "zero.offload_optimizer": "cpu"}, 2, {}),
    ("dp2-zero2-offload", {"data": 2, "zero.stage": 2, "zero.offload_optimizer": "cpu"}, 2, {"accumulation": 2}),
    (
        "dp2-zero3-offload",
        {"data": 2, "zero.stage": 3, "zero.offload_optimizer": "cpu", "zero.offload_parameters": "cpu"},
        2,
        {"accumulation": 2},
    ),
    ("dp2-bf16", {"data": 2}, 2, BF16),
    ("dp2-zero2-bf16", {"data": 2, "zero.stage": 2}, 2, BF16),
    ("dp2-zero2-overlap", {"data": 2, "zero.stage": 2, "zero.overlap": True, "zero.bucket_elements": 2000}, 2, {}),
    ("tp2", {"tensor": 2}, 2, {}),
    ("tp2-sequence", {"tensor": 2, "sequence": True}, 2, {}),
    ("tp4", {"tensor": 4}, 4, {}),
    ("dp2-tp2", {"data": 2, "tensor": 2}, 4, {}),
    ("dp2-tp2-sequence", {"data": 2, "tensor": 2, "sequence": True}, 4, {}),
    ("dp2-tp2-zero1", {"data": 2, "tensor": 2, "zero.stage": 1}, 4, {}),
    ("dp2-tp2-zero3", {"data": 2, "tensor": 2, "zero.stage": 3, "zero.persistence_elements": 0}, 4, {}),
    ("dp2-pp2-zero1", {"data": 2, "pipe": 2, "zero.stage": 1}, 4, {"varying": True}),
    ("dp2-pp2-zero2", {"data": 2, "pipe": 2, "zero.stage": 2}, 4, {}),
    ("dp2-tp2-pp2-zero1", {**CUBE, "zero.stage": 1}, 8, {"varying": True, "timeout_seconds": 400}),
    ("dp2-tp2-pp2-zero1-zero-bubble", {**CUBE, **ZERO_BUBBLE, "zero.stage": 1}, 8, {"timeout_seconds": 400}),
    ("pp2-gpipe", {"pipe": 2, "pipeline.schedule": "gpipe"}, 2, {}),
    ("pp2-1f1b", {"pipe": 2}, 2, {"accumulation": 4}),
    ("pp2-interleaved", {"pipe": 2, "pipeline.schedule": "interleaved"}, 2, {"varying": True}),
    ("pp2-zero-bubble", {"pipe": 2, "pipeline.schedule": "zero_bubble_v"}, 2, {"accumulation": 4}),
    ("pp4-uneven", {"pipe": 4, "pipeline.split": (2, 1, 3, 2)}, 4, {"varying": True}),
    ("dp2-pp2", {"data": 2, "pipe": 2}, 4, {}),
    ("tp2-pp2", {"tensor": 2, "pipe": 2}, 4, {"varying": True}),
    ("ep2", {"data": 2, "expert": 2}, 2, {"task": EXPERTS}),
    ("ep2-dropping", {"data": 2, "expert": 2}, 2, {"task": DROPPING, "accumulation": 2}),
    ("ep2-dp2", {"data": 4, "expert": 2}, 4, {"task": EXPERTS, "varying": True}),
    ("cp2-ring", {"context": 2}, 2, {}),
    ("cp2-ulysses", {"context": 2, "context_method": "ulysses"}, 2, {}),
    ("cp2-tp2", {"context": 2, "tensor": 2}, 4, {"varying": True}),
    ("cp2-pp2", {"context": 2, "pipe": 2}, 4, {"varying": True}),
    ("ep2-zero1", {"data": 2, "expert": 2, "zero.stage": 1}, 2, {"task": EXPERTS}),
    ("ep2-zero2", {"data": 2, "expert": 2, "zero.stage": 2}, 2, {"task": EXPERTS, "accumulation": 2}),
    ("ep2-dp2-zero1", {**GROUPS, "zero.stage": 1}, 4, {"task": EXPERTS, "varying": True}),
    ("ep2-dp2-zero2", {**GROUPS, "zero.stage": 2}, 4, {"task": EXPERTS}),
    ("pp2-experts", {"pipe": 2}, 2, {"task": MIXED, "accumulation": 4, "checkpointing": "full"}),
    ("ep2-pp2-zero1", {**CORNERS, "pipe": 2, "zero.stage": 1}, 4, {"task": MIXED}),
    ("dp2-zero2-nvme", {"data": 2, "zero.stage": 2, **NVME}, 2, {"accumulation": 2}),
]
LONGER: list[Row] = [
    ("dp2-accumulation2", {"data": 2}, 2, {"accumulation": 2}),
    ("dp2-overlap-accumulation2", {"data": 2, "zero.bucket_elements": 2000}, 2, {"accumulation": 2}),
    ("dp2-zero1-accumulation4", {"data": 2, "zero.stage": 1}, 2, {"accumulation": 4}),
    ("dp2-zero3-accumulation4", {"data": 2, "zero.stage": 3}, 2, {"accumulation": 4}),
    ("dp2-overlap-bf16", {"data": 2, "zero.bucket_elements": 2000}, 2, BF16),
    ("dp2-zero1-bf16", {"data": 2, "zero.stage": 1}, 2, BF16),
    ("dp2-zero3-bf16", {"data": 2, "zero.stage": 3}, 2, BF16),
    ("zero1-alone", {"zero.stage": 1, "zero.offload_optimizer": "cpu"}, 1, {}),
    ("tp2-sequence-varying", {"tensor": 2, "sequence": True}, 2, {"varying": True}),
    ("dp2-tp2-sequence-zero2", {"data": 2, "tensor": 2, "sequence": True, "zero.stage": 2}, 4, {"accumulation": 2}),
    ("dp2-tp2-sequence-zero3", {"data": 2, "tensor": 2, "sequence": True, "zero.stage": 3}, 4, {"varying": True}),
    ("tp4-sequence-shared-key-heads", {"tensor": 4, "sequence": True}, 4, {"task": KEY_HEADS}),
    ("dp2-tp2-zero1-shared-key-heads", {"data": 2, "tensor": 2, "zero.stage": 1}, 4, {"task": KEY_HEADS}),
    ("dp2-tp2-zero3-shared-key-heads", {"data": 2, "tensor": 2, "zero.stage": 3}, 4, {"task": KEY_HEADS}),
    ("tp2-sequence-bf16", {"tensor": 2, "sequence": True}, 2, BF16),
    ("dp2-pp2-zero1-interleaved", {"data": 2, "pipe": 2, "zero.stage": 1, **INTERLEAVED}, 4, {}),
    ("tp2-bf16", {"tensor": 2}, 2, BF16),
    ("dp2-tp2-zero2-bf16", {"data": 2, "tensor": 2, "zero.stage": 2}, 4, BF16),
    ("dp2-tp2-zero3-bf16", {"data": 2, "tensor": 2, "zero.stage": 3}, 4, BF16),
    ("tp2-pp2-bf16", {"tensor": 2, "pipe": 2}, 4, BF16),
    ("dp2-tp2-pp2-zero1-bf16", {"data": 2, "tensor": 2, "pipe": 2, "zero.stage": 1}, 8, BF16),
    ("dp2-pp2-zero1-bf16", {"data": 2, "pipe": 2, "zero.stage": 1}, 4, BF16),
    ("dp2-pp2-zero2-bf16", {"data": 2, "pipe": 2, "zero.stage": 2}, 4, BF16),
    ("pp2-zero-bubble-bf16", {"pipe": 2, **ZERO_BUBBLE}, 2, BF16),
    ("dp2-pp2-zero1-zero-bubble-bf16", {"data": 2, "pipe": 2, **ZERO_BUBBLE, "zero.stage": 1}, 4, BF16),
    ("cp2-pp2-zero-bubble", {"context": 2, "pipe": 2, **ZERO_BUBBLE}, 4, {}),
    ("pp2-rows-left-over", {"pipe": 2}, 2, {"rows": 7}),
    ("tp2-pp2-sequence", {"tensor": 2, "pipe": 2, "sequence": True}, 4, {"varying": True}),
    ("experts-accumulation4", {}, 1, {"task": DROPPING, "accumulation": 4}),
    ("ep2-overlap", {"data": 4, "expert": 2, "zero.bucket_elements": 1000}, 4, {"task": EXPERTS, "accumulation": 2}),
    ("cp2-padded", {"context": 2}, 2, {"shorten": 1, "accumulation": 2}),
    ("cp2-ulysses-padded", {"context": 2, "context_method": "ulysses"}, 2, {"shorten": 3}),
    ("cp2-tp2-sequence", {"context": 2, "tensor": 2, "sequence": True}, 4, {}),
    ("ep2-tp2", {"data": 2, "expert": 2, "tensor": 2}, 4, {"task": EXPERTS}),
    ("dp2-cp2", {"data": 2, "context": 2}, 4, {}),
    ("cp2-bf16", {"context": 2}, 2, BF16),
    ("cp2-tp2-bf16", {"context": 2, "tensor": 2}, 4, BF16),
    ("cp2-ulysses-bf16", {"context": 2, "context_method": "ulysses"}, 2, BF16),
    ("cp2-zero2", {"context": 2, "zero.stage": 2}, 2, {}),
    ("cp2-zero3", {"context": 2, "zero.stage": 3}, 2, {"varying": True}),
    ("dp2-zero3-experts", {"data": 2, "zero.stage": 3}, 2, {"task": EXPERTS}),
    ("ep2-cp2", {"data": 2, "expert": 2, "context": 2}, 4, {"task": EXPERTS}),
    ("ep2-dp2-zero3", {**GROUPS, "zero.stage": 3, "zero.persistence_elements": 0}, 4, {"task": EXPERTS}),
    ("pp2-experts-gpipe", {"pipe": 2, "pipeline.schedule": "gpipe"}, 2, {"task": BALANCED}),
    ("pp2-experts-interleaved", {"pipe": 2, **INTERLEAVED}, 2, {"task": MIXED, "varying": True}),
    ("pp2-experts-zero-bubble", {"pipe": 2, **ZERO_BUBBLE}, 2, {"task": MIXED}),
    ("ep2-pp2", {**CORNERS, "pipe": 2}, 4, {"task": BALANCED, "rows": 7}),
    ("dp2-zero1-nvme", {"data": 2, "zero.stage": 1, **NVME}, 2, {}),
    ("dp2-zero3-nvme", {"data": 2, "zero.stage": 3, **NVME, "zero.offload_parameters": "cpu"}, 2, {"accumulation": 2}),
    ("zero1-alone-nvme", {"zero.stage": 1, **NVME}, 1, {}),
    ("dp2-zero1-nvme-bf16", {"data": 2, "zero.stage": 1, **NVME}, 2, BF16),
    ("dp2-zero2-nvme-bf16", {"data": 2, "zero.stage": 2, **NVME}, 2, BF16),
    ("dp2-zero3-nvme-bf16", {"data": 2, "zero.stage": 3, **NVME}, 2, BF16),
    ("dp2-pp2-zero2-nvme", {"data": 2, "pipe": 2, "zero.stage": 2, **NVME}, 4, {}),
    ("ep2-dp2-zero1-nvme", {**GROUPS, "zero.stage": 1, **NVME}, 4, {"task": EXPERTS}),
    ("ep2-dp2-zero3-nvme", {**GROUPS, "zero.stage": 3, **NVME}, 4, {"task": EXPERTS}),
    ("ep2-zero3", {**CORNERS, "zero.stage": 3}, 2, {"task": EXPERTS, "accumulation": 2}),
    ("ep4-zero2", {"data": 4, "expert": 4, "zero.stage": 2}, 4, {"task": EXPERTS}),
    ("ep2-dp2-zero2-overlap", {**GROUPS, **OVERLAP}, 4, {"task": EXPERTS}),
    ("ep2-dp2-zero2-offload", {**GROUPS, "zero.stage": 2, "zero.offload_optimizer": "cpu"}, 4, {"task": EXPERTS}),
    ("ep2-dp2-zero3-offload", {**GROUPS, **OFFLOAD}, 4, {"task": EXPERTS, "accumulation": 2}),
    ("ep2-dp2-zero1-bf16", {**GROUPS, "zero.stage": 1}, 4, {"task": EXPERTS, **BF16}),
    ("ep2-dp2-zero2-bf16", {**GROUPS, "zero.stage": 2}, 4, {"task": EXPERTS, **BF16}),
    ("ep2-dp2-zero3-bf16", {**GROUPS, "zero.stage": 3}, 4, {"task": EXPERTS, **BF16}),
    ("ep2-tp2-zero1", {**CORNERS, "tensor": 2, "zero.stage": 1}, 4, {"task": EXPERTS}),
    ("ep2-tp2-zero3", {**CORNERS, "tensor": 2, "zero.stage": 3}, 4, {"task": EXPERTS, "varying": True}),
    ("ep2-cp2-zero2", {**CORNERS, "context": 2, "zero.stage": 2}, 4, {"task": EXPERTS}),
    ("ep2-cp2-zero3", {**CORNERS, "context": 2, "zero.stage": 3}, 4, {"task": EXPERTS}),
    ("pp4-experts-uneven", {"pipe": 4, "pipeline.split": (2, 1, 3, 2)}, 4, {"task": MIXED, "varying": True}),
    ("ep2-pp2-dropping", {**CORNERS, "pipe": 2}, 4, {"task": DROPPING}),
    ("ep2-pp2-zero-bubble", {**CORNERS, "pipe": 2, **ZERO_BUBBLE}, 4, {"task": MIXED}),
    ("ep2-pp2-zero2", {**CORNERS, "pipe": 2, "zero.stage": 2}, 4, {"task": MIXED}),
    ("ep2-pp2-zero1-interleaved", {**CORNERS, "pipe": 2, "zero.stage": 1, **INTERLEAVED}, 4, {"task": MIXED}),
    ("ep2-pp2-zero1-bf16", {**CORNERS, "pipe": 2, "zero.stage": 1}, 4, {"task": EXPERTS, **BF16}),
    ("tp2-pp2-experts", {"tensor": 2, "pipe": 2, "sequence": True}, 4, {"task": MIXED}),
    ("cp2-pp2-experts", {"context": 2, "pipe": 2}, 4, {"task": MIXED}),
    ("ep2-tp2-pp2-zero1", {**CUBE, "expert": 2, "zero.stage": 1}, 8, {"task": MIXED}),
]
"""Further combinations of the same."""


@pytest.mark.parametrize(("parallel", "world_size", "options"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
def test_layout_trains_as_one_process(parallel: dict[str, Any], world_size: int, options: dict[str, Any]) -> None:
    check_layout(parallel, world_size=world_size, **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("parallel", "world_size", "options"), [row[1:] for row in LONGER], ids=[row[0] for row in LONGER]
)
def test_further_layout_trains_as_one_process(
    parallel: dict[str, Any], world_size: int, options: dict[str, Any]
) -> None:
    check_layout(parallel, world_size=world_size, **options)
