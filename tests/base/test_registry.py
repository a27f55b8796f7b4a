"""Experiments by name, built in and of other packages."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from megaseq.base import RegistryError, register, registry
from megaseq.base.swap import class_at


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_experiments", dict(registry._experiments))
    monkeypatch.setattr(registry, "_loaded", set(registry._loaded))


def experiment(name: str, *, module: str) -> type[Any]:
    """An experiment class as if it were written in `module`."""
    return type(name, (), {"__module__": module, "params": lambda self: None})


@pytest.mark.parametrize(
    ("module", "key"),
    [
        ("megaseq.experiments.mt.multi30k", "mt.multi30k.X"),
        ("megaseq.experiments.quickstart", "quickstart.X"),
        ("mine.experiments.asr.tiny", "asr.tiny.X"),
        ("mine.experiments", "X"),
        ("__main__", "main.X"),
    ],
)
def test_names_come_from_module_and_class(module: str, key: str) -> None:
    register(experiment("X", module=module))
    assert registry.get(key).__name__ == "X"


def test_one_name_one_class() -> None:
    register(experiment("X", module="a.experiments.b"))
    register(experiment("X", module="a.experiments.b"))  # the same module again, as after a reload
    with pytest.raises(RegistryError, match=r"^b.X: must be registered once, but is registered by a.* and by c\.exp"):
        register(experiment("X", module="c.experiments.b"))
    with pytest.raises(RegistryError, match=r"^b.Y: must have a method params\(\)"):
        register(type("Y", (), {"__module__": "a.experiments.b"}))


def test_an_unknown_name_gets_a_suggestion() -> None:
    register(experiment("Numbers", module="megaseq.experiments.quick"))
    with pytest.raises(RegistryError, match=r"^quick.Number: no such experiment; did you mean .*quick.Numbers"):
        registry.get("quick.Number")
    for odd in ("", ".", "a..b", "../x", "quickstart"):
        with pytest.raises(RegistryError):
            registry.get(odd)


def test_a_package_of_another_author(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "megaseq_guest" / "experiments"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").touch()
    (folder / "__init__.py").touch()
    (folder / "tiny.py").write_text(
        "from megaseq.base import register\n@register\nclass T:\n    'Tiny.'\n    def params(self): return 3\n"
    )
    (folder.parent / "norm.py").write_text("from megaseq.base import Configurable\nclass MyNorm(Configurable): pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    point = EntryPoint(name="guest", value="megaseq_guest.experiments", group="megaseq.experiments")
    assert registry.packages() == {"megaseq"}
    monkeypatch.setattr(registry, "entry_points", lambda group: [point])
    assert registry.params("tiny.T") == 3
    assert "tiny.T" in registry.names()
    assert "megaseq_guest.norm" not in sys.modules
    assert class_at("megaseq_guest.norm.MyNorm", path="x").__name__ == "MyNorm", "its classes may be named in YAML"


def test_a_module_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nearby_lab.py").write_text(
        "from megaseq.base import register\n\n@register\nclass Mine:\n    def params(self): return 7\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != ""])
    monkeypatch.setenv("MEGASEQ_EXPERIMENTS", " nearby_lab, ")
    assert registry.params("nearby_lab.Mine") == 7
    assert "nearby_lab" in registry.packages()
    monkeypatch.setenv("MEGASEQ_EXPERIMENTS", "nowhere_lab")
    message = r"^MEGASEQ_EXPERIMENTS: must name modules that Python finds, but is 'nowhere_lab'"
    with pytest.raises(RegistryError, match=message):
        registry.get("nowhere_lab.Mine")
