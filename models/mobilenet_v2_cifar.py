r"""A depthwise network for the experiments on training: a small MobileNetV2 for the 32 x 32 images of CIFAR-10.

python -m models.mobilenet_v2_cifar --epochs=60 --output=models/mobilenet_v2_cifar.keras

trains it anew on the training file of the evaluation data (KQUANT_DATA).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
from absl import app, flags
from keras import layers

from kquant_tools.augment import training_batches

from .data import cifar10

PATH = Path(__file__).with_suffix(".keras")
SEED = 1
PREPROCESS = "tf"  # x / 127.5 - 1
BATCH_SIZE = 128
STEM, HEAD = 16, 320
BLOCKS = (  # expansion, filters, repetitions, stride of the first; few at 32 x 32, which cost most of the time
    (1, 16, 1, 2),
    (3, 24, 1, 1),
    (3, 32, 2, 2),
    (3, 48, 2, 1),
    (4, 96, 3, 2),
)


def _conv_bn(x: Any, conv: layers.Layer, relu: bool = True) -> Any:
    x = layers.BatchNormalization(momentum=0.9, name=f"{conv.name}_bn")(conv(x))
    return layers.ReLU(6.0, name=f"{conv.name}_relu")(x) if relu else x


def _inverted_residual(x: Any, expansion: int, filters: int, stride: int, name: str) -> Any:
    """Expand, filter each channel, project; added to the input where the shapes allow."""
    settings: dict[str, Any] = {"padding": "same", "use_bias": False}
    channels = x.shape[-1]
    y = x
    if expansion > 1:
        y = _conv_bn(y, layers.Conv2D(expansion * channels, 1, name=f"{name}_expand", **settings))
    y = _conv_bn(y, layers.DepthwiseConv2D(3, stride, name=f"{name}_depthwise", **settings))
    y = _conv_bn(y, layers.Conv2D(filters, 1, name=f"{name}_project", **settings), relu=False)
    return layers.Add(name=f"{name}_add")([x, y]) if stride == 1 and channels == filters else y


def build() -> keras.Model:
    """MobileNetV2 (arXiv 1801.04381), strides for 32 x 32 images: logits of 10 classes."""
    inputs = keras.Input((32, 32, 3), name="image")
    x = _conv_bn(inputs, layers.Conv2D(STEM, 3, padding="same", use_bias=False, name="stem"))
    for stage, (expansion, filters, repetitions, stride) in enumerate(BLOCKS):
        for k in range(repetitions):
            name = f"block{stage}{'abc'[k]}"
            x = _inverted_residual(x, expansion, filters, stride if k == 0 else 1, name)
    x = _conv_bn(x, layers.Conv2D(HEAD, 1, use_bias=False, name="head"))
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    return keras.Model(inputs, layers.Dense(10, name="logits")(x), name="mobilenet_v2_cifar")


def train(
    epochs: int = 60, verbose: int = 2, seed: int = SEED, limit: int | None = None, learning_rate: float = 0.1
) -> keras.Model:
    """Train from scratch: random flips and shifts, SGD with Nesterov momentum, cosine to zero after a warm-up.

    Args:
        epochs: passes over the training images.
        verbose: as in `keras.Model.fit`; the accuracy shown is that of the test images.
        seed: of the weights, the order of the images and their changes.
        limit: train on that many images only.
        learning_rate: the highest.

    Raises:
        MissingData: the evaluation data is not there.
    """
    keras.utils.set_random_seed(seed)
    x, y = cifar10("train", limit, PREPROCESS)
    steps = -(-len(x) // BATCH_SIZE)
    model = build()
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0, max(epochs * steps - steps, 1), warmup_target=learning_rate, warmup_steps=steps
    )
    # decoupled weight decay: with momentum 0.9 the pull of an L2 penalty of 4e-4
    optimizer = keras.optimizers.SGD(schedule, momentum=0.9, nesterov=True, weight_decay=4e-3)
    optimizer.exclude_from_weight_decay(var_names=["gamma", "beta", "bias"])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=["accuracy"], jit_compile=False)
    data = training_batches(x, y, BATCH_SIZE, seed)
    test = cifar10("test", None, PREPROCESS)
    model.fit(data, epochs=epochs, validation_data=test, validation_batch_size=250, shuffle=False, verbose=verbose)
    return keras.Model(model.inputs, model.outputs, name=model.name)  # without the optimizer's state


def accuracy(model: keras.Model) -> float:
    """Top-1 accuracy in percent on the test images."""
    x, y = cifar10("test", None, PREPROCESS)
    return 100 * float(np.mean(np.argmax(model.predict(x, batch_size=250, verbose=0), -1) == y))


if __name__ == "__main__":
    EPOCHS = flags.DEFINE_integer("epochs", 60, "Passes over the training images.", 1)
    OUTPUT = flags.DEFINE_string("output", str(PATH), "The file to write.")
    LIMIT = flags.DEFINE_integer("limit", None, "Train on that many images only.", 1)
    RATE = flags.DEFINE_float("learning_rate", 0.1, "The highest learning rate.")

    def main(argv: list[str]) -> None:
        """Train, print the accuracy on the test images, write the model."""
        model = train(EPOCHS.value, limit=LIMIT.value, learning_rate=RATE.value)
        model.save(OUTPUT.value)
        size = Path(OUTPUT.value).stat().st_size
        print(f"{model.count_params():,} parameters, test accuracy {accuracy(model):.2f} %, {size:,} bytes")

    app.run(main)
