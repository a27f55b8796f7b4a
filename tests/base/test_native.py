"""The importer of the C++ extension: what it says when there is none, and that it never mixes versions."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest

from megaseq.base import native


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """Each test loads anew, and leaves nothing of what it loaded."""
    native._load.cache_clear()
    native._say_once.cache_clear()
    yield
    native._load.cache_clear()
    native._say_once.cache_clear()


def test_a_missing_extension_is_said_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "megaseq._csrc", None)
    monkeypatch.delenv("MEGASEQ_NATIVE", raising=False)
    with caplog.at_level(logging.WARNING, logger="megaseq"):
        assert native.extension() is None
        assert native.extension() is None
    assert len(caplog.records) == 1
    assert "the NumPy fallback is used. Install a C++20 compiler" in caplog.text
    assert not native.available()
    assert native.describe() == caplog.records[0].message


def test_an_extension_of_another_version_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    other = ModuleType("megaseq._csrc")
    other.interface_version = lambda: native.INTERFACE_VERSION + 1  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "megaseq._csrc", other)
    monkeypatch.delenv("MEGASEQ_NATIVE", raising=False)
    assert native.extension() is None
    assert f"has interface {native.INTERFACE_VERSION + 1}" in native.describe()


def test_the_switch_is_silent(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("MEGASEQ_NATIVE", "0")
    assert native.extension() is None
    assert not native.available()
    assert caplog.text == ""
    assert "switched off by MEGASEQ_NATIVE=0" in native.describe()


def test_a_built_extension_is_used() -> None:
    try:
        module = importlib.import_module("megaseq._csrc")
    except ImportError:
        pytest.skip("the C++ extension is not built")
    assert native.extension() is module
    assert native.available()
    assert "the C++ extension is used" in native.describe()
