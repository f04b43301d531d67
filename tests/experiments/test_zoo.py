"""The evaluation data is read as the models need it: the float models reach the accuracy on record."""

import numpy as np
import pytest

from experiments import zoo
from kquant_tools.evaluate import evaluate, keras_predict


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in zoo.MODELS if n != "resnet56"])  # reads what resnet20 reads
def test_float_accuracy_on_all_evaluation_samples(name):
    predict = keras_predict(zoo.load_model(name))
    score = evaluate({"float": predict}, zoo.MODELS[name].evaluation(None))["float"]
    assert 100 * score.accuracy == pytest.approx(zoo.MODELS[name].top1, abs=0.16)  # 2 of 1300 images


@pytest.mark.slow
@pytest.mark.parametrize("name", zoo.MODELS)
def test_calibration_inputs_are_those_of_the_evaluation(name):
    x = zoo.MODELS[name].calibration(64)
    x = x if isinstance(x, np.ndarray) else np.concatenate(list(x))
    scored, _ = next(iter(zoo.MODELS[name].evaluation(64)))
    assert len(x) == 64 and x.shape[1:] == scored.shape[1:] and x.dtype == scored.dtype == np.float32
    assert abs(x.mean() - scored.mean()) < 0.5 * scored.std()
    assert 0.5 < x.std() / scored.std() < 2
