"""Reading a model that TFMOT quantized: a Keras 3 twin with markers where TFMOT has quantizers.

TFMOT (tensorflow-model-optimization 0.8) wraps layers of legacy Keras in `QuantizeWrapperV2`, whose variables hold the
ranges of the layer's weights, of its activation (before or behind it) and of its output; a `QuantizeLayer` holds the
range of an input. Nothing here imports TFMOT: the model brings its classes along.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from kquant.errors import ModelError
from kquant.grids.grid import Grid

_WRAPPERS = {"QuantizeWrapper", "QuantizeWrapperV2"}
# Keras 3 has them under the same name, with the same arguments but for `_RENAMED`.
_LAYERS = frozenset(
    """Activation Add Average AveragePooling1D AveragePooling2D BatchNormalization Concatenate Conv2D Conv2DTranspose
    Cropping1D Cropping2D Dense DepthwiseConv2D Dropout Flatten GlobalAveragePooling1D GlobalAveragePooling2D
    GlobalMaxPooling1D GlobalMaxPooling2D LeakyReLU MaxPooling2D Maximum Minimum Multiply Permute ReLU Rescaling Reshape
    Softmax SpatialDropout1D SpatialDropout2D Subtract UpSampling2D ZeroPadding1D ZeroPadding2D""".split()
)
_RENAMED = {"alpha": "negative_slope", "depthwise_kernel": "kernel"}
_TRAINING_ONLY = ("_initializer", "_regularizer", "_constraint")
_ONE_INTEGER = ("axis",)  # legacy Keras stores it as a list of one
_LIMITS = {True: (-127, 127), False: (-128, 127)}


@dataclass(frozen=True, eq=False)
class Range:
    """The range that a quantizer of TFMOT holds.

    Attributes:
        low, high: float32, () or (channels,).
        narrow: the grid leaves out its smallest integer.
    """

    low: np.ndarray
    high: np.ndarray
    narrow: bool

    def grid(self, axis: int | None = None) -> Grid:
        """The grid of `tf.quantization.fake_quant_with_min_max_vars`, in its float32 arithmetic, stored as int8.

        scale = (high - low) / (qmax - qmin); the zero point is qmin - low / scale, rounded half up and clamped.

        Args:
            axis: the axis of the channels; None per tensor.
        """
        qmin, qmax = _LIMITS[self.narrow]
        scale = np.asarray((self.high - self.low) / np.float32(qmax - qmin), np.float32)
        unsigned = np.float32(qmin + 128) - self.low / scale
        zero_point = np.clip(np.floor(unsigned + np.float32(0.5)).astype(np.int32) - 128, qmin, qmax)
        return Grid(scale, np.asarray(zero_point, np.int32), qmin, qmax, axis)


class Marker(keras.layers.Layer):
    """The place of a quantizer of TFMOT, and what it computes.

    `call` is raw TensorFlow, so that tracing keeps it as a node of its own that nothing folds or fuses across.

    Args:
        range: of the tensor.
    """

    def __init__(self, range: Range, **kwargs: Any):
        super().__init__(**kwargs)
        self.range = range

    def call(self, x: Any) -> Any:
        edges = float(self.range.low), float(self.range.high)
        return tf.quantization.fake_quant_with_min_max_args(x, *edges, narrow_range=self.range.narrow)

    def compute_output_spec(self, x: Any) -> Any:
        return keras.KerasTensor(x.shape, dtype=x.dtype)


@dataclass(frozen=True, eq=False)
class Twin:
    """What was read.

    Attributes:
        model: a Keras 3 model with the float weights, and a `Marker` for every quantizer of an activation.
        weights: layer -> range of its kernel.
    """

    model: keras.Model
    weights: Mapping[str, Range]


def read_model(model: Any) -> Twin:
    """The Keras 3 twin of a model that TFMOT quantized, with the names of the layers inside the wrappers.

    Raises:
        ModelError: it is not such a model, or has a layer or a quantizer that cannot be translated.
    """
    _check(model)
    values: dict[str, Any] = {}
    chains: dict[str, tuple[keras.layers.Layer, ...]] = {}
    weights: dict[str, Range] = {}
    for node in _calls(model):
        layer = node.layer
        if node.is_input:
            tensor = node.outputs
            values[node.flat_output_ids[0]] = keras.Input(tensor.shape[1:], name=layer.name, dtype=tensor.dtype.name)
            continue
        x: Any = [values[i] for i in node.flat_input_ids]
        x = x[0] if len(x) == 1 else x
        first = layer.name not in chains
        if first:
            chains[layer.name] = _translate(layer)
        for step in chains[layer.name]:
            x = step(x)
        if first and chains[layer.name]:
            _copy_weights(layer, chains[layer.name][0])
            weights.update(_weight_ranges(layer))
        values[node.flat_output_ids[0]] = x
    ends = [[values[str(id(t))] for t in tensors] for tensors in (model.inputs, model.outputs)]
    inputs, outputs = (tensors[0] if len(tensors) == 1 else tensors for tensors in ends)
    return Twin(keras.Model(inputs, outputs, name=model.name), weights)


def _check(model: Any) -> None:
    """Refuse what TFMOT has not quantized."""
    kinds = {_kind(layer) for layer in getattr(model, "layers", ())}
    name = getattr(model, "name", type(model).__name__)
    if kinds & {"QuantizeAnnotate"}:
        raise ModelError(
            f"{name!r} is annotated, not quantized: call tfmot.quantization.keras.quantize_apply(model), train it, and "
            "pass the result."
        )
    if not kinds & (_WRAPPERS | {"QuantizeLayer"}):
        raise ModelError(
            f"{name!r} ({type(model).__name__}) is not a model of tfmot.quantization.keras.quantize_model or "
            "quantize_apply: no layer of it is quantized. For a float Keras 3 model use kquant.quantize_model."
        )
    if not hasattr(model, "_nodes_by_depth"):
        raise ModelError(f"{name!r} is subclassed: pass a Sequential or functional model, as TFMOT makes them.")


def _kind(layer: Any) -> str:
    return type(layer).__name__


def _calls(model: Any) -> Iterator[Any]:
    """The recorded calls of a functional legacy model, in topological order."""
    for depth in sorted(model._nodes_by_depth, reverse=True):
        yield from model._nodes_by_depth[depth]


def _translate(layer: Any) -> tuple[keras.layers.Layer, ...]:
    """The Keras 3 layers that compute what one layer of the TFMOT model computes: operation, markers, activation."""
    if _kind(layer) == "QuantizeLayer":
        return () if layer.quantizer is None else (_marker(layer, layer.quantizer, layer.quantizer_vars, layer.name),)
    inner = layer.layer if _kind(layer) in _WRAPPERS else layer
    before, behind = _activation_quantizers(layer)
    chain = [_same_layer(inner), *before]
    activation = _activation_name(inner)
    if _kind(inner) != "Activation" and activation not in ("linear", "NoOpActivation"):
        chain.append(keras.layers.Activation(activation, name=f"{inner.name}.activation"))
    chain += behind
    outputs = getattr(layer, "_output_quantizers", ())
    if outputs:
        chain.append(_marker(layer, outputs[0], layer._output_quantizer_vars, f"{inner.name}.output"))
    return tuple(chain)


def _same_layer(inner: Any) -> keras.layers.Layer:
    """The Keras 3 layer with the same settings, without its activation."""
    kind = _kind(inner)
    if kind not in _LAYERS:
        raise ModelError(
            f"Layer {inner.name!r} ({kind}) cannot be translated to Keras 3. Rebuild the model in Keras 3 without it, "
            "copy the weights and use kquant.quantize_model, or kquant.prepare_qat to go on training."
        )
    cls = getattr(keras.layers, kind)
    config = {_RENAMED.get(k, k): v for k, v in inner.get_config().items() if not k.endswith(_TRAINING_ONLY)}
    known = inspect.signature(cls.__init__).parameters
    settings = {k: v for k, v in config.items() if k in known and k not in ("name", "dtype", "activation")}
    for key in _ONE_INTEGER:
        if isinstance(settings.get(key), Sequence) and len(settings[key]) == 1:
            settings[key] = settings[key][0]
    if kind == "Activation":
        settings["activation"] = _activation_name(inner)
    return cls(**settings, name=inner.name)


def _activation_name(inner: Any) -> str:
    """The name of a layer's activation, which TFMOT may have wrapped."""
    function = getattr(inner, "activation", None)
    if function is None:
        return "linear"
    function = getattr(function, "activation", function)
    name = getattr(function, "__name__", type(function).__name__)
    if name != "NoOpActivation" and not hasattr(keras.activations, name):
        raise ModelError(
            f"Layer {inner.name!r}: its activation {name!r} is not one of Keras 3. Replace it by one of "
            "keras.activations and train again."
        )
    return name


