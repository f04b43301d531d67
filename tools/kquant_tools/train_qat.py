r"""Quantization-aware training: fine-tune a float or quantized Keras model, and write it and its TFLite file.

kquant-train-qat --model=float.keras --data=train.npz --validation=test.npz --config=w4a8 \
    --epochs=10 --output=trained.keras --tflite=model.tflite

A float model is quantized first, on a part of the training data, with the steps and flags of kquant-quantize; a
quantized one goes on from where it is, and one that was written by this app trains on. The recipe: Adam, a learning
rate that rises for 5 % of the steps and falls to zero as a cosine, few epochs; grids learn with the weights (LSQ).
--distill adds what the float model says to the labels; data without labels then trains on that alone. With --backup,
an interrupted run that is started again goes on after its last epoch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from absl import app, flags

from . import common, quantize
from .quantize import CONFIG, PROGRESS, SEED, TARGET
from .recipe import recipe

VALIDATION = flags.DEFINE_string("validation", None, "Labelled data to score on, as --data; all of it is used.")
EPOCHS = flags.DEFINE_integer("epochs", 10, "Passes over the training data.", 1)
OPTIMIZER = flags.DEFINE_enum("optimizer", "adam", ["adam", "sgd"], "The optimizer; sgd has Nesterov momentum 0.9.")
LEARNING_RATE = flags.DEFINE_float(
    "learning_rate", None, "The highest learning rate; by default 0.0005 for adam, 0.005 for sgd.", 0
)
GRADIENT = flags.DEFINE_string("gradient", "lsq", "How grids learn: ste (not at all), lsq, lsq+, min_max or tqt.")
RATE = flags.DEFINE_float("rate", 1.0, "How fast grids learn, as a factor of the learning rate.")
BATCH_NORM = flags.DEFINE_string(
    "batch_norm", "fold", "What becomes of batch normalizations: fold, keep, double_forward or batch_statistics."
)
RELATIVE = flags.DEFINE_bool("relative_weights", True, "Train weights in units of their size.")
FREEZE_EPOCH = flags.DEFINE_integer("freeze_epoch", None, "The first epoch (from 0) in which grids stay.", 0)
DISTILL = flags.DEFINE_boolean("distill", False, "Learn from the float model too: --teacher, or else --model.")
TEACHER = flags.DEFINE_string("teacher", None, "The float model to learn from (.keras); implies --distill.")
TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "Of the distillation.")
ALPHA = flags.DEFINE_float("alpha", 0.5, "Share of the teacher in the loss, 0 to 1.")
CALIBRATION = flags.DEFINE_integer("calibration_samples", 500, "Training samples to quantize a float model on.", 1)
CACHE = flags.DEFINE_boolean("cache", True, "Keep the data in memory after the first pass.")
SHUFFLE = flags.DEFINE_integer("shuffle", 50_000, "Among how many samples the next one is drawn.", 1)
AUGMENT = flags.DEFINE_enum("augment", "none", ["none", "flip_crop"], "Random changes of training images.")
BACKUP = flags.DEFINE_string("backup", None, "Folder for the state after each epoch, from which a new start goes on.")
TENSORBOARD = flags.DEFINE_string("tensorboard", None, "Folder for TensorBoard: losses, metrics and grids by epoch.")
CHECKPOINT = flags.DEFINE_string("checkpoint", None, "File (.keras) for the epoch that is best on --validation.")


# --- data ----------------------------------------------------------------------------------------------------------


def as_dataset(batches: Any, name: str, cache: bool, progress: bool) -> tuple[Any, int, Any]:
    """Batches as a `tf.data.Dataset` of single samples.

    Returns:
        The dataset, the number of samples, and the first batch.

    Raises:
        CalibrationError: there is no batch.
    """
    import tensorflow as tf
    from tqdm import tqdm

    from kquant.errors import CalibrationError

    first = next(iter(batches), None)
    if first is None:
        raise CalibrationError(f"There is no sample in --{name}.")
    signature = tf.nest.map_structure(lambda a: tf.TensorSpec([None, *a.shape[1:]], a.dtype), first)
    samples = tf.data.Dataset.from_generator(lambda: iter(batches), output_signature=signature).unbatch()
    samples = samples.cache() if cache else samples
    counted = tqdm(samples, desc=f"reading --{name}", unit=" samples", disable=not progress)
    count = sum(1 for _ in counted)
    return samples.apply(tf.data.experimental.assert_cardinality(count)), count, first


def training_data(samples: Any, count: int, batch_size: int) -> Any:
    """Shuffled and augmented batches as the flags want them."""
    import tensorflow as tf

    from .augment import augmented

    batches = samples.shuffle(min(SHUFFLE.value, count), SEED.value).batch(batch_size)
    batches = batches if AUGMENT.value == "none" else augmented(batches, SEED.value)
    return batches.prefetch(tf.data.AUTOTUNE)


def _open(source: str | None, model: Any, labels: bool = True, limit: int | None = None) -> Any:
    from .data import load_data

    return load_data(
        source or "",
        model.inputs,
        preprocess=common.PREPROCESS.value,
        fit=common.FIT.value,
        limit=limit,
        labels=labels,
        batch_size=common.BATCH_SIZE.value,
    )


# --- the run -------------------------------------------------------------------------------------------------------


def student_of(model: Any) -> Any:
    """What is trained: `model` prepared for it, unless it is already.

    Raises:
        ConfigError: flags that a model has its own settings for.
        KQuantError: see `prepare_qat`.
    """
    from kquant.config.specs import Training
    from kquant.errors import ConfigError
    from kquant.keras.model import QuantizedModel
    from kquant.qat.prepare import prepare_qat

    quantized = isinstance(model, QuantizedModel)
    prepared = quantized and model.quantization.training is not None
    fixed = [CONFIG, TARGET] * quantized + [GRADIENT, RATE, BATCH_NORM, RELATIVE] * prepared
    given = [f"--{flag.name}" for flag in fixed if flags.FLAGS[flag.name].present]
    if given:
        raise ConfigError(
            f"{common.MODEL.value!r} has settings of its own for {', '.join(given)}: leave them out, or start from "
            "the float model."
        )
    training = Training(
        gradient=GRADIENT.value,
        rate=RATE.value,
        batch_norm=BATCH_NORM.value,
        relative_weights=RELATIVE.value,
    )
    if prepared:
        return model
    if quantized:
        return prepare_qat(model, training=training)
    data = _open(common.DATA.value, model, labels=False, limit=CALIBRATION.value)
    config = quantize.config_of_flags()
    return prepare_qat(model, data, config, training=training, seed=SEED.value, progress=PROGRESS.value)


def teacher_of(model: Any) -> Any:
    """The float model to learn from, None without distillation.

    Raises:
        ConfigError: `model` is quantized and no other one is named.
    """
    from kquant.errors import ConfigError
    from kquant.keras.model import QuantizedModel

    if TEACHER.value is not None:
        return common.load_model(TEACHER.value)
    if not DISTILL.value:
        return None
    if isinstance(model, QuantizedModel):
        raise ConfigError(f"{common.MODEL.value!r} is quantized: name the float model with --teacher=FILE.keras.")
    return model


def compiled(student: Any, teacher: Any, optimizer: Any, labels: Any) -> Any:
    """What is fitted: the student, or a distiller of it.

    Args:
        student: from `student_of`.
        teacher: from `teacher_of`.
        optimizer: from `recipe`.
        labels: of a batch, class indices [n] or one-hot [n, classes]; None trains on the teacher alone.
    """
    import keras

    from kquant.qat.distill import Distiller, gives_probabilities

    fitted = student
    if teacher is not None:
        fitted = Distiller(student, teacher, temperature=TEMPERATURE.value, alpha=ALPHA.value)
    if labels is None:
        fitted.compile(optimizer, jit_compile=False)
        return fitted
    one_hot = labels.ndim > 1 and labels.shape[-1] > 1
    kind = keras.losses.CategoricalCrossentropy if one_hot else keras.losses.SparseCategoricalCrossentropy
    loss = kind(from_logits=not gives_probabilities(student))
    # XLA has slower convolutions on the CPU, and takes minutes to compile
    fitted.compile(optimizer, loss, metrics=["accuracy"], jit_compile=False)
    return fitted


def callbacks() -> list[Any]:
    """Those that the flags ask for."""
    import keras

    from kquant.qat.callbacks import FreezeQuantizers, LogQuantizers
    from kquant.qat.distill import Distiller

    class Checkpoint(keras.callbacks.ModelCheckpoint):
        """Saves the student of a distiller."""

        def set_model(self, model: Any) -> None:
            super().set_model(model.student if isinstance(model, Distiller) else model)

    found: list[Any] = []
    if FREEZE_EPOCH.value is not None:
        found.append(FreezeQuantizers(at_epoch=FREEZE_EPOCH.value))
    if TENSORBOARD.value is not None:
        found.append(LogQuantizers(TENSORBOARD.value))
    if CHECKPOINT.value is not None:
        found.append(Checkpoint(CHECKPOINT.value, monitor="val_accuracy", mode="max", save_best_only=True))
    if BACKUP.value is not None:  # the last one, so that an interruption loses nothing of the others
        found.append(keras.callbacks.BackupAndRestore(BACKUP.value))
    return found


def accuracies(models: Mapping[str, Any], batches: Any) -> Iterator[tuple[str, str, str]]:
    """Rows (name, top-1 in percent, samples) of the models' predictions (see `kquant_tools.evaluate`)."""
    from .evaluate import evaluate

    for name, score in evaluate(models, batches).items():
        accuracy = "no labels" if score.accuracy is None else f"{100 * score.accuracy:.2f}"
        yield name, accuracy, f"{score.samples:,}"


