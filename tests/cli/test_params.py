"""`megaseq params`: what a person sees."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megaseq.base import Configurable, Params, RegistryError, params_from_yaml, registry
from megaseq.cli.main import main


class Layer(Configurable):
    """A layer."""

    class Params(Configurable.Params):
        dim: int = 4
        """Width of it.

        Must be even.
        """
        dropout: float = 0.0


class Model(Configurable):
    """A model."""

    class Params(Configurable.Params):
        name: str = "test.Base"
        num_layers: int = 2
        """Layers."""
        layer: Layer.Params = Layer.Params()
        layers: dict[str, Layer.Params] = {}
        data_dir: str = ""

        def default_item(self, field: str, key: str) -> Params | None:
            return self.layer


class Base:
    """The base.

    More about it.
    """

    def params(self) -> Model.Params:
        """A model."""
        return Model.Params(num_layers=6)


class Wide(Base):
    """A wide one."""

    def params(self) -> Model.Params:
        """Wider."""
        p = super().params().replace(name="test.Wide")
        p.layer.dim = 8
        return p


@pytest.fixture(autouse=True)
def _experiments(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"test.Base": Base, "test.Wide": Wide}

    def get(name: str) -> type:
        if name not in known:
            raise RegistryError(f"{name}: no such experiment; did you mean test.Base?")
        return known[name]

    monkeypatch.setattr(registry, "get", get)
    monkeypatch.setattr(registry, "names", lambda: sorted(known))


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[str]]:
    """Exit code and lines of `megaseq params ...`; those of stderr after a mistake."""
    code = main(["params", *arguments])
    output = capsys.readouterr()
    assert not (output.out and output.err)
    return code, (output.out + output.err).splitlines()


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "list") == (0, ["test.Base  The base.", "test.Wide  A wide one."])


def test_show(capsys: pytest.CaptureFixture[str]) -> None:
    code, lines = run(capsys, "show", "test.Wide", "num_layers=9", "layers.3.dropout=0.5")
    assert code == 0
    assert "num_layers : 9" in lines and "layer.dim : 8" in lines and "layers.3.dim : 8" in lines
    _, lines = run(capsys, "show", "test.Wide", "num_layers=9", "--origins")
    assert "num_layers : 9  # command line" in lines
    assert any(line.startswith("layer.dim : 8  # ") and "test_params.py:" in line for line in lines)


def test_show_yaml_reads_back(capsys: pytest.CaptureFixture[str]) -> None:
    _, lines = run(capsys, "show", "test.Wide", "--yaml")
    assert params_from_yaml("\n".join(lines)) == Wide().params()


def test_show_changed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    cls = f"cls: {Model.__module__}.Model"
    _, lines = run(capsys, "show", "test.Wide", "--changed", "layers.3.dropout=0.5")
    assert lines == ["# What differs from the experiment test.Wide.", cls, "layers:", "  3:", "    dropout: 0.5"]
    _, lines = run(capsys, "show", "test.Base", "--changed")
    assert lines == ["# What differs from the defaults of Model.", cls, "num_layers: 6"]
    overlay = tmp_path / "a.yaml"
    overlay.write_text("\n".join(lines).replace("6", "7"))
    _, lines = run(capsys, "show", "test.Wide", "-c", str(overlay), "layer.dim=2")
    assert "num_layers : 7" in lines and "layer.dim : 2" in lines


def test_show_deepspeed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, lines = run(capsys, "show", "test.Wide", "--deepspeed")
    assert code == 2 and "must be asked of a run or an experiment, but is 'Model'" in lines[0]
    monkeypatch.undo()
    overrides = ("parallel.zero.stage=3", "parallel.zero.offload_optimizer=cpu", "parallel.zero.bucket_elements=1001")
    code, lines = run(capsys, "show", "mt.multi30k.Base", "--deepspeed", *overrides)
    assert code == 0
    zero = json.loads("\n".join(lines))["zero_optimization"]
    assert zero["stage"] == 3 and zero["reduce_bucket_size"] == 1001
    assert zero["offload_optimizer"]["device"] == "cpu" and "offload_param" not in zero
    code, lines = run(capsys, "show", "mt.multi30k.Base", "--deepspeed")
    assert code == 2 and len(lines) == 1 and "parallel.zero.stage: must be 1, 2 or 3" in lines[0]


def test_diff_of_experiments_files_and_run_directories(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    expected = ['name : "test.Base" -> "test.Wide"', "layer.dim : 4 -> 8"]
    assert run(capsys, "diff", "test.Base", "test.Wide") == (0, expected)
    assert run(capsys, "diff", "test.Base", "test.Base") == (0, [])
    wide = Wide().params()
    (tmp_path / "params.yaml").write_text(wide.to_yaml())
    assert run(capsys, "diff", "test.Base", str(tmp_path)) == (0, expected)
    (tmp_path / "params.txt").write_text(wide.to_text(origins=True))
    for name in (tmp_path, tmp_path / "params.txt", tmp_path / "params.yaml"):
        assert run(capsys, "diff", str(name), "test.Wide") == (0, [])


def test_explain(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, lines = run(capsys, "explain", "test.Wide", "layer.dim", "layer.dim=12")
    assert code == 0
    assert lines[:4] == [
        "layer.dim : 12",
        "  type     int",
        "  of       Layer",
        "  meaning  Width of it. Must be even.",
    ]
    assert lines[4] == "  set by   command line"
    assert [line.split("#")[0].strip() for line in lines[5:]] == ["before   8", "before   4"]
    (tmp_path / "params.txt").write_text(Wide().params().set_text("num_layers", "3").to_text(origins=True))
    _, lines = run(capsys, "explain", str(tmp_path), "num_layers")
    assert "  set by   command line" in lines
    _, lines = run(capsys, "explain", "test.Wide", "layer")
    assert "    dim : 8  # Width of it." in lines
    _, lines = run(capsys, "explain", "test.Wide", "layer.cls")
    assert lines[0] == "layer.cls : Layer"


def test_check(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(capsys, "check") == (0, ["test.Base: ok", "test.Wide: ok"])
    broken = tmp_path / "broken.yaml"
    broken.write_text(f"cls: {Model.__module__}.Model\nnum_layer: 3\nlayer: {{dim: x}}\n")
    monkeypatch.chdir(tmp_path)
    assert run(capsys, "check", "test.Base", "broken.yaml") == (
        1,
        [
            "test.Base: ok",
            "broken.yaml: 2 to mend",
            "  broken.yaml:2: num_layer: Model has no such param; did you mean num_layers?",
            "  broken.yaml:3: layer.dim: must be an int, but is 'x' (str).",
        ],
    )
    broken.write_text(f"cls: {Model.__module__}.Model\nnum_layers: REQUIRED\n")
    code, lines = run(capsys, "check", "broken.yaml")
    assert (code, lines[1]) == (1, "  num_layers: must be set, but is REQUIRED. It is: layers.")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["show", "test.Bas"], "test.Bas: no such experiment; did you mean test.Base?"),
        (["show", "test.Base", "layer.dmi=3"], "layer.dmi: Layer has no such param; did you mean dim?"),
        (["show", "test.Base", "-c", "no.yaml"], "no.yaml"),
        (["explain", "test.Base", "layer.dmi"], "layer.dmi: Layer has no such param; did you mean dim?"),
        (["diff", "test.Base", "empty"], "empty: must be a run directory, with params.yaml in it, but is without."),
        (["diff", "test.Base", "x.json"], "x.json: must end in .txt or .yaml, but is .json."),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: list[str],
    expected: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.json").touch()
    monkeypatch.chdir(tmp_path)
    code, lines = run(capsys, *arguments)
    assert code == 2 and len(lines) == 1 and expected in lines[0]


def test_the_data_directory_is_kept_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A checkpoint that has it is read from elsewhere."""
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    code, lines = run(capsys, "show", "test.Base", "--data-dir", "data")
    assert code == 0 and f'data_dir : "{tmp_path / "data"}"' in lines
