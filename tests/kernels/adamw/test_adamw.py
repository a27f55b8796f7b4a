"""AdamW's definition against torch's optimizers; its kernel against the definition; apex; what is refused."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megaseq.kernels import dispatch, triton_runtime
from megaseq.kernels.adamw import AdamWSettings, Segments, adamw_, apex, choose_adamw
from megaseq.kernels.adamw.cases import CASES, AdamWCase
from megaseq.kernels.adamw.configs import configs
from megaseq.kernels.adamw.op import triton_adamw_
from megaseq.kernels.checks import KernelError
from tests.kernels.interpreter.poison import untouched_memory

CPU = torch.device("cpu")
Use = Callable[[str], None]


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Use:
    """Makes an implementation the one that runs."""
    return lambda name: monkeypatch.setenv(dispatch.VARIABLE, f"adamw={name}")


def run(case: AdamWCase, *, device: torch.device, step: float = 7.0) -> list[Tensor]:
    """Makes one update; returns parameters, moments and copy."""
    parameters, gradients, moments = case.tensors(device=device)
    scalars = [None if number is None else torch.tensor(number, device=device) for number in (case.divisor, case.skip)]
    copy = None if case.copy is None else torch.full((case.count,), -5.0, device=device).to(case.copy)
    before = gradients.clone()
    adamw_(
        parameters,
        gradients=gradients,
        moments=moments,
        settings=case.settings(device=device),
        step=torch.tensor(step, device=device),
        divisor=scalars[0],
        skip=scalars[1],
        copy=copy,
    )
    assert torch.equal(gradients, before)
    return [parameters, *moments, *([] if copy is None else [copy])]


def ulps(found: Tensor, expected: Tensor) -> int:
    """The largest difference of two fp32 tensors, in numbers that lie between."""
    if not found.numel():
        return 0
    return int((found.view(torch.int32).long() - expected.view(torch.int32).long()).abs().max())


@pytest.mark.parametrize("step", [1.0, 7.0, 10000.0])
@pytest.mark.parametrize("beta1", [0.9, 0.3, 0.0])
@pytest.mark.parametrize("divisor", [None, 3.7])
def test_the_reference_has_the_bits_of_torchs_fused_kernel(step: float, beta1: float, divisor: float | None) -> None:
    # Where the processor's vectors end, torch's own kernel rounds differently.
    case = AdamWCase("torch", count=4096, beta1=beta1, divisor=divisor)
    parameters, gradients, moments = case.tensors(device=CPU)
    torch._fused_adamw_(
        [parameters],
        [gradients],
        [moments[0]],
        [moments[1]],
        [],
        [torch.tensor(step)],
        lr=1e-3,
        beta1=beta1,
        beta2=0.98,
        weight_decay=0.1,
        eps=1e-9,
        amsgrad=False,
        maximize=False,
        grad_scale=None if divisor is None else torch.tensor(divisor),
    )
    found = run(case, device=CPU, step=step)
    assert [ulps(*pair) for pair in zip(found, (parameters, *moments), strict=True)] == [0, 0, 0]


def test_many_updates_are_those_of_torchs_optimizer() -> None:
    case = AdamWCase("many")
    parameters, _, _ = case.tensors(device=CPU)
    m, v = torch.zeros(case.count), torch.zeros(case.count)
    other = torch.nn.Parameter(parameters.clone().double())
    optimizer = torch.optim.AdamW([other], lr=1e-3, betas=(0.9, 0.98), eps=1e-9, weight_decay=0.1, foreach=False)
    for step in range(1, 21):
        gradient = torch.randn(case.count, generator=torch.Generator().manual_seed(step))
        adamw_(
            parameters,
            gradients=gradient,
            moments=(m, v),
            settings=case.settings(device=CPU),
            step=torch.tensor(float(step)),
        )
        other.grad = gradient.double()
        optimizer.step()
    torch.testing.assert_close(parameters, other.detach().float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_kernel_has_the_references_bits(case: AdamWCase, device: torch.device, use: Use) -> None:
    use("triton")
    found = run(case, device=device)
    use("reference")
    # In host memory, whose rounding the reference defines: torch's CUDA kernels associate and fuse otherwise.
    expected = run(case, device=CPU)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.cpu(), other), case.name


@pytest.mark.parametrize("implementation", ["triton", "reference"])
def test_a_skipped_update_leaves_everything(implementation: str, device: torch.device, use: Use) -> None:
    use(implementation)
    case = AdamWCase("skipped", skip=1.0, copy=torch.bfloat16)
    parameters, _, moments = case.tensors(device=device)
    found = run(case, device=device)
    for one, other in zip(found, (parameters, *moments), strict=False):
        assert torch.equal(one, other)
    assert bool((found[3] == -5).all())


def test_not_finite_gradients_behind_a_skip_are_not_read_into_anything(device: torch.device, use: Use) -> None:
    use("triton")
    p, m, v = (torch.ones(5, device=device) for _ in range(3))
    gradients = torch.tensor([1.0, torch.nan, torch.inf, 0.0, 1.0], device=device)
    skip = ~torch.isfinite(gradients).all()
    adamw_(
        p,
        gradients=gradients,
        moments=(m, v),
        settings=AdamWSettings(0.1),
        step=torch.ones((), device=device),
        skip=skip,
    )
    assert all(bool((tensor == 1).all()) for tensor in (p, m, v))


def test_every_tile_gives_the_same(device: torch.device, use: Use) -> None:
    case = next(case for case in CASES if case.name == "segments")
    use("reference")
    expected = run(case, device=CPU)
    use("triton")
    for tile in configs():
        with triton_runtime.override(adamw=tile):
            found = [tensor.cpu() for tensor in run(case, device=device)]
            assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.slow
def test_more_than_two_to_the_31_elements(device: torch.device) -> None:
    """The last block alone, of tensors that are only reserved: launched where the grid would have come to it."""
    if device.type == "cpu":
        pytest.skip("the interpreter would go through two million blocks")
    count = 2**31 + 5
    with untouched_memory():
        p, g, m, v = (torch.zeros(count, device=device) for _ in range(4))
    g[-5:] = 1.0
    adamw_(p, gradients=g, moments=(m, v), settings=AdamWSettings(0.5), step=torch.ones((), device=device))
    assert bool((p[-5:] < -0.4).all()) and not bool(p[:-5].any())


def test_what_torch_asks_of_an_op(device: torch.device) -> None:
    p, g, moments = AdamWCase("op", count=40).tensors(device=device)
    copy = torch.zeros(40, dtype=torch.bfloat16, device=device)
    one = torch.ones((), device=device)
    ends, decays = torch.tensor([7, 40], device=device), torch.tensor([0.0, 0.1], device=device)
    numbers = (1e-3, 0.9, 0.98, 1e-9, 0.1)
    torch.library.opcheck(triton_adamw_, (p, g, *moments, copy, one, one, one * 0, ends, decays, *numbers))
    torch.library.opcheck(triton_adamw_, (p, g, *moments, None, one, None, None, None, None, *numbers))


@pytest.mark.parametrize("implementation", ["triton", "reference"])
def test_compilation(implementation: str, device: torch.device, use: Use) -> None:
    use(implementation)
    case = AdamWCase("compiled", count=100)

    def update(p: Tensor, g: Tensor, m: Tensor, v: Tensor, step: Tensor) -> Tensor:
        adamw_(p, gradients=g, moments=(m, v), settings=AdamWSettings(1e-3), step=step)
        return p * 2

    results = []
    for call in (update, torch.compile(update, fullgraph=True, backend="aot_eager")):
        p, g, moments = case.tensors(device=device)
        doubled = call(p, g, *moments, torch.ones((), device=device))
        results.append((doubled, p, *moments))
    for one, other in zip(*results, strict=True):
        if implementation == "triton":
            assert torch.equal(one, other)
        else:
            # Traced, a fused product and sum become two operations.
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


# ---- who updates what ------------------------------------------------------------------------------------------


def test_host_memory_is_torchs() -> None:
    assert choose_adamw(torch.zeros(3), flat=True) == "torch"


def _extension(**functions: Any) -> types.ModuleType:
    module = types.ModuleType(apex.EXTENSION)
    module.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
    module.__dict__.update(functions)
    return module


@pytest.fixture
def extension(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Makes a module of these functions what `import amp_C` gives."""

    def put(**functions: Any) -> None:
        apex.missing.cache_clear()
        monkeypatch.setitem(sys.modules, apex.EXTENSION, _extension(**functions))

    yield put
    apex.missing.cache_clear()


