"""Linear cross entropy: the chunked op against the plain one, torch and finite differences."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from megaseq.kernels import CrossEntropy, cross_entropy, linear_cross_entropy
from megaseq.kernels.checks import KernelError
from megaseq.kernels.cross_entropy import LossSums, VocabularyShare
from megaseq.kernels.cross_entropy.chunked import chunked_cross_entropy
from megaseq.kernels.cross_entropy.reference import reference_cross_entropy

VARIANTS = (
    CrossEntropy(),
    CrossEntropy(label_smoothing=0.1),
    CrossEntropy(label_smoothing=0.1, scale=0.3, chunk=4),
    CrossEntropy(z_loss=0.01, chunk=4),
    CrossEntropy(label_smoothing=0.2, z_loss=0.01, soft_cap=1.5, chunk=3),
    CrossEntropy(soft_cap=2.0),
)


def tensors(*, count: int, width: int, classes: int, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    """Arguments of the op, with a few weights of 0."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(count, generator=generator, dtype=torch.float32)
    weights[::3] = 0.0
    return {
        "hidden": torch.randn(count, width, generator=generator, dtype=dtype).requires_grad_(),
        "weight": torch.randn(classes, width, generator=generator, dtype=dtype).requires_grad_(),
        "bias": torch.randn(classes, generator=generator, dtype=dtype).requires_grad_(),
        "labels": torch.randint(0, classes, (count,), generator=generator),
        "weights": weights.to(torch.promote_types(dtype, torch.float32)),
    }


