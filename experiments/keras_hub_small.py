"""How models of keras-hub are built small, with random weights, and the data for them.

They have the structure of the published ones, a few layers of a few channels, and inputs of open sizes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

VOCABULARY, LENGTH, SIDE = 40, 12, 32

# By name of the parameter, for whatever has it
SMALL: dict[str, Any] = {
    "vocabulary_size": VOCABULARY,
    "num_layers": 1,
    "num_heads": 2,
    "num_query_heads": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "head_size": 8,
    "hidden_dim": 16,
    "hidden_size": 16,
    "embedding_dim": 16,
    "intermediate_dim": 32,
    "mlp_dim": 32,
    "max_sequence_length": 16,
    "patch_size": 8,
    "moe_intermediate_dim": 16,
    "shared_expert_intermediate_dim": 16,
    "shared_expert_intermediate_size": 16,
    "num_experts": 2,
    "top_k": 1,
    "expert_intermediate_dim": 16,
    "projection_dim": 8,
}

# By name of the input, its open sizes, where they are neither a length nor the side of an image
OPEN: dict[str, tuple[int, ...]] = {
    "points": (2,),
    "labels": (2,),
    "boxes": (1,),
    "box_labels": (1,),
    "masks": (1, 8, 8),
    "encoder_input_values": (2048,),
}


def small(build: Any, **own: Any) -> Any:
    """An object of keras-hub with small sizes.

    Args:
        build: its class.
        own: arguments besides `SMALL`.
    """
    known = {k: v for k, v in SMALL.items() if k in inspect.signature(build.__init__).parameters}
    return build(**{**known, **own})


def samples(model: keras.Model, count: int, seed: int = 0) -> Any:
    """Random inputs of a model, by name, or the only one: ids with padding at the end, images of 0 to 1.

    Args:
        model: of keras-hub.
        count: samples.
        seed: of the numbers.
    """
    rng = np.random.default_rng(seed)
    lengths = rng.integers(LENGTH // 2, LENGTH + 1, count)
    found: dict[str, np.ndarray] = {}
    for tensor in model.inputs:
        name, integers = tensor.name, "int" in str(tensor.dtype)
        if name in OPEN:
            tensor = keras.KerasTensor((None, *OPEN[name], *tensor.shape[len(OPEN[name]) + 1 :]), tensor.dtype)
        if "mask" in name and len(tensor.shape) == 2:
            found[name] = (np.arange(LENGTH) < lengths[:, None]).astype(str(tensor.dtype))
        elif integers or "bool" in str(tensor.dtype):
            limit = VOCABULARY if "token" in name else LENGTH if "position" in name else 2
            found[name] = rng.integers(0, limit, (count, *_sizes(tensor.shape, LENGTH))).astype("int32")
        else:
            found[name] = rng.random((count, *_sizes(tensor.shape, SIDE)), "float32")
    return found if len(found) > 1 else next(iter(found.values()))


def _sizes(shape: Any, size: int) -> tuple[int, ...]:
    return tuple(size if d is None else d for d in shape[1:])


def models() -> Any:
    """`keras_hub.models`, which is imported when it is used."""
    import keras_hub

    return keras_hub.models


def named(name: str, **own: Any) -> Callable[[], Any]:
    """What builds the small model of a class of keras-hub."""
    return lambda: small(getattr(models(), name), **{k: v() if callable(v) else v for k, v in own.items()})


IMAGE = {"image_shape": (SIDE, SIDE, 3)}
HGNET = {
    "stem_channels": [3, 8, 8],
    "stackwise_stage_filters": [[8, 8, 16, 1, 3, 3], [16, 8, 16, 1, 3, 3], [16, 8, 16, 1, 3, 5], [16, 8, 16, 1, 3, 5]],
    "apply_downsample": [False, True, True, True],
    "use_lightweight_conv_block": [False, False, True, True],
    "depths": [1, 1, 1, 1],
    "hidden_sizes": [16, 16, 16, 16],
    "embedding_size": 8,
    "use_learnable_affine_block": True,
    "hidden_act": "relu",
}
VITDET = named(
    "ViTDetBackbone", num_layers=2, global_attention_layer_indices=[1], window_size=2, num_output_channels=8, **IMAGE
)
