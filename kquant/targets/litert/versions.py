"""Operator versions: the least that tells an older runtime that it lacks the kernel.

Source: GetBuiltinOperatorVersion in LiteRT's op_version.cc, except for FULLY_CONNECTED with
per-channel int8 weights, where that function answers 4 although runtimes before version 12 use the
first scale for all channels.
"""

from __future__ import annotations

from collections.abc import Mapping

# builtin -> versions for (float32, int8, int16) data
_BY_TYPE: Mapping[str, tuple[int, int, int]] = {
    "ADD": (1, 2, 3),
    "AVERAGE_POOL_2D": (1, 2, 3),
    "CONCATENATION": (1, 2, 3),
    "CONV_2D": (1, 3, 4),
    "DEPTHWISE_CONV_2D": (1, 3, 5),
    "DEQUANTIZE": (3, 2, 3),  # float here is float16
    "FULLY_CONNECTED": (1, 4, 7),
    "GATHER": (1, 2, 4),
    "GELU": (1, 2, 2),
    "LEAKY_RELU": (1, 1, 2),
    "LOGISTIC": (1, 2, 3),
    "MAXIMUM": (1, 2, 4),
    "MAX_POOL_2D": (1, 2, 3),
    "MEAN": (1, 2, 3),
    "MINIMUM": (1, 2, 4),
    "MIRROR_PAD": (1, 2, 3),
    "MUL": (1, 2, 4),
    "PAD": (1, 2, 3),
    "PADV2": (1, 2, 3),
    "REDUCE_MAX": (1, 2, 3),
    "RELU": (1, 2, 3),
    "RELU6": (1, 2, 3),
    "RESIZE_BILINEAR": (1, 2, 4),
    "RESIZE_NEAREST_NEIGHBOR": (1, 2, 4),
    "SOFTMAX": (1, 2, 3),
    "STRIDED_SLICE": (1, 2, 1),
    "SUB": (1, 2, 5),
    "TANH": (1, 2, 3),
    "TRANSPOSE": (1, 2, 5),
    "TRANSPOSE_CONV": (3, 3, 3),
}
_COLUMN = {"INT8": 1, "UINT8": 1, "INT16": 2}
# (builtin, type of the data, type of the weights) -> version
_BY_WEIGHTS: Mapping[tuple[str, str, str], int] = {
    ("CONV_2D", "INT8", "INT4"): 7,
    ("CONV_2D", "INT16", "INT4"): 7,
    ("CONV_2D", "FLOAT32", "INT8"): 5,
    ("DEPTHWISE_CONV_2D", "INT8", "INT4"): 7,
    ("DEPTHWISE_CONV_2D", "FLOAT32", "INT8"): 6,
    ("FULLY_CONNECTED", "INT8", "INT4"): 10,
    ("FULLY_CONNECTED", "INT16", "INT4"): 10,
    ("FULLY_CONNECTED", "INT8", "INT2"): 13,
    ("FULLY_CONNECTED", "FLOAT32", "INT8"): 9,
    ("DEQUANTIZE", "INT4", ""): 6,
}


def op_version(
    builtin: str,
    dtype: str,
    weight_dtype: str = "",
    *,
    per_channel: bool = False,
    rank: int = 0,
    half_pixel_centers: bool = False,
    keep_num_dims: bool = False,
    dilated: bool = False,
) -> int:
    """The version to write.

    Args:
        builtin: the schema's name of the operator.
        dtype: type of the data that it reads (QUANTIZE: that it makes).
        weight_dtype: type of its weights, if it has any.
        per_channel: whether those (or the data of DEQUANTIZE) have a scale per channel.
        rank: of the data.
        half_pixel_centers, keep_num_dims, dilated: its options.
    """
    if builtin == "QUANTIZE":
        return 2 if dtype == "INT16" else 1
    plain = _BY_TYPE.get(builtin, (1, 1, 1))[_COLUMN.get(dtype, 0)]
    version = _BY_WEIGHTS.get((builtin, dtype, weight_dtype), plain)
    least = 1
    if builtin == "FULLY_CONNECTED":
        least = 12 if per_channel else 5 if keep_num_dims else 1
    elif builtin == "DEQUANTIZE" and per_channel:
        least = 5
    elif builtin == "DEPTHWISE_CONV_2D" and dilated:
        least = 2
    elif builtin.startswith("RESIZE_") and half_pixel_centers:
        least = 3
    elif builtin in ("PAD", "PADV2", "TRANSPOSE", "STRIDED_SLICE") and rank > 4:
        least = 6 if builtin == "TRANSPOSE" and rank > 5 else 4
    return max(version, least)
