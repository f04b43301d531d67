"""Data parallel training computes what a single process does.

The pattern that works: quantize the model outside of the strategy, or load it, and call `prepare_qat` inside of
`strategy.scope()`; every worker calibrates on, or loads, the same, so that all start from the same grids. With
`MirroredStrategy`, `compile` in the scope too and `fit` on a dataset of global batches. With
`MultiWorkerMirroredStrategy`, Keras 3.15 cannot `fit` any model (it reduces a batch that has one part per worker); a
loop of one's own with `strategy.run` can, as `loop` below has it.

TensorFlow's devices are fixed once it runs, so each strategy is tried in processes of its own.
"""

from __future__ import annotations

import json
import os
import pathlib
import socket
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

SINGLE, MIRRORED, WORKERS = "single", "mirrored", "workers"
BATCH, EPOCHS = 16, 2


def train(kind: str, path: str) -> None:
    """Train a small model under a strategy and write its variables and losses."""
    import keras
    import tensorflow as tf

    if kind == MIRRORED:
        (cpu,) = tf.config.list_physical_devices("CPU")
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    strategy = {
        SINGLE: tf.distribute.get_strategy,
        MIRRORED: lambda: tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]),
        WORKERS: tf.distribute.MultiWorkerMirroredStrategy,
    }[kind]()
    assert strategy.num_replicas_in_sync == (1 if kind == SINGLE else 2)

    import kquant
    from kquant.config.specs import Training
    from kquant.qat.prepare import prepare_qat

    keras.utils.set_random_seed(0)
    inputs = keras.Input((6, 6, 2))
    shared = keras.layers.Conv2D(2, 3, padding="same", activation="relu")
    x = keras.layers.Flatten()(shared(shared(inputs)))
    rng = np.random.default_rng(0)
    images = rng.normal(size=(64, 6, 6, 2)).astype(np.float32)
    labels = rng.integers(0, 3, 64)
    quantized = kquant.quantize_model(keras.Model(inputs, keras.layers.Dense(3)(x)), images, "w4a8", progress=False)
    data = tf.data.Dataset.from_tensor_slices((images, labels)).batch(BATCH)
    with strategy.scope():
        model = prepare_qat(quantized, training=Training(gradient="lsq+"))
        optimizer = keras.optimizers.SGD(0.02, momentum=0.9)
        model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    if kind == WORKERS:
        losses = loop(strategy, model, optimizer, strategy.experimental_distribute_dataset(data))
    else:
        losses = model.fit(data, epochs=EPOCHS, verbose=0).history["loss"]
    np.savez(path, *model.get_weights(), loss=losses)


def loop(strategy: Any, model: Any, optimizer: Any, data: Any) -> list[float]:
    """The mean loss of every epoch; the gradients of the parts of a global batch are summed by the optimizer."""
    import keras
    import tensorflow as tf

    def replica_step(images: Any, labels: Any) -> Any:
        with tf.GradientTape() as tape:
            logits = model(images, training=True)
            losses = keras.losses.sparse_categorical_crossentropy(labels, logits, from_logits=True)
            loss = tf.reduce_sum(losses) / BATCH
        variables = model.trainable_variables
        optimizer.apply(tape.gradient(loss, [v.value for v in variables]), variables)
        return loss

    @tf.function
    def step(batch: Any) -> Any:
        return strategy.reduce("SUM", strategy.run(replica_step, args=batch), axis=None)

    with strategy.scope():
        optimizer.build(model.trainable_variables)
    return [float(np.mean([step(batch) for batch in data])) for _ in range(EPOCHS)]


def run(kind: str, path: pathlib.Path, **environment: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tests.qat.test_distribute", kind, str(path)]
    root = pathlib.Path(__file__).parents[2]
    return subprocess.Popen(command, cwd=root, env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", **environment})


def results(*paths: pathlib.Path) -> list[dict[str, Any]]:
    return [dict(np.load(p)) for p in paths]


def assert_trained_alike(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert expected["loss"][-1] < expected["loss"][0]
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("single") / "result.npz"
    assert run(SINGLE, path).wait(timeout=300) == 0
    return results(path)[0]


@pytest.mark.slow
def test_two_devices_train_as_one(single, tmp_path):
    assert run(MIRRORED, tmp_path / "mirrored.npz").wait(timeout=300) == 0
    assert_trained_alike(results(tmp_path / "mirrored.npz")[0], single)


@pytest.mark.slow
def test_two_workers_train_as_one(single, tmp_path):
    addresses = [f"127.0.0.1:{port}" for port in free_ports(2)]
    paths = [tmp_path / f"worker_{k}.npz" for k in range(2)]
    workers = []
    for k, path in enumerate(paths):
        task = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": k}}
        workers.append(run(WORKERS, path, TF_CONFIG=json.dumps(task)))
    try:
        assert [w.wait(timeout=300) for w in workers] == [0, 0]
    finally:
        for w in workers:
            w.kill()
    for found in results(*paths):
        assert_trained_alike(found, single)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


if __name__ == "__main__":
    train(*sys.argv[1:])
