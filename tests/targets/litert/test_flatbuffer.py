"""The builder and the reader of flatbuffers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema
from hypothesis import given, settings
from hypothesis import strategies as st

from kquant.errors import ExportError
from kquant.targets.litert.arithmetic import unpack
from kquant.targets.litert.flatbuffer import FileGrid, FlatbufferBuilder, only_integer_ops, pack, read_tensors, summary
from tests.support.litert_files import run


def small_file(scale: float = 0.5, description: str = "") -> bytes:
    """int8 x + constant, with a resizable batch."""
    b = FlatbufferBuilder()
    g = FileGrid(np.float32(scale), 3)
    x, y = b.tensor("x", (None, 4), "INT8", g), b.tensor("y", (None, 4), "INT8", g)
    c = b.constant("c", np.arange(4), "INT8", g)
    b.operator("ADD", [x, c], [y], 2, "AddOptions", {"fusedActivationFunction": 0})
    return b.finish({"image": x}, {"scores": y}, description)


@settings(max_examples=50, deadline=None)
@given(st.sampled_from([2, 4]), st.lists(st.integers(0, 15), min_size=1, max_size=40))
def test_packing_is_undone_by_unpacking(bits: int, values: list[int]) -> None:
    ints = np.array(values) % (1 << bits) - (1 << (bits - 1))
    packed = pack(ints, bits)
    assert len(packed) == (len(values) * bits + 7) // 8
    np.testing.assert_array_equal(unpack(packed, bits, len(values)), ints)


def test_low_nibble_comes_first() -> None:
    np.testing.assert_array_equal(pack(np.array([1, -2, 3]), 4), [0xE1, 0x03])
    np.testing.assert_array_equal(pack(np.array([1, -2, -1, 0, 1]), 2), [0b00111001, 0b01])


def test_a_built_file_runs_on_any_batch() -> None:
    for batch in (1, 3):
        x = np.arange(4 * batch, dtype=np.int8).reshape(batch, 4)
        # (x - 3) + (c - 3) + 3 on one grid
        np.testing.assert_array_equal(run(small_file(), [x])["y"], x + np.arange(4) - 3)


def test_equal_constants_share_a_buffer_and_the_first_is_empty() -> None:
    b = FlatbufferBuilder()
    first, second = b.constant("a", np.arange(4), "INT32"), b.constant("b", np.arange(4), "INT32")
    third = b.constant("c", np.arange(5), "INT32")
    model = schema.ModelT.InitFromPackedBuf(b.finish({}, {"c": third}), 0)
    tensors = model.subgraphs[0].tensors
    assert tensors[first].buffer == tensors[second].buffer != tensors[third].buffer
    assert len(model.buffers) == 3 and model.buffers[0].data is None


def test_data_is_aligned_to_16_bytes() -> None:
    b = FlatbufferBuilder()
    arrays = [np.arange(k, dtype=np.int64) + 1000 * k for k in range(1, 8)]
    for k, a in enumerate(arrays):
        b.constant(f"c{k}", a, "INT64")
    content = b.finish({}, {"c0": 0})
    for a in arrays:
        assert content.index(a.tobytes()) % 16 == 0


@pytest.mark.parametrize(("builtin", "old"), [("ADD", 0), ("GELU", 127)])
def test_operator_codes_fill_both_fields(builtin: str, old: int) -> None:
    b = FlatbufferBuilder()
    x, y = b.tensor("x", (1,), "FLOAT32"), b.tensor("y", (1,), "FLOAT32")
    b.operator(builtin, [x, x], [y], 2)
    b.operator(builtin, [x, x], [y], 2)
    (code,) = schema.ModelT.InitFromPackedBuf(b.finish({"x": x}, {"y": y}), 0).operatorCodes
    assert code.deprecatedBuiltinCode == old and code.version == 2
    assert code.builtinCode == getattr(schema.BuiltinOperator, builtin)


def test_file_holds_signature_description_and_no_ranges() -> None:
    model = schema.ModelT.InitFromPackedBuf(small_file(description="hello"), 0)
    (signature,) = model.signatureDefs
    assert (signature.signatureKey, model.description) == (b"serving_default", b"hello")
    assert [(m.name, m.tensorIndex) for m in signature.inputs] == [(b"image", 0)]
    assert [(m.name, m.tensorIndex) for m in signature.outputs] == [(b"scores", 1)]
    q = model.subgraphs[0].tensors[0].quantization
    assert q.min is None and q.max is None
    np.testing.assert_array_equal(model.subgraphs[0].tensors[0].shapeSignature, [-1, 4])


def test_names_are_unique() -> None:
    b = FlatbufferBuilder()
    indices = [b.tensor("t", (1,), "INT8") for _ in range(3)]
    assert [b.name(i) for i in indices] == ["t", "t_1", "t_2"]


def test_unknown_option_fields_are_an_error() -> None:
    b = FlatbufferBuilder()
    x = b.tensor("x", (1,), "FLOAT32")
    with pytest.raises(AssertionError, match="keep_dims"):
        b.operator("MEAN", [x], [x], 1, "ReducerOptions", {"keep_dims": True})


def test_summary(tmp_path: Path) -> None:
    content = small_file()
    path = tmp_path / "small.tflite"
    path.write_bytes(content)
    for source in (content, path, str(path)):
        found = summary(source)
        assert found.op_counts == {"ADD": 1} and found.activation_types == {"INT8": 2}
        assert found.constant_bytes == {"INT8": 4} and found.total_bytes == len(content)
        assert found.inputs == {"x": ("INT8", (1, 4))} and found.outputs == {"y": ("INT8", (1, 4))}


def test_read_tensors_gives_grids_and_constants() -> None:
    tensors = read_tensors(small_file(scale=0.25))
    np.testing.assert_array_equal(tensors["c"].data, np.arange(4))
    assert tensors["y"].data is None and tensors["y"].s == np.float32(0.25) and tensors["y"].z == 3


@pytest.mark.parametrize("inside", [False, True])
def test_only_integer_ops_allows_conversions_at_the_ends(inside: bool) -> None:
    b, g = FlatbufferBuilder(), FileGrid(np.float32(0.5), 0)
    x, q = b.tensor("x", (1, 4), "FLOAT32"), b.tensor("q", (1, 4), "INT8", g)
    y = b.tensor("y", (1, 4), "FLOAT32")
    b.operator("QUANTIZE", [x], [q])
    b.operator("DEQUANTIZE", [q], [y], 2)
    outputs = {"y": y}
    if inside:
        outputs = {"z": b.tensor("z", (1, 4), "FLOAT32")}
        b.operator("RELU", [y], [outputs["z"]])
    assert only_integer_ops(b.finish({"x": x}, outputs)) is not inside


@pytest.mark.parametrize("kept", [0, 4, 7, 8, 40, 0.3, 0.6, 0.9])
def test_truncated_files_are_refused(kept: float) -> None:
    content = small_file()
    size = kept if isinstance(kept, int) else int(kept * len(content))
    with pytest.raises(ExportError):
        summary(content[:size])


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="TFL3"):
        summary(b"PK\x03\x04" + bytes(100))
    with pytest.raises(ExportError, match="no file"):
        summary(tmp_path / "absent.tflite")
    with pytest.raises(ExportError):
        summary(b"\xff\xff\xff\x7fTFL3" + bytes(100))
