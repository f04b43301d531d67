"""What hardware computes, stores and runs."""

from kquant.targets.ethos_u.target import ETHOS_U
from kquant.targets.litert.target import LITERT, LITERT_PER_TENSOR, SIMULATION
from kquant.targets.target import Target, get_target, register_target
from kquant.targets.tflm.target import TFLM

register_target(LITERT, also=("tflite_int8", "tflite_int16x8"))  # names of before
register_target(LITERT_PER_TENSOR, also=("tflite_int8_per_tensor",))
register_target(TFLM)
register_target(ETHOS_U)
register_target(SIMULATION)

__all__ = ["Target", "get_target", "register_target"]
