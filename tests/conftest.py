"""Quiet logs, one order of tests, the same seeds for every test, small workers, and no skips in CI."""

import gc
import os
from collections.abc import Iterator

if "PYTEST_XDIST_WORKER" in os.environ:  # workers are as many as cores: more threads would only wait for each other
    os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")
    os.environ.setdefault("TF_NUM_INTEROP_THREADS", "1")

import kquant_tools  # noqa: F401, first of all: its settings of TensorFlow

os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import hypothesis
import pytest

_EAGER = frozenset({"verify", "diagnosis", "keras", "targets", "litert", "tflm", "ethos_u"})

# the machines of CI are shared: a slow example is no failure
hypothesis.settings.register_profile("kquant", deadline=None)
hypothesis.settings.load_profile("kquant")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests last: what fails fast is seen first."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)


@pytest.fixture(autouse=True)
def seeds() -> None:
    """Python, numpy and TensorFlow start every test from the same state."""
    import keras

    keras.utils.set_random_seed(0)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> object:
    """A test whose evaluation data is absent is skipped, with the reason."""
    from models.data import MissingData

    try:
        return (yield)
    except MissingData as error:
        pytest.skip(str(error))


@pytest.fixture(autouse=True, scope="session")
def libraries_are_no_garbage() -> None:
    """What libraries hold is looked through once, not at every collection, which would take seconds."""
    import kquant  # noqa: F401, with all that it loads

    gc.collect()
    gc.freeze()


def _free() -> None:
    """Free what tests leave in memory: Keras' global state and the graphs of compiled functions."""
    import keras

    keras.backend.clear_session()
    gc.collect()


@pytest.fixture(autouse=True, scope="module")
def small_worker() -> Iterator[None]:
    """Memory is freed after every module,"""
    yield
    _free()


@pytest.fixture(autouse=True)
def small_worker_of_slow_tests(request: pytest.FixtureRequest) -> Iterator[None]:
    """and after every slow test: one of those may leave gigabytes."""
    yield
    if request.node.get_closest_marker("slow") is not None:
        _free()


@pytest.fixture
def eagerly() -> Iterator[None]:
    """One batch runs sooner than hundreds of operations compile, and no compiled graph stays in memory."""
    import tensorflow as tf

    tf.config.run_functions_eagerly(True)
    yield
    tf.config.run_functions_eagerly(False)


@pytest.fixture(autouse=True)
def eager_where_models_run_once(request: pytest.FixtureRequest) -> None:
    """Fast tests of these folders are eager: tracing takes longer than what is traced. Slow ones are compiled."""
    compiled = any(request.node.get_closest_marker(name) for name in ("slow", "compiled"))
    if request.path.parent.name in _EAGER and not compiled:
        request.getfixturevalue("eagerly")


def _no_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    """A skip in CI, where everything is installed and all data is there, is a failure."""
    if report.skipped and not hasattr(report, "wasxfail") and os.environ.get("CI"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        report.outcome, report.longrepr = "failed", f"{reason}: nothing may be skipped in CI"


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport() -> Iterator[None]:
    report = yield
    _no_skip(report)
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_make_collect_report() -> Iterator[None]:
    report = yield
    _no_skip(report)
    return report
