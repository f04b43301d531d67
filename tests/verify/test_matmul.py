"""Matrix products of two computed tensors, from Keras to the file: integers from end to end, and parity."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import kquant
from kquant.graph.moments import Moments
from kquant.graph.ops import OPS
from tests.support.nodes import EXAMPLES

X = np.random.default_rng(0).normal(size=(64, 6, 8)).astype(np.float32)


def scores() -> keras.Model:
    """softmax(q k^T) v with q, k, v computed from one sequence, one head."""
    keras.utils.set_random_seed(0)
    x = inputs = keras.Input((6, 8), name="sequence")
    q, k, v = (layers.Dense(8, name=n)(x) for n in "qkv")
    weights = layers.Softmax(name="weights")(ops.matmul(q, ops.transpose(k, (0, 2, 1))))
    return keras.Model(inputs, layers.Dense(3, name="out")(ops.matmul(weights, v)))


@pytest.mark.parametrize("config, least", [("w8a8", 28), ("w8a16", 35), ("w4a8", 15)])
def test_the_file_has_no_float_operation_and_computes_what_is_simulated(config, least):
    model = scores()
    qmodel = kquant.quantize_model(model, X, config, progress=False)
    report = kquant.export_tflite(qmodel, allow_float=False)
    assert report.op_counts["BATCH_MATMUL"] == 2
    parity = kquant.verify_tflite(qmodel, report.content, X)
    assert parity.ok and parity.reference_max_lsb == 0 and parity.op_by_op_max_lsb <= 1, str(parity)
    want, found = model.predict(X, verbose=0), kquant.TFLiteModel(report.content).predict(X)[0]
    assert 10 * np.log10(np.square(want).sum() / np.square(want - found).sum()) > least


@pytest.mark.slow
def test_products_train():
    qat = kquant.prepare_qat(scores(), X, "w8a8", progress=False)
    qat.compile(keras.optimizers.Adam(0.01), "mse")
    y = np.random.default_rng(1).normal(size=(64, 6, 3))
    losses = qat.fit(X, y, epochs=4, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    assert kquant.verify_tflite(qat, kquant.export_tflite(qat).content, X).ok


def test_moments_are_those_of_independent_operands():
    rng = np.random.default_rng(2)
    means, stds = (rng.normal(size=(4,)), rng.normal(size=(3,))), (rng.uniform(0.5, 2, 4), rng.uniform(0.5, 2, 3))
    a = rng.normal(means[0], stds[0], (200_000, 4))
    b = rng.normal(means[1], stds[1], (200_000, 4, 3))
    y = np.einsum("nk,nkm->nm", a, b)
    node, _ = EXAMPLES["batch_matmul"]
    found = OPS["batch_matmul"].moments(node, (), [Moments.normal(m, s) for m, s in zip(means, stds, strict=True)])
    np.testing.assert_allclose(found.mean, y.mean(0), atol=0.05)
    np.testing.assert_allclose(found.std, y.std(0), rtol=0.02)
