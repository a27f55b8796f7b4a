"""Who set which value, where."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megaseq.base import params_from_yaml
from megaseq.base.source import display_path

from .zoo import Layer, LayerNorm, Task, task

HERE = display_path(__file__)
ZOO = HERE.replace("test_origins", "zoo")


def line_of(text: str, *, file: str = __file__) -> int:
    """Number of the first line that contains `text`."""
    return next(number for number, line in enumerate(Path(file).read_text().split("\n"), 1) if text in line)


def zoo_line(text: str) -> int:
    """The same in zoo.py."""
    return line_of(text, file=str(Path(__file__).with_name("zoo.py")))


def test_a_class_default_is_where_the_field_is_declared() -> None:
    p = task()
    assert p.origin("layer.dropout") == f"{ZOO}:{zoo_line('dropout: float')}"
    assert LayerNorm.Params().origin("eps") == f"{ZOO}:{zoo_line('eps = 1e-5')}"
    assert p.origin("num_layers") == f"{ZOO}:{zoo_line('num_layers = 4')}"
    assert p.origin("layer.norm.eps") == f"{ZOO}:{zoo_line('RMSNorm.Params(eps=1e-5)')}"
    assert p.origin("layer.norm") == f"{ZOO}:{zoo_line('RMSNorm.Params(eps=1e-5)')}"


def test_every_way_to_write_remembers_its_line() -> None:
    p = Task.Params(name="a")  # by constructor
    p.layer.dropout = 0.1  # by attribute
    p.set("encoder.layer.dropout", 0.2)  # by path
    p.layers["x"] = Layer.Params()  # by item
    q = p.replace(num_layers=9)  # by replace
    assert q.origin("name") == f"{HERE}:{line_of('# by constructor')}"
    assert q.origin("layer.dropout") == f"{HERE}:{line_of('# by attribute')}"
    assert q.origin("encoder.layer.dropout") == f"{HERE}:{line_of('# by path')}"
    assert q.origin("layers.x") == f"{HERE}:{line_of('# by item')}"
    assert q.origin("num_layers") == f"{HERE}:{line_of('# by replace')}"
    assert p.origin("num_layers") == f"{ZOO}:{zoo_line('num_layers = 4')}"


def test_yaml_and_command_line() -> None:
    p = task().apply_yaml("encoder:\n  layer:\n    dropout: 0.5\nlayers: {1: {}}", filename="configs/a.yaml")
    assert p.origin("encoder.layer.dropout") == "configs/a.yaml:3"
    assert p.origin("layers.1") == "configs/a.yaml:4"
    p.set_text("encoder.layer.dropout", "0.25")
    assert p.origin("encoder.layer.dropout") == "command line"
    assert [write.value for write in p.history("encoder.layer.dropout")] == ["0.0", "0.5", "0.25"]
    p.set_text("layers.2.norm.cls", f"{LayerNorm.__module__}.LayerNorm")
    assert p.origin("layers.2.norm.cls") == "command line"


def test_text_keeps_origins() -> None:
    p = task().set_text("num_layers", "3")
    q = Task.Params.from_text(p.to_text(origins=True))
    assert q.origin("num_layers") == "command line"
    assert q.origin("layer.dropout") == p.origin("layer.dropout")
    assert "num_layers: 3  # command line" in p.to_yaml(origins=True)
    assert params_from_yaml(p.to_yaml(), filename="r/params.yaml").origin("num_layers") == "r/params.yaml:2"


def test_no_absolute_path_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import megaseq.base

    assert display_path(megaseq.base.__file__) == "base/__init__.py"
    package = tmp_path / "mine" / "sub"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").touch()
    assert display_path(str(package / "x.py")) == "mine/sub/x.py"
    assert display_path(str(tmp_path / "y.py")) == "y.py"
    monkeypatch.chdir(tmp_path)
    assert display_path(str(tmp_path / "a" / "y.py")) == "a/y.py"
    assert display_path(os.path.join("a", "y.py")) == "a/y.py"
    assert display_path("<stdin>") == "<stdin>"
    assert str(tmp_path) not in task().to_text(origins=True)


def test_a_long_history_is_cut_and_still_ends_with_the_last_write() -> None:
    p = task()
    for number in range(50):
        p.num_layers = number
    assert p.history("num_layers")[-1].value == "49"
    assert len(p.history("num_layers")) <= 12
