"""What to quantize and how: frozen settings, without TensorFlow."""

from kquant.config.pruning import Prune
from kquant.config.quant_config import PRESETS, QuantConfig
from kquant.config.specs import AdaRound, QuantSpec, Rule, Training

__all__ = ["PRESETS", "AdaRound", "Prune", "QuantConfig", "QuantSpec", "Rule", "Training"]
