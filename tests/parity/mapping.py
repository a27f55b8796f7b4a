"""Copies weights of transformers' models into ours, by names."""

from __future__ import annotations

import torch
from torch import Tensor, nn

Weights = dict[str, Tensor]


def load(model: nn.Module, *, weights: Weights) -> None:
    """Writes `weights` into `model`; fails unless they are exactly its parameters and persistent buffers."""
    state = {name: value.clone() for name, value in weights.items()}
    model.load_state_dict(state, strict=True)


def t5(theirs: nn.Module, *, per_layer_bias: bool = False, head: bool) -> Weights:
    """Returns our names for the weights of a T5 or UMT5."""
    state = theirs.state_dict()
    ours = {"source_embedding.weight": state["shared.weight"]}
    if head:
        ours["head.weight"] = state["lm_head.weight"]
    for side in ("encoder", "decoder"):
        ours[f"{side}.final_norm.weight"] = state[f"{side}.final_layer_norm.weight"]
        index = 0
        while f"{side}.block.{index}.layer.0.layer_norm.weight" in state:
            block, layer = f"{side}.block.{index}.layer", f"{side}.layers.{index}"
            heads = f"{block}.0.SelfAttention"
            ours[f"{layer}.self_attention.norm.weight"] = state[f"{block}.0.layer_norm.weight"]
            ours[f"{layer}.self_attention.qkv.weight"] = _cat(state, [f"{heads}.{n}.weight" for n in "qkv"])
            ours[f"{layer}.self_attention.output.weight"] = state[f"{heads}.o.weight"]
            bias = f"{heads}.relative_attention_bias.weight"
            if per_layer_bias:
                ours[f"{layer}.self_attention.position_bias.weight"] = state[bias]
            elif index == 0:
                ours[f"{side}.position_bias.weight"] = state[bias]
            place = 1
            if side == "decoder":
                cross = f"{block}.1.EncDecAttention"
                ours[f"{layer}.cross_attention.norm.weight"] = state[f"{block}.1.layer_norm.weight"]
                ours[f"{layer}.cross_attention.query.weight"] = state[f"{cross}.q.weight"]
                ours[f"{layer}.cross_attention.key_value.weight"] = _cat(state, [f"{cross}.{n}.weight" for n in "kv"])
                ours[f"{layer}.cross_attention.output.weight"] = state[f"{cross}.o.weight"]
                place = 2
            dense = f"{block}.{place}.DenseReluDense"
            ours[f"{layer}.ffn.norm.weight"] = state[f"{block}.{place}.layer_norm.weight"]
            gated = f"{dense}.wi_0.weight" in state
            ups = [f"{dense}.wi_0.weight", f"{dense}.wi_1.weight"] if gated else [f"{dense}.wi.weight"]
            ours[f"{layer}.ffn.up.weight"] = _cat(state, ups)
            ours[f"{layer}.ffn.down.weight"] = state[f"{dense}.wo.weight"]
            index += 1
    return ours


def bart(theirs: nn.Module) -> Weights:
    """Returns our names for the weights of BART, mBART, Marian, M2M100, Pegasus: they share theirs."""
    state = theirs.state_dict()
    ours: Weights = {}
    if "model.shared.weight" in state:
        ours["source_embedding.weight"] = state["model.shared.weight"]
    else:
        ours["source_embedding.weight"] = state["model.encoder.embed_tokens.weight"]
        ours["target_embedding.weight"] = state["model.decoder.embed_tokens.weight"]
    if "final_logits_bias" in state:
        ours["logits_bias"] = state["final_logits_bias"][0]
    for side in ("encoder", "decoder"):
        prefix = f"model.{side}"
        for kind in ("weight", "bias"):
            _copy(state, ours, {f"{prefix}.layernorm_embedding.{kind}": f"{side}.input_norm.{kind}"})
            _copy(state, ours, {f"{prefix}.layer_norm.{kind}": f"{side}.final_norm.{kind}"})
        if type(theirs).__name__.startswith(("Bart", "MBart")):
            ours[f"{side}.positions.weight"] = state[f"{prefix}.embed_positions.weight"]
        index = 0
        while f"{prefix}.layers.{index}.fc1.weight" in state:
            _bart_layer(state, ours, theirs=f"{prefix}.layers.{index}", mine=f"{side}.layers.{index}")
            index += 1
    return ours