def _activation_quantizers(layer: Any) -> tuple[list[Marker], list[Marker]]:
    """The markers in front of a layer's activation, and behind it."""
    aware = getattr(layer, "_quantize_activations", ())
    if len(aware) > 1:
        raise ModelError(f"Layer {layer.name!r} quantizes {len(aware)} activations: at most one can be translated.")
    found: tuple[list[Marker], list[Marker]] = ([], [])
    for activation in aware:
        for markers, place in zip(found, ("pre", "post"), strict=True):
            variables = getattr(activation, f"_{place}_activation_vars", None)
            if variables is not None:
                name = f"{layer.layer.name}.{place}_activation"
                markers.append(_marker(layer, activation.quantizer, variables, name))
    return found


def _marker(layer: Any, quantizer: Any, variables: Any, name: str) -> Marker:
    found = _range(layer, quantizer, variables)
    if found.low.size != 1:
        raise ModelError(
            f"Layer {layer.name!r}: its activations have a range per channel; targets have one per tensor."
        )
    return Marker(Range(found.low.reshape(()), found.high.reshape(()), found.narrow), name=name)


def _range(layer: Any, quantizer: Any, variables: Any) -> Range:
    """The range of one quantizer, checked."""
    where = f"Layer {layer.name!r}"
    if not isinstance(variables, Mapping) or not {"min_var", "max_var"} <= variables.keys():
        raise ModelError(
            f"{where}: its quantizer {type(quantizer).__name__} has no variables min_var and max_var. Use the "
            "quantizers of TFMOT's default 8-bit scheme."
        )
    if getattr(quantizer, "num_bits", None) != 8:
        raise ModelError(
            f"{where}: its quantizer has num_bits={getattr(quantizer, 'num_bits', None)}, and only TFMOT's 8-bit "
            "scheme is translated. Quantize the float model with kquant.prepare_qat(model, data, config='w4a8'), say."
        )
    low, high = (np.asarray(variables[k].numpy(), np.float32) for k in ("min_var", "max_var"))
    if not (np.isfinite(low).all() and np.isfinite(high).all() and (low <= 0).all() and (high >= 0).all()):
        raise ModelError(f"{where}: its range [{low.min()}, {high.max()}] is not finite, or does not contain 0.")
    if not (low < high).all():
        raise ModelError(
            f"{where}: its range is empty, [{low.max()}, {high.min()}]. TFMOT's ranges come from training: call "
            "model(x, training=True) on batches of data, or train, before the conversion."
        )
    return Range(low, high, bool(quantizer.narrow_range))


