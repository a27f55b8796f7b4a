"""The cross entropy's kernels against the reference in float64, alone and where ranks share the vocabulary."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megaseq.kernels import CrossEntropy, linear_cross_entropy
from megaseq.kernels.cross_entropy import LossSums, VocabularyShare, fused
from megaseq.kernels.cross_entropy.cases import CASES, TOLERANCE, CrossEntropyCase
from megaseq.kernels.cross_entropy.configs import BUDGET, TILE, configs, memory_budget, tokens_of_chunk
from megaseq.kernels.cross_entropy.fused import add_product, linear_cross_entropy_op
from megaseq.kernels.cross_entropy.reference import reference_cross_entropy
from megaseq.kernels.triton_runtime import override
from tests.kernels.cross_entropy.test_cross_entropy import Threads
from tests.kernels.graphs import check_graphs, check_op, relative_error
from tests.kernels.interpreter.poison import untouched_memory

NAMES = ("hidden", "weight", "bias")


def gradients(loss: Tensor, arguments: dict[str, Tensor | None]) -> list[Tensor]:
    """Gradients of what there is of hidden, weight and bias; the scalar is not 1."""
    leaves = [tensor for name in NAMES if (tensor := arguments[name]) is not None]
    return list(torch.autograd.grad(loss * 0.7, leaves))


def expected_of(case: CrossEntropyCase, *, arguments: dict[str, Tensor | None]) -> tuple[LossSums, list[Tensor]]:
    """The reference in float64 on the same numbers, also those that rounding gave."""
    precise = {
        name: tensor.detach().double().requires_grad_(tensor.requires_grad)
        if tensor is not None and tensor.is_floating_point()
        else tensor
        for name, tensor in arguments.items()
    }
    sums = reference_cross_entropy(**precise, settings=case.settings)  # type: ignore[arg-type]
    return sums, gradients(sums.loss, precise)


def check(case: CrossEntropyCase, *, dtype: torch.dtype, device: torch.device) -> None:
    """Asserts that sums and gradients are the reference's."""
    arguments = case.tensors(dtype=dtype, device=device.type)
    want, of_want = expected_of(case, arguments=arguments)
    have = linear_cross_entropy(**arguments, settings=case.settings)  # type: ignore[arg-type]
    for name, found, expected in zip(have._fields, have, want, strict=True):
        assert found.dtype is torch.float32
        # Rounded logits may tie with the highest.
        if name != "correct" or dtype is torch.float32:
            torch.testing.assert_close(found.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    for found, expected in zip(gradients(have.loss, arguments), of_want, strict=True):
        assert found.dtype is dtype and found.shape == expected.shape
        # One class has no gradient at all: its errors are absolute.
        if float(expected.norm()) < 1e-9:
            assert float(found.double().norm()) < TOLERANCE[dtype]
        else:
            assert relative_error(found, expected) < TOLERANCE[dtype]


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels run."""
    monkeypatch.setenv("MEGASEQ_KERNELS", "cross_entropy=triton")


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_sums_and_gradients_of_the_reference(case: CrossEntropyCase, dtype: torch.dtype, device: torch.device) -> None:
    check(case, dtype=dtype, device=device)


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_many_tokens(case: CrossEntropyCase, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then those of weight 0 are left out."""
    monkeypatch.setattr(fused, "WORTH_WAITING", 0)
    check(case, dtype=torch.float32, device=device)


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("config", configs(), ids=lambda config: f"{config.blocks['BLOCK']}x{config.num_warps}")
def test_all_tile_sizes(config: object, device: torch.device) -> None:
    with override(cross_entropy=config):  # type: ignore[arg-type]
        case = CrossEntropyCase("", count=3, num_classes=2500, settings=CrossEntropy(label_smoothing=0.1))
        check(case, dtype=torch.float32, device=device)


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("many", [False, True])
def test_tokens_of_weight_zero_are_not_read(many: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "WORTH_WAITING", 0 if many else 1 << 35)
    arguments = CASES[2].tensors(dtype=torch.float32, device=device.type)
    expected = linear_cross_entropy(**arguments, settings=CASES[2].settings)  # type: ignore[arg-type]
    of_expected = gradients(expected.loss, arguments)
    labels, weights, hidden = (arguments[name] for name in ("labels", "weights", "hidden"))
    assert labels is not None and weights is not None and hidden is not None
    arguments["labels"] = torch.where(weights == 0, -100, labels)
    arguments["hidden"] = torch.where((weights == 0)[:, None], torch.nan, hidden.detach()).requires_grad_()
    found = linear_cross_entropy(**arguments, settings=CASES[2].settings)  # type: ignore[arg-type]
    assert all(torch.equal(have, want) for have, want in zip(found, expected, strict=True))
    of_found = gradients(found.loss, arguments)
    assert all(torch.equal(have, want) for have, want in zip(of_found, of_expected, strict=True))
    assert (of_found[0][weights == 0] == 0).all()


@pytest.mark.usefixtures("forced")
def test_a_label_that_stands_in_may_be_forbidden(device: torch.device) -> None:
    arguments = CrossEntropyCase("", count=7, num_classes=9).tensors(dtype=torch.float32, device=device.type)
    arguments["bias"] = torch.tensor([-float("inf")] + [0.0] * 8, device=device)
    labels, weight = arguments["labels"], arguments["weight"]
    assert labels is not None and weight is not None
    arguments["labels"] = torch.where(labels == 0, 1, labels)
    sums = linear_cross_entropy(**arguments)  # type: ignore[arg-type]
    assert all(bool(value.isfinite()) for value in sums)
    assert torch.autograd.grad(sums.loss, weight)[0].isfinite().all()


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("count", [0, 4])
def test_nothing_counts(count: int, device: torch.device) -> None:
    arguments = CrossEntropyCase("", count=count, num_classes=5).tensors(dtype=torch.float32, device=device.type)
    arguments["weights"] = torch.zeros(count, device=device)
    sums = linear_cross_entropy(**arguments, settings=CrossEntropy(label_smoothing=0.1))  # type: ignore[arg-type]
    assert [float(value.detach()) for value in sums] == [0.0] * 5
    assert all((gradient == 0).all() for gradient in gradients(sums.loss, arguments))


@pytest.mark.usefixtures("forced")
def test_unlikely_labels_and_forbidden_classes(device: torch.device) -> None:
    weight = torch.tensor([[500.0], [-500.0], [0.0]], device=device).requires_grad_()
    bias = torch.tensor([0.0, 0.0, -float("inf")], device=device)
    sums = linear_cross_entropy(
        torch.ones(1, 1, device=device),
        weight=weight,
        bias=bias,
        labels=torch.tensor([1], device=device),
        weights=torch.ones(1, device=device),
    )
    assert float(sums.loss.detach()) == 1000.0
    assert torch.autograd.grad(sums.loss, weight)[0].flatten().tolist() == [1.0, -1.0, 0.0]


@pytest.mark.usefixtures("forced")
def test_autocast_keeps_the_gradient_of_float32_weights_in_float32(device: torch.device) -> None:
    case = CrossEntropyCase("", count=9, settings=CrossEntropy(chunk=4))
    arguments = case.tensors(dtype=torch.float32, device=device.type)
    want, of_want = expected_of(case, arguments=arguments)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        have = linear_cross_entropy(**arguments, settings=case.settings)  # type: ignore[arg-type]
    assert have.loss.dtype is torch.float32
    torch.testing.assert_close(have.loss.double(), want.loss, rtol=2e-2, atol=0)
    for found, expected in zip(gradients(have.loss, arguments), of_want, strict=True):
        assert found.dtype is torch.float32 and relative_error(found, expected) < 2e-2


@pytest.mark.usefixtures("forced")
def test_only_what_is_wanted_is_made(device: torch.device) -> None:
    arguments = CASES[2].tensors(dtype=torch.float32, device=device.type)
    whole = linear_cross_entropy(**arguments, settings=CASES[2].settings)  # type: ignore[arg-type]
    expected = gradients(whole.loss, arguments)
    with torch.no_grad():
        without = linear_cross_entropy(**arguments, settings=CASES[2].settings)  # type: ignore[arg-type]
    assert not without.loss.requires_grad and torch.equal(without.loss, whole.loss)
    for index, name in enumerate(NAMES):
        alone = {key: None if tensor is None else tensor.detach() for key, tensor in arguments.items()}
        leaf = alone[name]
        assert leaf is not None
        leaf.requires_grad_()
        sums = linear_cross_entropy(**alone, settings=CASES[2].settings)  # type: ignore[arg-type]
        assert torch.equal(torch.autograd.grad(sums.loss * 0.7, leaf)[0], expected[index])


class Turns(Threads):
    """Ranks of which one runs at a time: the interpreter keeps the program's place in the grid for all threads."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.turn = threading.Lock()

    def meet(self, rank: int, *, largest: bool) -> Callable[[Tensor], Tensor]:
        together = super().meet(rank, largest=largest)

        def waiting(tensor: Tensor) -> Tensor:
            self.turn.release()
            try:
                return together(tensor)
            finally:
                self.turn.acquire()

        return waiting


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("soft_cap", [None, 3.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_ranks_that_share_the_vocabulary(
    smoothing: float, soft_cap: float | None, many: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "WORTH_WAITING", 0 if many else 1 << 35)
    dtype = torch.float32 if many else torch.bfloat16
    plan = CrossEntropy(label_smoothing=smoothing, z_loss=0.01, soft_cap=soft_cap, scale=0.5, chunk=4)
    case = CrossEntropyCase("", count=10, num_classes=40, settings=plan)
    arguments = case.tensors(dtype=dtype, device=device.type)
    want, (of_hidden, *of_head) = expected_of(case, arguments=arguments)
    bounds, turns = [0, 7, 40], Turns(2)

    def rank(index: int) -> tuple[LossSums, list[Tensor]]:
        part = slice(bounds[index], bounds[index + 1])
        own = {name: tensor if tensor is None else tensor.detach() for name, tensor in arguments.items()}
        for name in NAMES:
            tensor = own[name]
            assert tensor is not None
            own[name] = (tensor if name == "hidden" else tensor[part]).clone().requires_grad_()
        share = VocabularyShare(
            first=part.start,
            size=40,
            total=turns.meet(index, largest=False),
            maximum=turns.meet(index, largest=True),
        )
        with turns.turn:
            sums = linear_cross_entropy(**own, settings=plan, vocabulary=share)  # type: ignore[arg-type]
            return sums, gradients(sums.loss, own)

    with ThreadPoolExecutor(2) as pool:
        (first, of_first), (second, of_second) = pool.map(rank, range(2))
    tolerance = TOLERANCE[dtype]
    for mine, other, all_of_it in zip(first, second, want, strict=True):
        assert torch.equal(mine, other)
        torch.testing.assert_close(mine.double(), all_of_it, rtol=tolerance, atol=tolerance)
    assert relative_error(of_first[0].double() + of_second[0].double(), of_hidden) < tolerance
    for mine, other, all_of_it in zip(of_first[1:], of_second[1:], of_head, strict=True):
        assert relative_error(torch.cat([mine, other]), all_of_it) < tolerance


@pytest.mark.usefixtures("forced")
def test_is_part_of_a_graph(device: torch.device) -> None:
    arguments = CrossEntropyCase("", count=8, num_classes=50).tensors(dtype=torch.float32, device=device.type)
    hidden, weight, bias = (arguments[name] for name in NAMES)
    labels, weights = arguments["labels"], arguments["weights"]
    assert hidden is not None and weight is not None and bias is not None

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        plan = CrossEntropy(label_smoothing=0.1, chunk=3)
        found = linear_cross_entropy(
            tensors[0], weight=tensors[1], bias=tensors[2], labels=tensors[3], weights=tensors[4], settings=plan
        )
        return found.loss, found.nll, found.correct, found.weight

    check_graphs(function, hidden, weight, bias, labels, weights)
    for wanted in ([True, True, True], [False, True, False]):
        leaves = [t.detach().requires_grad_(want) for t, want in zip((hidden, weight, bias), wanted, strict=True)]
        check_op(linear_cross_entropy_op, *leaves, labels, weights, [0.1, 0.0, 1.0, 0.0], 0, wanted)


def test_logits_beyond_two_to_the_31(device: torch.device) -> None:
    from megaseq.kernels.cross_entropy import triton_kernels

    with untouched_memory():
        memory = torch.empty(40 << 26, dtype=torch.float16, device=device)
    logits = memory.as_strided((40, 50), (1 << 26, 1))
    values = torch.randn(40, 50, generator=torch.Generator().manual_seed(0)).to(device).half()
    logits.copy_(values)
    labels, weights = torch.arange(40, device=device), torch.ones(40, device=device)
    parts = torch.empty(4, 40, device=device)
    triton_kernels.launch_whole(
        logits, labels=labels, weights=weights, parts=parts, settings=CrossEntropy(), graded=True
    )
    leaf = values.double().requires_grad_()
    loss = torch.nn.functional.cross_entropy(leaf, labels, reduction="none")
    torch.testing.assert_close(parts[0].double(), loss.detach(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(logits.double(), torch.autograd.grad(loss.sum(), leaf)[0], rtol=1e-3, atol=1e-3)


# ---- how many tokens a chunk has -------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    count=st.integers(0, 200_000),
    num_classes=st.integers(1, 300_000),
    width=st.sampled_from([64, 512, 1024, 4096, 8192]),
    budget=st.sampled_from([128 << 20, BUDGET, 2 << 30]),
)
def test_a_chunk_is_no_slower_and_fits(count: int, num_classes: int, width: int, budget: int) -> None:
    chunk = tokens_of_chunk(count=count, num_classes=num_classes, width=width, item_size=2, budget=budget)
    needed = max(2 * width, 8 * TILE)
    assert chunk >= 1
    if chunk >= count:
        return
    assert chunk % TILE == 0 and chunk <= -(-max(needed, budget // (2 * num_classes)) // TILE) * TILE
    # Chunks are equal, but for the last one, so none is less than half of what is needed for speed.
    assert chunk * 2 > needed
    pieces = -(-count // chunk)
    assert count - (pieces - 1) * chunk > 0


def test_goal_of_32k_tokens_and_classes() -> None:
    """A quarter of the logits, no more, exists at one time where the plain way keeps them all several times."""
    chunk = tokens_of_chunk(count=32768, num_classes=32768, width=1024, item_size=2, budget=BUDGET)
    assert chunk == 8192
    assert tokens_of_chunk(count=4096, num_classes=32000, width=1024, item_size=2, budget=BUDGET) == 4096


@pytest.mark.parametrize("memory, budget", [(139 << 30, BUDGET), (24 << 30, 384 << 20), (4 << 30, BUDGET // 4)])
def test_a_large_card_gives_a_chunk_no_more_memory(memory: int, budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=memory))
    # The function itself, not what is kept of a card's answers.
    assert memory_budget.__wrapped__(torch.device("cuda", 0)) == budget


@pytest.mark.parametrize("beta", [0, 1])
def test_products_are_summed_in_the_dtype_of_the_sum(beta: int) -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(3, 5, generator=generator).bfloat16(), torch.randn(5, 4, generator=generator).bfloat16()
    for dtype in (torch.float32, torch.bfloat16):
        out = torch.randn(3, 4, generator=generator).to(dtype) if beta else torch.full((3, 4), torch.nan, dtype=dtype)
        expected = left.double() @ right.double() * 0.5 + (out.double() if beta else 0.0)
        add_product(out, left=left, right=right, alpha=0.5, beta=beta)
        assert out.dtype is dtype
        torch.testing.assert_close(out.double(), expected, rtol=2e-2, atol=2e-2)