def _bart_layer(state: Weights, ours: Weights, *, theirs: str, mine: str) -> None:
    for kind in ("weight", "bias"):
        names = [f"{theirs}.self_attn.{n}_proj.{kind}" for n in "qkv"]
        ours[f"{mine}.self_attention.qkv.{kind}"] = _cat(state, names)
        _copy(
            state,
            ours,
            {
                f"{theirs}.self_attn.out_proj.{kind}": f"{mine}.self_attention.output.{kind}",
                f"{theirs}.self_attn_layer_norm.{kind}": f"{mine}.self_attention.norm.{kind}",
                f"{theirs}.encoder_attn_layer_norm.{kind}": f"{mine}.cross_attention.norm.{kind}",
                f"{theirs}.encoder_attn.q_proj.{kind}": f"{mine}.cross_attention.query.{kind}",
                f"{theirs}.encoder_attn.out_proj.{kind}": f"{mine}.cross_attention.output.{kind}",
                f"{theirs}.final_layer_norm.{kind}": f"{mine}.ffn.norm.{kind}",
                f"{theirs}.fc1.{kind}": f"{mine}.ffn.up.{kind}",
                f"{theirs}.fc2.{kind}": f"{mine}.ffn.down.{kind}",
            },
        )
        if f"{theirs}.encoder_attn.k_proj.{kind}" in state:
            names = [f"{theirs}.encoder_attn.{n}_proj.{kind}" for n in "kv"]
            ours[f"{mine}.cross_attention.key_value.{kind}"] = _cat(state, names)


def t5gemma(theirs: nn.Module) -> Weights:
    """Returns our names for the weights of T5Gemma."""
    state = theirs.state_dict()
    ours: Weights = {}
    for side, name in (("encoder", "source"), ("decoder", "target")):
        prefix = f"model.{side}"
        ours[f"{name}_embedding.weight"] = state[f"{prefix}.embed_tokens.weight"]
        ours[f"{side}.final_norm.weight"] = state[f"{prefix}.norm.weight"]
        index = 0
        while f"{prefix}.layers.{index}.mlp.up_proj.weight" in state:
            layer, mine = f"{prefix}.layers.{index}", f"{side}.layers.{index}"
            self_attention = [f"{layer}.self_attn.{n}_proj.weight" for n in "qkv"]
            ours[f"{mine}.self_attention.qkv.weight"] = _cat(state, self_attention)
            ours[f"{mine}.ffn.up.weight"] = _cat(state, [f"{layer}.mlp.{n}_proj.weight" for n in ("gate", "up")])
            names = {
                "self_attn.o_proj": "self_attention.output",
                "pre_self_attn_layernorm": "self_attention.norm",
                "post_self_attn_layernorm": "self_attention.post_norm",
                "mlp.down_proj": "ffn.down",
                "pre_feedforward_layernorm": "ffn.norm",
                "post_feedforward_layernorm": "ffn.post_norm",
                "cross_attn.q_proj": "cross_attention.query",
                "cross_attn.o_proj": "cross_attention.output",
                "pre_cross_attn_layernorm": "cross_attention.norm",
                "post_cross_attn_layernorm": "cross_attention.post_norm",
            }
            _copy(state, ours, {f"{layer}.{a}.weight": f"{mine}.{b}.weight" for a, b in names.items()})
            if side == "decoder":
                cross = [f"{layer}.cross_attn.{n}_proj.weight" for n in "kv"]
                ours[f"{mine}.cross_attention.key_value.weight"] = _cat(state, cross)
            index += 1
    return ours


def _copy(state: Weights, ours: Weights, names: dict[str, str]) -> None:
    ours.update({mine: state[theirs] for theirs, mine in names.items() if theirs in state})


def _cat(state: Weights, names: list[str]) -> Tensor:
    return torch.cat([state[name] for name in names])
