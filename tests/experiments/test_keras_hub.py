"""Small models of keras-hub from end to end, where it is installed."""

import keras
import pytest

pytest.importorskip("keras_hub", reason="keras-hub is in the extra dev only")

from experiments.keras_hub_models import MODELS  # noqa: E402
from experiments.keras_hub_small import samples  # noqa: E402
from experiments.passages import passage  # noqa: E402

TASKS = (
    "ViTImageClassifier",
    "SegFormerImageSegmenter",
    "RetinaNetObjectDetector",
    "BertTextClassifier",
    "BertMaskedLM",
)


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_a_task_of_each_kind_goes_through(name: str) -> None:
    keras.utils.set_random_seed(0)
    model = MODELS[name]()
    result = passage(name, model, samples(model, 8))
    assert result.parity.ok, result.parity
    assert result.sqnr > 20