def _weight_ranges(layer: Any) -> Iterator[tuple[str, Range]]:
    """(layer, range of its kernel), if TFMOT quantizes it."""
    quantized = getattr(layer, "_weight_vars", ())
    for weight, quantizer, variables in quantized:
        found = _range(layer, quantizer, variables)
        if len(quantized) > 1 or not _short_name(weight).endswith("kernel"):
            raise ModelError(
                f"Layer {layer.name!r} quantizes {[_short_name(w) for w, *_ in quantized]}: only a layer's kernel can "
                "be translated. Use TFMOT's default 8-bit scheme."
            )
        if not found.narrow or not np.array_equal(-found.low, found.high):
            raise ModelError(
                f"Layer {layer.name!r}: the grid of its weights is not symmetric, and the integer kernels take zero "
                "point 0 only. Quantize weights with symmetric=True and narrow_range=True, as TFMOT's default does."
            )
        yield layer.layer.name, found


def _copy_weights(layer: Any, copy: keras.layers.Layer) -> None:
    """Give the Keras 3 layer the weights of the legacy layer, by name."""
    quantized = [weight for weight, *_ in getattr(layer, "_weight_vars", ())]
    values = {_RENAMED.get(n := _short_name(v), n): v for v in (*layer.weights, *quantized)}
    for variable in copy.weights:
        variable.assign(values[variable.name].numpy())


def _short_name(variable: Any) -> str:
    return str(variable.name.split(":")[0].split("/")[-1])