def gradients(loss: Tensor, arguments: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Gradients of hidden, weight and bias."""
    return torch.autograd.grad(loss, [arguments[name] for name in ("hidden", "weight", "bias")])


@pytest.mark.parametrize("variant", VARIANTS)
def test_chunked_equals_reference(variant: CrossEntropy) -> None:
    arguments = tensors(count=13, width=6, classes=11, dtype=torch.float64)
    want = reference_cross_entropy(**arguments, settings=variant)
    have = chunked_cross_entropy(**arguments, settings=variant)
    torch.testing.assert_close(tuple(have), tuple(want), rtol=1e-12, atol=1e-12)
    for a, b in zip(gradients(have.loss * 0.7, arguments), gradients(want.loss * 0.7, arguments), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradcheck(variant: CrossEntropy) -> None:
    arguments = tensors(count=5, width=3, classes=4, dtype=torch.float64)

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        fixed = {"labels": arguments["labels"], "weights": arguments["weights"]}
        return linear_cross_entropy(hidden, weight=weight, bias=bias, settings=variant, **fixed).loss

    assert torch.autograd.gradcheck(loss, (arguments["hidden"], arguments["weight"], arguments["bias"]))


@settings(max_examples=30, deadline=None)
@given(
    count=st.integers(1, 40),
    width=st.integers(1, 9),
    classes=st.integers(1, 30),
    chunk=st.integers(1, 50),
    smoothing=st.sampled_from([0.0, 0.1, 0.5]),
    seed=st.integers(0, 100),
)
def test_agrees_with_torch(count: int, width: int, classes: int, chunk: int, smoothing: float, seed: int) -> None:
    arguments = tensors(count=count, width=width, classes=classes, dtype=torch.float32, seed=seed)
    have = linear_cross_entropy(**arguments, settings=CrossEntropy(label_smoothing=smoothing, chunk=chunk))
    logits = functional.linear(arguments["hidden"], arguments["weight"], arguments["bias"])
    each = functional.cross_entropy(logits, arguments["labels"], reduction="none", label_smoothing=smoothing)
    want = (each * arguments["weights"]).sum()
    torch.testing.assert_close(have.loss, want, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(have.weight, arguments["weights"].sum())
    for a, b in zip(gradients(have.loss, arguments), gradients(want, arguments), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_metrics() -> None:
    hidden = torch.eye(3)
    weight = torch.tensor([[5.0, 0, 0], [0, 5.0, 0], [0, 0, 5.0]])
    sums = linear_cross_entropy(
        hidden, weight=weight, labels=torch.tensor([0, 1, 0]), weights=torch.tensor([1.0, 2.0, 4.0])
    )
    assert float(sums.correct) == 3.0 and float(sums.weight) == 7.0
    right = float(torch.logsumexp(torch.tensor([5.0, 0, 0]), 0)) - 5.0
    assert float(sums.nll) == pytest.approx(3 * right + 4 * (right + 5.0), rel=1e-6)


def test_unlikely_labels_stay_finite() -> None:
    """The label's probability underflows; the loss is the gap of the logits."""
    sums = linear_cross_entropy(
        torch.tensor([[1.0]]),
        weight=torch.tensor([[500.0], [-500.0]]).requires_grad_(),
        labels=torch.tensor([1]),
        weights=torch.ones(1),
    )
    assert float(sums.loss.detach()) == 1000.0


@pytest.mark.parametrize("variant", [CrossEntropy(), CrossEntropy(label_smoothing=0.1, z_loss=1e-4)])
def test_steep_logits_leave_no_subnormal_numbers(variant: CrossEntropy) -> None:
    """Products of such numbers take a processor a hundred times as long; the gradients are the reference's."""
    generator = torch.Generator().manual_seed(0)
    arguments = tensors(count=48, width=16, classes=300, dtype=torch.float32)
    arguments["weight"] = (torch.randn(300, 16, generator=generator) * 10).requires_grad_()
    logits = (arguments["hidden"] @ arguments["weight"].t()).detach()
    plain = torch.softmax(logits, dim=-1)
    assert ((plain > 0) & (plain < torch.finfo(torch.float32).tiny)).any()
    found = gradients(chunked_cross_entropy(**arguments, settings=variant).loss, arguments)
    expected = gradients(reference_cross_entropy(**arguments, settings=variant).loss, arguments)
    for have, want in zip(found, expected, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-5, atol=1e-4)
        assert not ((have != 0) & (have.abs() < torch.finfo(torch.float32).tiny)).any()


@pytest.mark.parametrize(("factor", "times"), [(0.1, 0), (10.0, 1)])
def test_only_steep_logits_cost_a_pass_that_bounds_them(factor: float, times: int) -> None:
    arguments = tensors(count=48, width=16, classes=300, dtype=torch.float32)
    arguments["weight"] = torch.randn(300, 16, generator=torch.Generator().manual_seed(0)) * factor
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        chunked_cross_entropy(**arguments, settings=CrossEntropy())
    assert sum(event.count for event in profiler.key_averages() if event.key == "aten::maximum") == times


@pytest.mark.parametrize(("count", "implementation"), [(8, "reference"), (9, "chunked")])
def test_few_tokens_in_host_memory_are_not_done_by_chunks(
    count: int, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[str] = []
    for name in ("reference", "chunked"):
        stock: Callable[..., LossSums] = getattr(cross_entropy, f"{name}_cross_entropy")

        def spy(*args: Tensor, stock: Callable[..., LossSums] = stock, name: str = name, **rest: object) -> LossSums:
            taken.append(name)
            return stock(*args, **rest)

        monkeypatch.setattr(cross_entropy, f"{name}_cross_entropy", spy)
    linear_cross_entropy(**tensors(count=count, width=16, classes=5, dtype=torch.float32))
    assert taken == [implementation]


def test_labels_of_weight_zero_are_not_read_and_cost_nothing() -> None:
    arguments = tensors(count=9, width=4, classes=5, dtype=torch.float32)
    expected = linear_cross_entropy(**arguments)
    arguments["labels"] = torch.where(arguments["weights"] == 0, -100, arguments["labels"])
    found = linear_cross_entropy(**arguments)
    assert torch.equal(found.loss, expected.loss)
    (gradient,) = torch.autograd.grad(found.loss, arguments["hidden"])
    assert (gradient[arguments["weights"] == 0] == 0).all()


def test_all_weights_zero() -> None:
    arguments = tensors(count=4, width=3, classes=5, dtype=torch.float32)
    arguments["weights"] = torch.zeros(4)
    sums = linear_cross_entropy(**arguments, settings=CrossEntropy(label_smoothing=0.1))
    assert float(sums.loss) == 0.0 and float(sums.weight) == 0.0
    assert all((gradient == 0).all() for gradient in gradients(sums.loss, arguments))


def test_bf16_keeps_softmax_and_weight_gradient_precise() -> None:
    arguments = tensors(count=64, width=16, classes=50, dtype=torch.bfloat16)
    precise = {
        name: tensor.detach().double().requires_grad_(tensor.requires_grad) if tensor.is_floating_point() else tensor
        for name, tensor in arguments.items()
    }
    have = linear_cross_entropy(**arguments, settings=CrossEntropy(chunk=8))
    want = linear_cross_entropy(**precise)
    assert have.loss.dtype is torch.float32
    torch.testing.assert_close(have.loss.double(), want.loss, rtol=2e-2, atol=0)
    for a, b in zip(gradients(have.loss, arguments), gradients(want.loss, precise), strict=True):
        assert a.dtype is torch.bfloat16
        assert float((a.double() - b).norm() / b.norm()) < 2e-2


def test_under_autocast_the_products_are_bf16() -> None:
    arguments = tensors(count=8, width=4, classes=6, dtype=torch.float32)
    exact = linear_cross_entropy(**arguments).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = linear_cross_entropy(**{**arguments, "hidden": arguments["hidden"].bfloat16()}).loss
    assert found.dtype is torch.float32
    torch.testing.assert_close(found, exact, rtol=3e-2, atol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_autocast_rounds_what_is_multiplied_and_no_sums(variant: CrossEntropy) -> None:
    arguments = tensors(count=300, width=4, classes=6, dtype=torch.float32)
    arguments["weights"] = torch.full((300,), 0.3)
    rounded = {name: each.bfloat16() if each.requires_grad else each for name, each in arguments.items()}
    expected = linear_cross_entropy(**rounded, settings=variant)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = linear_cross_entropy(**arguments, settings=variant)
    torch.testing.assert_close(tuple(found), tuple(expected), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.weight, torch.tensor(90.0), rtol=1e-6, atol=0)


def test_without_gradients_nothing_is_saved() -> None:
    arguments = tensors(count=8, width=4, classes=6, dtype=torch.float32)
    with torch.no_grad():
        sums = linear_cross_entropy(**arguments)
    assert not sums.loss.requires_grad
    torch.testing.assert_close(sums.loss, linear_cross_entropy(**arguments).loss.detach())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weight": torch.zeros(5, 7)}, r"weight must have shape \[V, D\] = \[any, 4\], but is \[5, 7\]"),
        ({"labels": torch.full((6,), 5)}, r"labels must lie in \[0, 5\), but is 5"),
        ({"labels": torch.zeros(6, dtype=torch.int32)}, "labels must be int64"),
        ({"labels": torch.zeros(5, dtype=torch.int64)}, r"labels must have shape \[N\] = \[6\], but is \[5\]"),
        ({"bias": torch.zeros(4)}, "bias must have shape"),
        ({"settings": CrossEntropy(label_smoothing=1.0)}, "label_smoothing must be at least 0 and below 1"),
        ({"bias": torch.zeros(5, dtype=torch.int64)}, "bias must be floating point, but is torch.int64"),
        ({"settings": CrossEntropy(soft_cap=0.0)}, "soft_cap must be above 0, but is 0.0"),
        ({"settings": CrossEntropy(z_loss=-1.0)}, "z_loss must be at least 0, but is -1.0"),
        ({"settings": CrossEntropy(chunk=0)}, "chunk must be at least 1, but is 0"),
    ],
)
def test_what_does_not_fit_is_one_sentence(change: dict[str, object], words: str) -> None:
    arguments: dict[str, object] = {
        "weight": torch.zeros(5, 4),
        "labels": torch.zeros(6, dtype=torch.int64),
        "weights": torch.ones(6),
        **change,
    }
    with pytest.raises(KernelError, match=words) as caught:
        linear_cross_entropy(torch.zeros(6, 4), **arguments)  # type: ignore[arg-type]
    assert str(caught.value).startswith("linear_cross_entropy: ") and "\n" not in str(caught.value)


class Threads:
    """Ranks that share a vocabulary, as threads of this process: sums and maxima meet at a barrier."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size)
        self.given: dict[int, torch.Tensor] = {}

    def meet(self, rank: int, *, largest: bool) -> Callable[[torch.Tensor], torch.Tensor]:
        def together(tensor: torch.Tensor) -> torch.Tensor:
            self.given[rank] = tensor
            self.barrier.wait(30)
            stacked = torch.stack(list(self.given.values()))
            self.barrier.wait(30)
            return stacked.amax(dim=0) if largest else stacked.sum(dim=0)

        return together


@pytest.mark.parametrize("soft_cap", [None, 3.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_ranks_that_share_the_vocabulary_have_the_sums_of_the_whole(smoothing: float, soft_cap: float | None) -> None:
    generator = torch.Generator().manual_seed(3)
    hidden, weight = (torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in (9, 7))
    bias = torch.randn(7, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 7, (9,), generator=generator)
    weights = torch.tensor([1.0, 0.0, 2.0, 1.0, 1.0, 0.0, 1.0, 1.0, 0.5], dtype=torch.float64)
    plan = CrossEntropy(label_smoothing=smoothing, z_loss=0.01, soft_cap=soft_cap, scale=0.5, chunk=4)
    leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight, bias)]
    whole = linear_cross_entropy(
        leaves[0], weight=leaves[1], bias=leaves[2], labels=labels, weights=weights, settings=plan
    )
    expected = torch.autograd.grad(whole.loss, leaves)
    bounds, threads = [0, 2, 7], Threads(2)

    def rank(index: int) -> tuple[LossSums, tuple[torch.Tensor, ...]]:
        part = slice(bounds[index], bounds[index + 1])
        own = [tensor.clone().requires_grad_() for tensor in (hidden, weight[part], bias[part])]
        share = VocabularyShare(
            first=part.start,
            size=7,
            total=threads.meet(index, largest=False),
            maximum=threads.meet(index, largest=True),
        )
        sums = linear_cross_entropy(
            own[0], weight=own[1], bias=own[2], labels=labels, weights=weights, settings=plan, vocabulary=share
        )
        return sums, torch.autograd.grad(sums.loss, own)

    with ThreadPoolExecutor(2) as pool:
        (first, of_first), (second, of_second) = pool.map(rank, range(2))
    for mine, other, all_of_it in zip(first, second, whole, strict=True):
        torch.testing.assert_close(mine, all_of_it)
        torch.testing.assert_close(other, all_of_it)
    torch.testing.assert_close(of_first[0] + of_second[0], expected[0])
    torch.testing.assert_close(torch.cat([of_first[1], of_second[1]]), expected[1])
    torch.testing.assert_close(torch.cat([of_first[2], of_second[2]]), expected[2])
