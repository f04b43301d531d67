"""The quantizers of a model by tensor."""

from kquant.keras.fake_quant import FakeQuant
from kquant.keras.layer import QuantizedLayer
from kquant.keras.model import QuantizedModel

TQT = {
    "preset": "w8a8",
    "weights": {"power_of_two": True},
    "activations": {"symmetric": True, "power_of_two": True},
    "logits": None,
}


def layer_table(model: QuantizedModel) -> dict[str, QuantizedLayer]:
    return {layer.node.name: layer for layer in model.layers if isinstance(layer, QuantizedLayer)}


def outputs(model: QuantizedModel) -> dict[str, FakeQuant]:
    """The quantizers of outputs and of constants, by tensor."""
    return {name: q for layer in layer_table(model).values() for name, q in layer.quantizers.items()}


def weights(model: QuantizedModel) -> dict[str, FakeQuant]:
    found = {name: layer.weight_quantizer for name, layer in layer_table(model).items()}
    return {name: q for name, q in found.items() if q is not None}
