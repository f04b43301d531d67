"""Quiet logs, one order of tests, the same seeds for every test."""

import os

import kquant_tools  # noqa: F401, first of all: its settings of TensorFlow

os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import hypothesis
import pytest

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
