"""The real models through the whole pipeline: accuracy, integer operations, parity."""

import numpy as np
import pytest

import kquant
from experiments import zoo
from experiments.tables import OFF
from kquant.graph.ops import evaluate
from kquant.graph.transforms import prepare_graph
from kquant.graph.transforms.absorb_bias import absorb_bias
from kquant.graph.transforms.equalize import equalize
from kquant.targets.litert.flatbuffer import only_integer_ops

# points of top-1 that the exported w8a8 file may lose against float; MobileNetV1 is held to the converter's result
MAY_LOSE = {"resnet8": 0.3, "resnet20": 0.3, "resnet56": 0.3, "ds_cnn": 0.3, "mobilenet_v2": 0.7}
pytestmark = pytest.mark.slow


def quantized(name: str, config: object) -> kquant.QuantizedModel:
    return kquant.quantize_model(zoo.load_model(name), zoo.calibration(name), config, progress=False)


def samples(name: str, count: int) -> list[np.ndarray]:
    return [x for x, _ in zoo.MODELS[name].evaluation(count)]


@pytest.mark.parametrize("name", zoo.MODELS)
def test_w8a8_accuracy_of_the_file_on_all_samples(name):
    content = kquant.export_tflite(quantized(name, "w8a8"), allow_float=False).content
    assert only_integer_ops(content)
    accuracy, _ = zoo.top1(content, zoo.MODELS[name].evaluation(None))
    real = zoo.MODELS[name]
    assert accuracy >= (real.top1 - MAY_LOSE[name] if name in MAY_LOSE else real.converter)


@pytest.mark.parametrize("config", ["w8a8", "w8a8-per_tensor", "w4a8", "w8a16", "w4a4"])
@pytest.mark.parametrize("name", [n for n in zoo.MODELS if n != "resnet56"])  # only deeper than resnet20
def test_parity(name, config):
    """Without the steps, which choose other integers and take time; `test_the_pipeline...` has them."""
    qmodel = quantized(name, {"preset": config, **OFF})
    content = kquant.export_tflite(qmodel, allow_float=False).content
    # int16 kernels are not vectorized; one image of 224 pixels has as many elements as 50 of 32
    count = 12 if config == "w8a16" else 20 if name.startswith("mobilenet") else 50
    report = kquant.verify_tflite(qmodel, content, samples(name, count), samples=count, tensor_samples=1)
    assert report.ok, f"{report}"
    end = report.end_to_end[0]
    if not config.endswith("a16"):  # LiteRT takes softmax from a float32 table: there a tie may round the other way
        ends_in_softmax = qmodel.layers[-1].node.op == "softmax"
        assert end.max_lsb <= ends_in_softmax and end.equal >= (0.998 if ends_in_softmax else 1.0), f"{report}"


@pytest.mark.parametrize("name", ["mobilenet_v1", "mobilenet_v2"])
def test_per_tensor_min_max_collapses_in_simulation_and_file_alike(name):
    plain = {"equalize": False, "correct_bias": False}
    qmodel = quantized(name, {"preset": "w8a8-per_tensor", "weights": {"method": "min_max"}, **plain})
    batches = zoo.MODELS[name].evaluation(130)
    on_target, seen = zoo.top1(kquant.export_tflite(qmodel).content, batches)
    simulated = zoo.float_top1(qmodel, batches)
    assert seen == 130
    assert on_target < 20 and on_target == pytest.approx(simulated, abs=0.01)


# --- what rewrites the float network ----------------------------------------------------------------------------------


def worst(want: np.ndarray, got: np.ndarray) -> float:
    """The largest difference, relative to the largest output."""
    return float(np.abs(got - want).max() / np.abs(want).max())


@pytest.mark.parametrize("name", zoo.MODELS)
def test_the_float_function_is_kept(name):
    """By folding of batch normalization, resolution of dead channels, and both kinds of equalization."""
    model, x = zoo.load_model(name), samples(name, 16)[0][:16]
    want = model.predict(x, verbose=0)
    graph = prepare_graph(model)
    rewritten = {
        "folded": graph,
        "dead channels": equalize(graph, max_sweeps=0)[0],
        "equalized": equalize(graph)[0],
        "weights alone": equalize(graph, activations=0.0)[0],
        "across joins": equalize(graph, across_joins=True)[0],
    }
    errors = {what: worst(want, np.asarray(evaluate(g, [x])[0])) for what, g in rewritten.items()}
    assert all(e < 1e-4 for e in errors.values()), errors


def test_absorbed_biases_keep_the_accuracy_of_the_float_network():
    """Without data c is a guess (mean - 3 std): a few pre-activations are below it."""
    name, count = "mobilenet_v1", 300
    graph, _ = equalize(prepare_graph(zoo.load_model(name)))
    absorbed, report = absorb_bias(graph)
    assert sum(int(np.count_nonzero(c)) for c in report.absorbed.values()) > 0
    right = np.zeros(2)
    for x, y in zoo.MODELS[name].evaluation(count):
        right += [np.sum(np.argmax(evaluate(g, [x])[0], -1) == y) for g in (graph, absorbed)]
    assert abs(right[0] - right[1]) <= 0.01 * count


@pytest.mark.parametrize(
    ("name", "config", "has_data", "count", "may_lose"),
    [
        ("mobilenet_v1", "w8a8-per_tensor", True, 300, 4.0),
        ("resnet20", "w4a8", True, 1000, 2.0),
        ("resnet20", "w8a8", False, 1000, 1.5),
    ],
)
def test_the_pipeline_keeps_the_accuracy(name, config, has_data, count, may_lose):
    model = zoo.load_model(name)
    data = zoo.calibration(name) if has_data else None
    qmodel = kquant.quantize_model(model, data, config, progress=False)
    content = kquant.export_tflite(qmodel, allow_float=False).content
    assert kquant.verify_tflite(qmodel, content, samples(name, 32), samples=32, tensor_samples=1).ok
    batches = zoo.MODELS[name].evaluation(count)
    accuracy, _ = zoo.top1(content, batches)
    assert accuracy >= zoo.float_top1(model, batches) - may_lose