def test_a_package_called_apex_is_not_taken_for_nvidias(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    apex.missing.cache_clear()
    assert apex.missing() == "NVIDIA apex is not installed with its extension amp_C"


def test_an_extension_that_cannot_be_imported_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / f"{apex.EXTENSION}.py").write_text("raise ImportError('undefined symbol')")
    monkeypatch.syspath_prepend(tmp_path)
    apex.missing.cache_clear()
    assert "amp_C cannot be imported; build it anew" in (apex.missing() or "")
    apex.missing.cache_clear()


def test_the_extension_must_have_the_function(extension: Callable[..., None]) -> None:
    extension(multi_tensor_scale=None)
    assert apex.missing() == "amp_C has no multi_tensor_adam_capturable; build a newer NVIDIA apex"
    extension(multi_tensor_adam_capturable=None)
    assert apex.missing() is None


def test_apex_gets_what_its_function_takes(extension: Callable[..., None]) -> None:
    def update(chunk, noop, lists, lr, beta1, beta2, epsilon, step, mode, correct, decay, inverse) -> None:  # type: ignore[no-untyped-def]
        """The documented meaning of the arguments, by torch."""
        assert chunk == 65536 and mode == 1 and correct == 1 and noop.dtype is torch.int32 and step.dtype is torch.int32
        if int(noop):
            return
        gradients, parameters, first, second = lists
        torch._fused_adamw_(
            parameters,
            gradients,
            first,
            second,
            [],
            [step[0].float()] * len(parameters),
            lr=float(lr),
            beta1=beta1,
            beta2=beta2,
            weight_decay=decay,
            eps=epsilon,
            amsgrad=False,
            maximize=False,
            grad_scale=1 / inverse[0],
        )

    extension(multi_tensor_adam_capturable=update)
    case = AdamWCase("apex", divisor=4.0, count=4096)
    expected = run(case, device=CPU)
    for skip in (None, torch.zeros(()), torch.ones(())):
        parameters, gradients, moments = case.tensors(device=CPU)
        before = parameters.clone()
        apex.apex_adamw_(
            [parameters],
            gradients=[gradients],
            moments=([moments[0]], [moments[1]]),
            settings=case.settings(device=CPU),
            step=torch.tensor(7.0),
            divisor=torch.tensor(4.0),
            skip=skip,
        )
        skipped = skip is not None and bool(skip)
        torch.testing.assert_close(parameters, before if skipped else expected[0], rtol=1e-6, atol=1e-6)


