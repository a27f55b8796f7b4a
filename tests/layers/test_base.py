"""First values and dropout are functions of paths; FROM_PARENT params are filled."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from megaseq.base import ParamsError
from megaseq.layers import FeedForward, Layer, LayerNorm, Linear, SelfAttention, bind, families, initialize
from megaseq.layers.base import inherit, stable_hash
from megaseq.layers.initializers import Constant, Gaussian


class Pairs(Layer):
    """Two linear maps, made in an order that the test chooses."""

    class Params(Layer.Params):
        backwards: bool = False
        """Whether `b` is made first."""

    params: Params

    def __init__(self, p: Params) -> None:
        super().__init__(p)
        for name in ("b", "a") if p.backwards else ("a", "b"):
            linear = Linear.Params(input_dim=5, output_dim=3, bias=True, init=Gaussian.Params(std=1.0))
            setattr(self, name, linear.instantiate(axes=("hidden", "model")))


def values(module: nn.Module) -> dict[str, torch.Tensor]:
    """Returns copies of all parameters."""
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def test_first_values_do_not_depend_on_the_order_of_creation() -> None:
    forwards, backwards = Pairs.Params().instantiate(), Pairs.Params(backwards=True).instantiate()
    torch.manual_seed(1)
    initialize(forwards, seed=5)
    torch.manual_seed(2)
    initialize(backwards, seed=5)
    first, second = values(forwards), values(backwards)
    assert list(first) != list(second)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["a.weight"], first["b.weight"])


def test_first_values_depend_on_seed_and_path() -> None:
    module = Pairs.Params().instantiate()
    initialize(module, seed=5)
    base = values(module)["a.weight"]
    initialize(module, seed=6)
    assert not torch.equal(base, values(module)["a.weight"])
    initialize(module, seed=5, prefix="other")
    assert not torch.equal(base, values(module)["a.weight"])
    initialize(module, seed=5)
    assert torch.equal(base, values(module)["a.weight"])


def test_first_values_are_frozen() -> None:
    """Every run that was ever made depends on these numbers."""
    assert stable_hash("task.encoder") == 5797635479452987460
    module = Pairs.Params().instantiate()
    initialize(module, seed=1)
    assert module.a.weight[0, :3].tolist() == pytest.approx([-2.536493, -0.496106, -0.955384], abs=1e-6)


def test_first_values_are_the_same_in_bfloat16_up_to_rounding() -> None:
    full, half = Pairs.Params().instantiate(), Pairs.Params().instantiate().to(torch.bfloat16)
    for one, other in zip(full.parameters(), half.parameters(), strict=True):
        other.spec = one.spec  # type: ignore[attr-defined]
    initialize(full, seed=3)
    initialize(half, seed=3)
    assert torch.equal(full.a.weight.to(torch.bfloat16), half.a.weight)


def test_fused_parts_are_initialised_apart() -> None:
    p = SelfAttention.Params(model_dim=64, norm=LayerNorm.Params(), residual="pre", dropout=0.0, bias=True)
    p = p.replace(attention_dropout=0.0, causal=False, num_heads=4, num_key_value_heads=1)
    attention: SelfAttention = p.instantiate()
    initialize(attention, seed=1)
    query, key, _ = attention.qkv.weight.detach().split([64, 16, 16])
    assert abs(float(query.abs().max()) - (6 / 128) ** 0.5) < 2e-3
    assert abs(float(key.abs().max()) - (6 / 80) ** 0.5) < 5e-3
    spec = attention.qkv.weight.spec  # type: ignore[attr-defined]
    assert spec.parts == (64, 16, 16) and spec.shape == (96, 64) and spec.axes == ("heads", "model")


def test_a_bare_parameter_is_refused_with_its_path() -> None:
    module = Pairs.Params().instantiate()
    module.a.extra = nn.Parameter(torch.zeros(2))
    with pytest.raises(ParamsError, match=r"^task\.a\.extra: must be made by Layer\.create_parameter, but is"):
        initialize(module, seed=1)


@pytest.mark.parametrize(
    ("axes", "parts", "rule"),
    [
        (("model",), (), "logical axis"),
        (("model", "wrong"), (), "logical axis"),
        (("model", None), (2, 2), "add up to 3"),
    ],
)
def test_create_parameter_checks_axes_and_parts(axes: tuple[str, ...], parts: tuple[int, ...], rule: str) -> None:
    layer = Pairs.Params().instantiate()
    with pytest.raises(ParamsError, match=rule):
        layer.create_parameter("w", shape=(3, 5), axes=axes, init=Constant.Params().instantiate(), parts=parts)


def test_every_parameter_has_a_spec_and_a_path_like_its_params() -> None:
    p = families.t5gemma(
        model_dim=8, hidden_dim=8, num_heads=2, num_key_value_heads=1, head_dim=4, num_layers=2, window=3
    )
    p.source_vocab_size = p.target_vocab_size = 11
    model = p.instantiate()
    bind(model, seed=1)
    for name, parameter in model.named_parameters():
        spec = parameter.spec  # type: ignore[attr-defined]
        assert spec.shape == tuple(parameter.shape), name
    assert model.encoder.layers[1].ffn.up.path == "task.encoder.layers.1.ffn.up"
    assert model.path == "task"


def test_binding_shares_one_context() -> None:
    p = families.transformer(model_dim=8, hidden_dim=8, num_heads=2, num_layers=1)
    p.source_vocab_size = p.target_vocab_size = 11
    model = p.instantiate()
    context = bind(model, seed=9)
    assert context.seed == 9
    assert all(layer.context is context for layer in model.modules() if isinstance(layer, Layer))


def test_dropout_is_a_function_of_seed_step_rows_and_path() -> None:
    p = FeedForward.Params(hidden_dim=64, model_dim=32, norm=LayerNorm.Params(), residual="pre", dropout=0.5, bias=True)
    block: FeedForward = p.replace(activation_dropout=0.5).instantiate()
    initialize(block, seed=1)
    x = torch.randn(4, 3, 32, generator=torch.Generator().manual_seed(1))

    def run(**place: int) -> torch.Tensor:
        context = bind(block, seed=place.pop("seed", 1), prefix="a" if place.pop("path", 0) == 0 else "b")
        context.step, context.row_start = place.get("step", 0), place.get("row_start", 0)
        torch.manual_seed(int(torch.randint(1000, ()).item()))
        out: torch.Tensor = block(x)
        return out.detach()

    base = run()
    assert torch.equal(base, run())
    for other in ({"seed": 2}, {"step": 1}, {"row_start": 1}, {"path": 1}):
        assert not torch.equal(base, run(**other)), other
    block.eval()
    assert torch.equal(run(), run(step=7))


def test_inherit_fills_only_what_waits() -> None:
    child = Linear.Params(input_dim=3)
    filled = inherit(child, input_dim=7, output_dim=8, bias=False)
    assert (filled.input_dim, filled.output_dim, filled.bias) == (3, 8, False)


def test_initialising_many_parameters_is_fast() -> None:
    """A generator a parameter costs little beside the numbers themselves."""
    from time import perf_counter

    module = nn.ModuleList(Pairs.Params().instantiate() for _ in range(200))
    started = perf_counter()
    initialize(module, seed=1)
    assert perf_counter() - started < 2.0
