"""NestedMap: access, paths, flattening and rebuilding."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megaseq.base import NestedMap

names = st.sampled_from(["a", "b", "ids", "z9", "_x"])
leaves = st.integers() | st.none() | st.tuples(st.integers(), st.integers())
trees = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3).map(NestedMap)
)
maps = st.dictionaries(names, trees, max_size=4).map(NestedMap)


def batch() -> NestedMap:
    """A map with all kinds of containers."""
    return NestedMap(target=NestedMap(ids=1), source=NestedMap(ids=2, more=[3, NestedMap(x=4), (5, 6)]), plain={"k": 7})


def test_attributes() -> None:
    m = batch()
    assert m.source.ids == 2
    m.source.ids = 9
    assert m["source"]["ids"] == 9
    del m.source.ids
    assert "ids" not in m.source
    with pytest.raises(AttributeError, match=r"^souce: no such key; did you mean source\? The keys are plain, "):
        _ = m.souce
    with pytest.raises(AttributeError, match=r"^qq: no such key; it has plain, source, target\.$"):
        del m.qq
    with pytest.raises(AttributeError, match="the map is empty"):
        _ = NestedMap().x
    assert not hasattr(m, "__torch_function__")


@pytest.mark.parametrize("key", ["items", "keys", "flatten", "pack", "1a", "a.b", "", "class", 3, "update", "copy"])
def test_forbidden_keys(key: Any) -> None:
    for action in (
        lambda: NestedMap().__setitem__(key, 1),
        lambda: NestedMap({key: 1}),
        lambda: NestedMap().update({key: 1}),
        lambda: NestedMap().setdefault(key, 1),
    ):
        with pytest.raises(ValueError, match="NestedMap: must"):
            action()


def test_dotted_get_and_set() -> None:
    m = batch()
    assert m.get("source.more[1].x") == 4
    assert m.get("source.more[7].x", "d") == "d"
    assert m.get("target.ids.x") is None
    assert m.get_item("source.more[2][1]") == 6
    assert m.has("source.ids") and not m.has("source.idz")
    m.set("source.more[3]", 8)
    m.set("new.list[0].x", 1)
    assert m.source.more[3] == 8 and m.new.list[0].x == 1
    with pytest.raises(IndexError, match="must have an index of at most 4, but is 6"):
        m.set("source.more[6]", 1)
    with pytest.raises(TypeError, match="must go through a map for x, but is int"):
        m.set("target.ids.x", 1)
    with pytest.raises(KeyError, match="did you mean ids"):
        m.get_item("source.idz")
    with pytest.raises(IndexError, match=r"below 3, but is 3"):
        m.get_item("source.more[3].x") if m.source.more.pop() else None
    for path in ("", ".a", "a..b", "[0]", "a[x]", "a[0]b"):
        with pytest.raises(KeyError):
            m.get_item(path)


def test_flatten_sorts_keys_and_leaves_tuples_and_dicts_whole() -> None:
    assert batch().flatten_items() == [
        ("plain", {"k": 7}),
        ("source.ids", 2),
        ("source.more[0]", 3),
        ("source.more[1].x", 4),
        ("source.more[2]", (5, 6)),
        ("target.ids", 1),
    ]
    assert batch().flatten() == [{"k": 7}, 2, 3, 4, (5, 6), 1]


@given(m=maps)
def test_pack_inverts_flatten(m: NestedMap) -> None:
    assert m.pack(m.flatten()) == m
    assert m.is_compatible(m.transform(str))
    assert [path for path, _ in m.flatten_items()] == [path for path, _ in m.transform(id).flatten_items()]
    assert m.transform_with_key(lambda path, leaf: path).flatten() == [path for path, _ in m.flatten_items()]
    assert list(m.deep_copy()) == list(m), "the order of keys is kept"
    assert NestedMap.from_nested_dict(m.to_nested_dict()) == m
    assert pickle.loads(pickle.dumps(m)) == m == copy.deepcopy(m)


@given(m=maps)
def test_filter_keeps_what_it_should_and_no_empty_container(m: NestedMap) -> None:
    kept = m.filter(lambda path, leaf: isinstance(leaf, int))
    assert kept.flatten() == [leaf for leaf in m.flatten() if isinstance(leaf, int)]

    def has_empty(node: Any) -> bool:
        inner = list(node.values()) if isinstance(node, NestedMap) else node if isinstance(node, list) else None
        return inner is not None and (not inner or any(map(has_empty, inner)))

    assert not kept or not has_empty(kept)


def test_pack_needs_as_many_values_as_leaves() -> None:
    with pytest.raises(ValueError, match="must get as many values as leaves, 2, but is 1"):
        NestedMap(a=1, b=2).pack([1])


def test_copies() -> None:
    m = batch()
    shallow, deep = m.copy(), m.deep_copy()
    assert isinstance(shallow, NestedMap) and shallow.source is m.source
    assert deep == m and deep.source is not m.source and deep.source.more is not m.source.more
    assert deep.plain is m.plain, "leaves are not copied"
    merged = m | {"x": 1}
    assert isinstance(merged, NestedMap) and merged.x == 1 and "x" not in m


def test_structures_differ() -> None:
    assert not NestedMap(a=1).is_compatible(NestedMap(b=1))
    assert not NestedMap(a=[1]).is_compatible(NestedMap(a=[1, 2]))
    assert not NestedMap(a=1).is_compatible({"a": 1})


def test_subclass_stays_itself_and_debug_string() -> None:
    class Batch(NestedMap):
        pass

    assert type(Batch(a=1).transform(str)) is Batch
    assert NestedMap(a=NestedMap(b=1), c="x").debug_string() == "a.b : 1\nc : 'x'"