def tflite_predict(content: bytes, names: list[str]) -> Any:
    """The first output of a TFLite file in memory; `names` are the model's inputs, for data given by name."""
    import kquant

    interpreter = kquant.TFLiteModel(content)

    def predict(x: Any) -> Any:
        inputs = [x[name] for name in names] if isinstance(x, Mapping) else x
        return interpreter.predict_batches([inputs if isinstance(inputs, list | tuple) else [inputs]])[0]

    return predict


def fit(fitted: Any, data: Any, validation: Any) -> None:
    """Train as the flags want it.

    Raises:
        ModelError: a step's loss is not finite; the variables are those of the step before.
    """
    import tensorflow as tf

    from kquant.errors import ModelError

    options = {"callbacks": callbacks(), "verbose": "auto" if PROGRESS.value else 0, "shuffle": False}
    try:
        fitted.fit(data, epochs=EPOCHS.value, validation_data=validation, **options)
    except tf.errors.InvalidArgumentError as error:
        if "NaN or infinite" not in error.message:
            raise
        raise ModelError(
            "The loss became NaN or infinite: look for NaN or huge values in --data, or lower --learning_rate."
        ) from error


def training_samples(distilling: bool, model: Any) -> tuple[Any, int, Any]:
    """The training data: its samples, their number, the labels of a batch.

    Raises:
        ConfigError: nothing to learn from.
    """
    from kquant.errors import ConfigError

    batches = _open(common.DATA.value, model, limit=common.LIMIT.value)
    samples, count, first = as_dataset(batches, "data", CACHE.value, PROGRESS.value)
    labels = first[1] if isinstance(first, tuple) else None
    if labels is None and not distilling:
        raise ConfigError(f"{common.DATA.value!r} has no labels: give some, or learn from a teacher with --distill.")
    return samples, count, labels


