"""`export_tflite` on the toy model: what comes back, what is written, what is refused."""

import keras
import numpy as np
import pytest

import kquant
from kquant.config.quant_config import QuantConfig
from kquant.errors import ExportError, ModelError
from kquant.keras.export import export_tflite
from kquant.keras.model import extract, insert
from kquant.quantize.pipeline import record_of
from kquant.quantize.plan import make_plan
from kquant.targets.litert.flatbuffer import only_integer_ops, read_tensors, summary
from kquant.targets.litert.runtime import TFLiteModel
from tests.support.toy import config, toy_data, toy_graph, toy_qgraph


def build(name="w8a8", **changes):
    plan = make_plan(toy_graph(), config(name, **changes))
    return insert(toy_qgraph(name, **changes), record_of(plan, QuantConfig(target=plan.target.name), 0, []))


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture(scope="module")
def mixed():
    return build(rules=[{"name": "^dw$", "float": True}])


def test_the_report_describes_the_file(model, tmp_path):
    path = tmp_path / "toy.tflite"
    report = export_tflite(model, path)
    assert path.read_bytes() == report.content
    assert report.bytes == len(report.content) and report.path == str(path)
    assert dict(report.op_counts) == summary(report.content).op_counts
    assert report.float_ops == () and only_integer_ops(report.content)
    assert {r.node for r in report.rows} == {"c1", "dw", "add", "dw/requantize", "cat", "pool", "mean", "fc", "sm"}
    row = next(r for r in report.rows if r.node == "c1")
    assert (row.weights, row.operators) == ("INT8", ("CONV_2D",))
    assert row.bytes >= 3 * 3 * 3 * 8 + 4 * 8
    text = str(report)
    assert f"{report.bytes:,} bytes" in text and "CONV_2D" in text and "every operation is an integer operation" in text
    assert "content" not in repr(report)  # not the bytes


def test_without_a_path_nothing_is_written(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report = export_tflite(model)
    assert report.path is None and not list(tmp_path.iterdir())
    assert str(report).startswith("TFLite model: ")


def test_float_operations_have_reasons_or_are_refused(mixed):
    report = export_tflite(mixed)
    assert [n for n, _ in report.float_ops] == ["dw"]
    assert "dw" in report.float_ops[0][1] and report.float_ops[0][1] in str(report)
    with pytest.raises(ExportError, match=r"(?s)allow_float=False.*dw"):
        export_tflite(mixed, allow_float=False)


def test_what_returns_integers_of_floats_computes_in_float():
    """TensorFlow Lite Micro has no argmax of 16 bits; LiteRT takes it in 32."""
    inputs = keras.Input((6,))
    model = keras.Model(inputs, keras.ops.argmax(keras.layers.Dense(5, name="logits")(inputs), -1))
    data = np.random.default_rng(0).normal(size=(16, 6)).astype(np.float32)
    micro, lite = (
        kquant.quantize_model(model, data, {"preset": "w8a16", "target": t}, progress=False) for t in ("tflm", "litert")
    )
    with pytest.raises(ExportError, match="(?s)allow_float=False.*argmax"):
        export_tflite(micro, allow_float=False)
    content = export_tflite(lite, allow_float=False).content
    assert only_integer_ops(content)
    assert kquant.verify_tflite(lite, content, data).ok


def test_a_refused_file_is_not_written(mixed, tmp_path):
    with pytest.raises(ExportError):
        export_tflite(mixed, tmp_path / "m.tflite", allow_float=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mode", ["dynamic_range", "weight_only", "float16", "float32"])
def test_modes_with_float_activations_follow_the_float_graph(model, mode):
    content = export_tflite(model, mode=mode, allow_float=False).content  # floats are what these modes are for
    x = toy_data(16, seed=4)
    exact = TFLiteModel(export_tflite(model, mode="float32").content).predict(x)[0]
    found = TFLiteModel(content).predict(x)[0]
    tolerance = {"float32": 1e-5, "float16": 2e-3, "weight_only": 0.02, "dynamic_range": 0.03}[mode]
    np.testing.assert_allclose(found, exact, atol=tolerance)
    kernel = {"dynamic_range": "INT8", "weight_only": "INT8", "float16": "FLOAT16", "float32": "FLOAT32"}[mode]
    assert kernel in {t.type for t in read_tensors(content).values() if t.data is not None and t.data.size > 100}


def test_weight_only_configs_export():
    model = build("w8")
    constants = [
        sum(r.bytes for r in export_tflite(model, mode=mode).rows if r.weights) for mode in ("dynamic_range", "float32")
    ]
    assert constants[0] < 0.5 * constants[1]


@pytest.mark.parametrize("io", ["int8", "uint8", "int16", "float32"])
def test_types_of_inputs_and_outputs(model, io):
    found = TFLiteModel(export_tflite(model, input_type=io, output_type=io).content)
    assert found.inputs[0]["dtype"] == found.outputs[0]["dtype"] == np.dtype(io)
    x = toy_data(16, seed=4)
    expected = TFLiteModel(export_tflite(model).content).predict(x)[0]
    np.testing.assert_allclose(found.predict(x)[0], expected, atol=1.5 / 256 if io == "int16" else 1e-6)


def test_the_ends_have_the_models_own_grids_by_default(model):
    tensors, grids = read_tensors(export_tflite(model).content), extract(model).activations
    for name in ("in", "sm"):
        assert tensors[name].type == "INT8"
        assert (tensors[name].scale[0], tensors[name].zero_point[0]) == (grids[name].scale, grids[name].zero_point)


def test_signature_has_the_users_names_and_a_dynamic_batch(model):
    file = TFLiteModel(export_tflite(model).content)
    assert file._interpreter.get_signature_list() == {"serving_default": {"inputs": ["x"], "outputs": ["y"]}}
    np.testing.assert_array_equal(file.inputs[0]["shape_signature"], [-1, 8, 8, 3])
    for samples in (1, 3, 2):
        assert file.run([toy_data(samples)])[0].shape == (samples, 5)


def test_the_file_names_its_maker(model):
    assert b"kquant" in export_tflite(model).content


def test_sixteen_bit_models_have_sixteen_bit_ends():
    content = export_tflite(build("w8a16")).content
    ends = summary(content)
    assert {t for t, _ in (*ends.inputs.values(), *ends.outputs.values())} == {"INT16"}


@pytest.mark.parametrize(
    "options, said", [({"mode": "int8"}, "mode"), ({"input_type": "int4"}, "input_type"), ({"output_type": "x"}, "x")]
)
def test_wrong_options_are_refused(model, options, said):
    with pytest.raises(ExportError, match=said):
        export_tflite(model, **options)


def test_other_models_are_refused():
    with pytest.raises(ModelError, match="quantize_model"):
        export_tflite(object())


def test_an_input_that_nothing_reads_stays_an_input() -> None:
    inputs = [keras.Input((3,), name="read"), keras.Input((2,), name="unread")]
    data = [np.random.default_rng(k).normal(size=(16, k)).astype(np.float32) for k in (3, 2)]
    qmodel = kquant.quantize_model(keras.Model(inputs, keras.layers.Dense(2)(inputs[0])), data, progress=False)
    content = kquant.export_tflite(qmodel).content
    assert {n["name"].split("_")[0] for n in kquant.TFLiteModel(content).inputs} == {"read", "unread"}
    assert kquant.verify_tflite(qmodel, content, data).ok
    assert "unread" in qmodel.report and "nothing reads it" in qmodel.report
