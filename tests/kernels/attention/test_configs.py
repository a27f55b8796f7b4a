"""Tile sizes by what a card can hold."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megaseq.kernels.attention import configs, fused
from megaseq.kernels.attention.configs import FORWARD, MAX_HEAD, OF_KEY, OF_QUERY, candidates
from megaseq.kernels.triton_runtime import Config, generation

KERNELS = (FORWARD, OF_QUERY, OF_KEY)
LARGE, SMALL = 163 << 10, 99 << 10


def tiles(kernel: str, *, arch: int, shared: int, head: int = 64) -> tuple[Config, ...]:
    return candidates(kernel, dtype=torch.bfloat16, head=head, bias=True, arch=arch, shared=shared)


@pytest.mark.parametrize(
    "arch, same_as", [(80, 80), (86, 80), (89, 80), (90, 90), (100, 100), (103, 100), (110, 100), (120, 80), (121, 80)]
)
def test_consumer_cards_have_the_first_tensor_cores(arch: int, same_as: int) -> None:
    assert generation(arch) == same_as
    for kernel in KERNELS:
        for head in (64, 128, 256):
            have = tiles(kernel, arch=arch, shared=227 << 10, head=head)
            assert have == tiles(kernel, arch=same_as, shared=227 << 10, head=head)


def test_small_cards_have_tiles_of_their_own() -> None:
    """Those of an sm_80 take up to 115,200 bytes of the 101,376 that there are; the gate compiles what is launched."""
    large, small = ({kernel: tiles(kernel, arch=80, shared=size)[0] for kernel in KERNELS} for size in (LARGE, SMALL))
    assert large[FORWARD] == Config({"BLOCK_M": 128, "BLOCK_N": 64}, 8, 3)
    assert small[FORWARD] == Config({"BLOCK_M": 128, "BLOCK_N": 64}, 8, 2)
    assert small[OF_QUERY] == Config({"BLOCK_M": 64, "BLOCK_N": 64}, 4, 2) != large[OF_QUERY]
    assert small[OF_KEY] == large[OF_KEY]
    assert tiles(OF_KEY, arch=89, shared=SMALL, head=256) == (Config({"BLOCK_M": 32, "BLOCK_N": 32}, 4, 1),)


def test_older_compilers_have_tiles_that_do_not_spill(monkeypatch: pytest.MonkeyPatch) -> None:
    for version, keys, stages in (((3, 6), 64, 1), ((3, 9), 128, 2)):
        monkeypatch.setattr(configs, "version", lambda version=version: version)
        assert tiles(OF_KEY, arch=100, shared=227 << 10)[0] == Config({"BLOCK_M": 64, "BLOCK_N": keys}, 8, stages)
        assert tiles(OF_KEY, arch=90, shared=227 << 10)[0].num_stages == 2


@pytest.mark.parametrize("bias, rows", [(True, [16]), (False, [32, 16])])
def test_a_bias_leaves_the_widest_heads_fewer_registers(bias: bool, rows: list[int]) -> None:
    found = candidates(OF_KEY, dtype=torch.bfloat16, head=256, bias=bias, arch=90, shared=227 << 10)
    assert [config.blocks["BLOCK_M"] for config in found] == rows


@pytest.mark.parametrize(
    "shared, dtype, widest",
    [
        (227 << 10, torch.float32, MAX_HEAD),
        (SMALL, torch.bfloat16, MAX_HEAD),
        (SMALL, torch.float32, 128),
        (64 << 10, torch.bfloat16, 0),
    ],
)
def test_wide_heads_need_a_large_card(
    shared: int, dtype: torch.dtype, widest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    properties = SimpleNamespace(shared_memory_per_block_optin=shared)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    assert fused.widest_on(torch.device("cuda", 0), dtype) == widest
