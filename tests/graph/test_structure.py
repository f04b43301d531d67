"""Nests of inputs and outputs: packing is undone by unpacking, and what does not fit is refused."""

import keras
import pytest

from kquant.graph.structure import is_plain, pack, paths, unpack

NESTED = {"z": 3, "deep": {"y": 2, "pair": (0, 1)}}


@pytest.mark.parametrize("structure", [0, [0, 1, 2], (0, 1), NESTED, {"b": 1, "a": 0}])
def test_unpack_inverts_pack(structure):
    count = len(keras.tree.flatten(structure))
    leaves = [f"leaf {k}" for k in range(count)]
    names = [f"name {k}" for k in range(count)]
    nest = pack(structure, leaves)
    keras.tree.assert_same_structure(nest, structure)
    assert unpack(structure, names, nest) == leaves
    assert unpack(structure, names, leaves) == leaves
    assert unpack(structure, names, dict(zip(names, leaves, strict=True))) == leaves


def test_without_a_structure_one_tensor_is_itself_and_several_are_a_list():
    assert pack(None, ["x"]) == "x" and pack(None, ["x", "y"]) == ["x", "y"]
    assert unpack(None, ["a"], "x") == ["x"]


def test_only_dicts_and_nests_are_not_plain():
    assert [is_plain(s) for s in (None, 0, [0, 1], (0, 1), {"a": 0}, [[0], 1], NESTED)] == [True] * 4 + [False] * 3


def test_a_nested_leaf_is_named_by_its_path():
    assert paths(NESTED, ["a", "b", "c", "d"]) == ["deep/pair/0", "deep/pair/1", "deep/y", "z"]
    assert paths([1, 0], ["a", "b"]) == ["a", "b"]


@pytest.mark.parametrize("nest", [{"a": 1}, [1], {"a": 1, "b": 2, "c": 3}, 1])
def test_what_does_not_fit_names_what_was_expected(nest):
    with pytest.raises(ValueError, match=r"\['a', 'b'\]"):
        unpack([0, 1], ["a", "b"], nest)
