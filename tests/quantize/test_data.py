"""Every kind of calibration data gives the same batches, and mistakes a message that helps."""

import numpy as np
import pytest

from kquant.errors import CalibrationError
from kquant.quantize.data import CalibrationData, batches

X = np.arange(10 * 4, dtype=np.float32).reshape(10, 4)
Z = np.arange(10 * 2 * 3, dtype=np.float64).reshape(10, 2, 3)
Y = np.arange(10)
ONE = [("x", (None, 4), "float32")]
TWO = [("x", (None, 4), "float32"), ("z", (None, None, 3), "float32")]


def tensors(*arrays):
    tf = pytest.importorskip("tensorflow")
    return tf.data.Dataset.from_tensor_slices(arrays if len(arrays) > 1 else arrays[0])


def py_dataset():
    keras = pytest.importorskip("keras")

    class Data(keras.utils.PyDataset):
        def __len__(self):
            return 3

        def __getitem__(self, i):
            return X[4 * i : 4 * i + 4], Y[4 * i : 4 * i + 4]

    return Data()


ONE_INPUT = {
    "array": lambda: X,
    "float64": lambda: X.astype(np.float64),
    "uint8": lambda: X.astype(np.uint8),
    "tuple with labels": lambda: (X, Y),
    "tuple with labels and weights": lambda: (X, Y, Y),
    "list of one": lambda: [X],
    "dict": lambda: {"x": X},
    "dict with labels": lambda: ({"x": X}, Y),
    "list of batches": lambda: [X[:4], X[4:8], X[8:]],
    "list of labelled batches": lambda: [(X[:4], Y[:4]), (X[4:8], Y[4:8]), (X[8:], Y[8:])],
    "list of dicts": lambda: [{"x": X[:4]}, {"x": X[4:8]}, {"x": X[8:]}],
    "generator": lambda: (X[i : i + 4] for i in (0, 4, 8)),
    "factory": lambda: lambda: (X[i : i + 4] for i in (0, 4, 8)),
    "tensor": lambda: pytest.importorskip("tensorflow").constant(X),
    "tf.data": lambda: tensors(X).batch(4),
    "tf.data with labels": lambda: tensors(X, Y).batch(4),
    "PyDataset": py_dataset,
}
TWO_INPUTS = {
    "list": lambda: [X, Z],
    "tuple": lambda: (X, Z),
    "tuple with labels": lambda: ((X, Z), Y),
    "list with labels": lambda: ([X, Z], Y),
    "dict": lambda: {"z": Z, "x": X},
    "dict with labels": lambda: ({"z": Z, "x": X}, Y),
    "list of batches": lambda: [[X[:5], Z[:5]], [X[5:], Z[5:]]],
    "labelled batches": lambda: [((X[:5], Z[:5]), Y[:5]), ((X[5:], Z[5:]), Y[5:])],
    "generator of dicts": lambda: ({"x": X[i : i + 5], "z": Z[i : i + 5]} for i in (0, 5)),
    "tf.data": lambda: tensors(X, Z).batch(5),
    "tf.data of dicts": lambda: (
        pytest.importorskip("tensorflow").data.Dataset.from_tensor_slices(({"x": X, "z": Z}, Y)).batch(5)
    ),
}


@pytest.mark.parametrize("kind", ONE_INPUT)
def test_one_input(kind):
    found = list(batches(ONE_INPUT[kind](), ONE, batch_size=4))
    assert [len(b) for b in found] == [1, 1, 1] and [len(b[0]) for b in found] == [4, 4, 2]
    joined = np.concatenate([b[0] for b in found])
    assert joined.dtype == np.float32
    np.testing.assert_array_equal(joined, X)


@pytest.mark.parametrize("kind", TWO_INPUTS)
def test_two_inputs(kind):
    found = list(batches(TWO_INPUTS[kind](), TWO, batch_size=5))
    for i, expected in enumerate((X, Z)):
        joined = np.concatenate([b[i] for b in found])
        assert joined.dtype == np.float32
        np.testing.assert_array_equal(joined, expected)


@pytest.mark.parametrize("kind", sorted(set(ONE_INPUT) - {"generator"}))
def test_can_be_read_again(kind):
    data = CalibrationData(ONE_INPUT[kind](), ONE, batch_size=4)
    first, second = ([b[0].tolist() for b in data] for _ in range(2))
    assert first == second
    assert data.num_batches in (3, None)
    if kind != "factory":
        assert data.num_batches == 3