P, LONG = torch.zeros(4), torch.tensor([4])
SETTINGS, STEP = AdamWSettings(0.1), torch.ones(())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gradients": torch.zeros(5)}, r"gradients must have shape \[n\] = \[4\], but is \[5\]"),
        ({"gradients": torch.zeros(4).double()}, "gradients must be float32 or bfloat16 or float16"),
        ({"gradients": torch.zeros(8)[::2]}, "gradients must be contiguous, but is of stride 2"),
        ({"moments": (P, P.bfloat16())}, r"moments\[1\] must be float32"),
        ({"copy": torch.zeros(4)}, "copy must be bfloat16 or float16"),
        ({"step": torch.ones(2)}, "step must be one number"),
        ({"step": torch.ones((), dtype=torch.int64)}, "step must be float32, but is torch.int64"),
        ({"divisor": torch.ones((), dtype=torch.float64)}, "divisor must be float32, but is torch.float64"),
        ({"settings": AdamWSettings(0.1, weight_decay=Segments(LONG, torch.zeros(2)))}, "weight_decay must have shape"),
        ({"settings": AdamWSettings(0.1, weight_decay=Segments(LONG.int(), torch.zeros(1)))}, "must be int64 ends"),
    ],
)
def test_refusals(arguments: dict[str, Any], message: str) -> None:
    given = {"gradients": P, "moments": (P, P), "settings": SETTINGS, "step": STEP, **arguments}
    with pytest.raises(KernelError, match=message):
        adamw_(P, **given)


def test_the_explicit_request_that_cannot_run_is_an_error(use: Use, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    for name, message in (("apex", "it runs on a GPU"), ("triton", "its kernels run on a GPU")):
        use(name)
        with pytest.raises(KernelError, match=message):
            choose_adamw(torch.zeros(3), flat=True)
    use("reference")
    with pytest.raises(KernelError, match="it takes float32 parameters"):
        choose_adamw(torch.zeros(3).double(), flat=True)
