"""The one backend that kquant supports."""

from __future__ import annotations

from kquant.errors import BackendError

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
