"""What the command-line apps share: flags, loading, and errors in one line."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from absl import app, flags

from kquant_tools.quiet import load_delegate

MODEL = flags.DEFINE_string("model", None, "The Keras model to read (.keras).")
DATA = flags.DEFINE_string(
    "data",
    None,
    "FILE.npz (x or images, optional y or labels; or one array per input name; or jpeg and offsets), FILE.npy, a "
    "FOLDER of images (with one subfolder per class where labels are needed), or module:function that yields batches.",
)
PREPROCESS = flags.DEFINE_string(
    "preprocess",
    "none",
    "What to do with each batch: none, unit (x / 255), tf (x / 127.5 - 1), torch (ImageNet mean and standard "
    "deviation), or module:function.",
)
FIT = flags.DEFINE_enum(
    "fit", "stretch", ["stretch", "crop"], "How images get the model's size: resized, or cut out of the centre."
)
LIMIT = flags.DEFINE_integer("limit", None, "Use at most this many samples, spread evenly over a file or folder.", 1)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "Samples per batch.", 1)
OUTPUT = flags.DEFINE_string("output", None, "The file to write.")
TFLITE = flags.DEFINE_string("tflite", None, "The TFLite file.")
METRIC = flags.DEFINE_string(
    "metric",
    None,
    "accuracy, agreement, sqnr, kl, mean_iou:CLASSES, pixel_accuracy:CLASSES, the name of a Keras metric, or "
    "module:name of a function of a model, of a kquant.OutputMetric or of a dict of metrics by output; by default "
    "accuracy where there are labels.",
)
DATA_FLAGS = (DATA, PREPROCESS, FIT, LIMIT, BATCH_SIZE)


def load_model(path: str) -> Any:
    """A Keras model, quantized or not.

    Raises:
        ModelError: there is no such file, or it is not a model.
    """
    import keras

    import kquant  # registers the classes of quantized models

    try:
        return keras.saving.load_model(path, compile=False)
    except (ValueError, OSError, TypeError) as error:
        raise kquant.ModelError(f"Cannot load a model from {path!r}: {_first_line(error)}") from error


def load_data(model: Any, *, labels: bool = True) -> Any:
    """The batches that the data flags describe; None without --data."""
    from .data import load_data as open_data

    if DATA.value is None:
        return None
    return open_data(
        DATA.value,
        model.inputs,
        preprocess=PREPROCESS.value,
        fit=FIT.value,
        limit=LIMIT.value,
        labels=labels,
        batch_size=BATCH_SIZE.value,
    )


def metric_of_flags() -> Any:
    """A name as it is, or what module:name names."""
    from .data import FUNCTION, import_function

    return import_function(METRIC.value) if METRIC.value and FUNCTION.fullmatch(METRIC.value) else METRIC.value


def write_result(found: Any, json: str | None, html: str | None) -> None:
    """Write what was found as JSON and as a page, as far as paths are given (`writable`), and say so."""
    if json is not None:
        Path(json).write_text(found.to_json(), encoding="utf-8")
        print(f"wrote {json}")
    if html is not None:
        found.save_html(html)
        print(f"wrote {html}")


def writable(path: str | None, suffix: str) -> str | None:
    """The path, checked before the long work starts; None stays None.

    Raises:
        ExportError: its folder does not exist, or it ends in something else.
    """
    from kquant.errors import ExportError

    if path is None:
        return None
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        raise ExportError(f"Cannot write {path!r}: there is no folder {folder!r}.")
    if not path.endswith(suffix):
        raise ExportError(f"Cannot write {path!r}: its name must end in {suffix}.")
    return path


def launch(main: Callable[[list[str]], None], doc: str | None, holders: Iterable[flags.FlagHolder]) -> None:
    """Run an app; what kquant refuses is printed without traceback, and the exit status is 1.

    Args:
        main: the app.
        doc: what --help prints first, the app's module docstring.
        holders: the flags that --help lists.
    """
    sys.path.insert(0, os.getcwd())  # for module:function flags, also from an installed script
    sys.modules["__main__"].__doc__ = doc  # where absl looks for it, also from an installed script
    for holder in holders:
        if holder is MODEL:  # of the apps that have it
            flags.mark_flag_as_required(holder.name)
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[holder.name])
    app.run(partial(guarded, main))


def guarded(main: Callable[[list[str]], None], argv: list[str]) -> None:
    """`main` with kquant's errors turned into one message and exit status 1."""
    from kquant.errors import KQuantError

    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {' '.join(argv[1:])}")
    load_delegate()
    try:
        main(argv)
    except KQuantError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(1)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
