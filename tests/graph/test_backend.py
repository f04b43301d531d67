"""TensorFlow or a clear error."""

import sys

import keras
import pytest

from kquant.errors import BackendError
from kquant.graph.backend import check_backend, is_newer


def test_tensorflow_is_accepted():
    check_backend()


@pytest.mark.parametrize("name", ["jax", "torch"])
def test_another_backend_is_named_with_the_remedy(monkeypatch, name):
    monkeypatch.setattr(keras.backend, "backend", lambda: name)
    with pytest.raises(BackendError, match=f"{name}.*KERAS_BACKEND=tensorflow"):
        check_backend()


def test_a_backend_that_is_not_installed_is_explained(monkeypatch):
    monkeypatch.setitem(sys.modules, "keras", None)  # makes the import fail
    with pytest.raises(BackendError, match="cannot be imported.*KERAS_BACKEND=tensorflow"):
        check_backend()


def test_newer_versions_warn_and_are_not_refused(monkeypatch):
    assert [is_newer("keras", v) for v in ("3.8.0", "3.15.9", "3.16.0", "4.0.0rc1")] == [False, False, True, True]
    monkeypatch.setattr(keras, "__version__", "3.99.0")
    with pytest.warns(UserWarning, match=r"keras up to 3\.15, and this is 3\.99"):
        check_backend()