def test_a_generator_is_read_once():
    data = CalibrationData(ONE_INPUT["generator"](), ONE)
    assert len(list(data)) == 3
    with pytest.raises(CalibrationError, match="without calling it"):
        iter(data)


@pytest.mark.parametrize("kind", ONE_INPUT)
@pytest.mark.parametrize("limit", [1, 5, 8, 100])
def test_limit_counts_samples(kind, limit):
    found = np.concatenate([b[0] for b in batches(ONE_INPUT[kind](), ONE, 4, limit)])
    np.testing.assert_array_equal(found, X[:limit])


def test_a_limit_bounds_endless_data():
    keras = pytest.importorskip("keras")

    class Endless(keras.utils.PyDataset):
        def __getitem__(self, i):
            return X

    for source in (tensors(X).repeat().batch(4), Endless()):
        assert sum(len(b[0]) for b in batches(source, ONE, limit=13)) == 13
        with pytest.raises(CalibrationError, match="never ends"):
            batches(source, ONE)


def test_nothing_is_read_before_it_is_needed():
    read = []

    def source():
        for i in range(3):
            read.append(i)
            yield X

    stream = batches(source, ONE)
    next(stream)
    assert read == [0]


@pytest.mark.parametrize(("shape", "kept"), [((3, 3, 1), 4), ((300, 300, 1), 2), ((800, 800, 1), 1)])
def test_a_few_samples_are_kept_fewer_of_large_ones(shape, kept):
    x = np.random.default_rng(0).random((6, *shape), np.float32)
    data = CalibrationData(x, [("x", (None, *shape), "float32")], batch_size=5)
    assert data.sample is None
    for _ in data:
        pass
    assert data.sample is not None
    np.testing.assert_array_equal(data.sample[0], x[:kept])


def test_integer_inputs():
    ids = [("ids", (None, 3), "int32")]
    for x in (np.ones((2, 3), np.int64), np.ones((2, 3), np.uint8), np.ones((2, 3), np.float32)):
        (found,) = next(batches(x, ids))
        assert found.dtype == np.int32 and (found == 1).all()
    for x in (np.full((2, 3), 0.5), np.full((2, 3), 2**40), np.full((2, 3), np.nan)):
        with pytest.raises(CalibrationError, match="'ids'"):
            next(batches(x, ids))


@pytest.mark.parametrize(
    ("source", "specs", "said"),
    [
        (None, ONE, "No calibration data"),
        ([], ONE, "empty"),
        (X[:0], ONE, "empty"),
        (iter([]), ONE, "empty"),
        ([X[:0]], ONE, "empty"),
        (X[0], ONE, "add a batch dimension"),
        (list(X), ONE, "add a batch dimension"),
        (X[:, :3], ONE, r"shape \(None, 4\), found \(10, 3\)"),
        (X[:, None, None], ONE, r"found \(10, 1, 1, 4\)"),
        (X.astype(str), ONE, "real numbers"),
        (X.astype(complex), ONE, "real numbers"),
        (np.array([None] * 4), ONE, "real numbers"),
        ("images/", ONE, "type str"),
        (5, ONE, "type int"),
        (lambda: 5, ONE, "type int"),
        ({"y": X}, ONE, r"unknown \['y'\], missing \['x'\]"),
        ({"x": X, "q": X}, ONE, r"unknown \['q'\]"),
        ({"x": X}, TWO, r"missing \['z'\]"),
        (X, TWO, "1 arrays where the model has 2 inputs"),
        ([X, Z, Z], TWO, "where the model has 2 inputs"),
        ([X, Z[:4]], TWO, "different lengths"),
        ([[X, Z], [X, Z[:4]]], TWO, "Batch 1"),
        (([[1.0], [1.0, 2.0]], Y), ONE, "arrays"),
        (np.where(X == 7, np.nan, X), ONE, "NaN"),
        (np.where(X == 7, np.inf, X), ONE, "infinite"),
        (np.where(X == 7, 1e300, X.astype(float)), ONE, "infinite"),
    ],
)
def test_mistakes(source, specs, said):
    with pytest.raises(CalibrationError, match=said):
        list(batches(source, specs))


def test_bad_arguments():
    for arguments in ({"batch_size": 0}, {"limit": 0}):
        with pytest.raises(CalibrationError, match="at least 1"):
            CalibrationData(X, ONE, **arguments)