def validation_batches(model: Any) -> Any:
    """The batches of --validation, None without.

    Raises:
        ConfigError: they have no labels.
    """
    from kquant.errors import ConfigError

    if VALIDATION.value is None:
        return None
    samples, _, first = as_dataset(_open(VALIDATION.value, model), "validation", CACHE.value, PROGRESS.value)
    if not isinstance(first, tuple):
        raise ConfigError(f"{VALIDATION.value!r} has no labels, and --validation is for scoring.")
    return samples.batch(common.BATCH_SIZE.value)


def check_flags() -> None:
    """Refuse what cannot work, before the long work starts.

    Raises:
        UsageError: a flag is missing.
        ExportError: a file cannot be written.
    """
    if common.DATA.value is None:
        raise app.UsageError("Pass the data to train on: --data=...")
    if common.OUTPUT.value is None and common.TFLITE.value is None and CHECKPOINT.value is None:
        raise app.UsageError("Say where to write the result: --output=FILE.keras, --tflite=FILE.tflite, or both.")
    if CHECKPOINT.value is not None and VALIDATION.value is None:
        raise app.UsageError("--checkpoint keeps the epoch that is best on --validation: pass both.")
    for flag, suffix in ((common.OUTPUT, ".keras"), (common.TFLITE, ".tflite"), (CHECKPOINT, ".keras")):
        common.writable(flag.value, suffix)


def main(argv: list[str]) -> None:
    """Quantize, train, print accuracies, write the files."""
    check_flags()
    import keras

    import kquant
    from kquant.config.text import table

    from .evaluate import keras_predict

    keras.utils.set_random_seed(SEED.value)
    model = common.load_model(common.MODEL.value)
    teacher, student = teacher_of(model), student_of(model)
    print(student.report)
    samples, count, labels = training_samples(teacher is not None, model)
    validation = validation_batches(model)
    rows: list[tuple[str, str, str]] = []
    if validation is not None:
        given = {} if isinstance(model, kquant.QuantizedModel) else {"float": keras_predict(model)}
        rows += accuracies({**given, "before training": keras_predict(student)}, validation.as_numpy_iterator())
    steps = EPOCHS.value * -(-count // common.BATCH_SIZE.value)
    fitted = compiled(student, teacher, recipe(steps, OPTIMIZER.value, LEARNING_RATE.value), labels)
    fit(fitted, training_data(samples, count, common.BATCH_SIZE.value), validation)
    report = kquant.export_tflite(student, common.TFLITE.value)
    if validation is not None:
        names = [tensor.name for tensor in model.inputs]
        after = {"after training": keras_predict(student), "tflite": tflite_predict(report.content, names)}
        rows += accuracies(after, validation.as_numpy_iterator())
        print(table(("model", "top-1 %", "samples"), rows))
    if common.OUTPUT.value is not None:
        student.save(common.OUTPUT.value)
        print(f"wrote {common.OUTPUT.value}")
    if common.TFLITE.value is not None:
        print(report)


TRAINING_FLAGS = (
    *(VALIDATION, EPOCHS, OPTIMIZER, LEARNING_RATE, GRADIENT, RATE, BATCH_NORM, FREEZE_EPOCH),
    *(DISTILL, TEACHER, TEMPERATURE, ALPHA, CALIBRATION, CACHE, SHUFFLE, AUGMENT, BACKUP, TENSORBOARD, CHECKPOINT),
)


def run() -> None:
    """Console script."""
    steps = (*quantize.CONFIG_FLAGS, SEED, PROGRESS)
    files = (common.MODEL, common.OUTPUT, common.TFLITE, *common.DATA_FLAGS)
    common.launch(main, __doc__, [*files, *TRAINING_FLAGS, *steps])


if __name__ == "__main__":
    run()
