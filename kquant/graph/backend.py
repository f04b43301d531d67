"""The one backend that kquant supports."""

from __future__ import annotations

import re
import warnings

from kquant.errors import BackendError

NEWEST = {"tensorflow": (2, 21), "keras": (3, 15)}  # that the tests were run on
_REMEDY = (
    "kquant needs the TensorFlow backend: set the environment variable KERAS_BACKEND=tensorflow (or the backend in "
    "~/.keras/keras.json) before Keras is imported."
)


def check_backend() -> None:
    """Refuse to run on anything but TensorFlow.

    Raises:
        BackendError: names the backend found and the remedy.
    """
    try:
        import keras
    except ImportError as error:  # the configured backend is not even installed
        raise BackendError(f"Keras cannot be imported ({error}). {_REMEDY}") from error
    found = keras.backend.backend()
    if found != "tensorflow":
        raise BackendError(f"Keras runs on the {found!r} backend. {_REMEDY}")
    import tensorflow as tf

    for name, version in (("tensorflow", tf.__version__), ("keras", keras.__version__)):
        if is_newer(name, version):
            tested = ".".join(map(str, NEWEST[name]))
            warnings.warn(f"kquant was tested with {name} up to {tested}, and this is {version}.", stacklevel=2)


def is_newer(name: str, version: str) -> bool:
    """Whether a version of TensorFlow or Keras is newer than those that kquant was tested with."""
    return tuple(map(int, re.findall(r"\d+", version)[:2])) > NEWEST[name]
