"""Pictures show what two networks see, and where they differ."""

import base64
import io
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers
from PIL import Image

from kquant.diagnosis.drawing import COVER, colour, draw_boxes, draw_mask
from kquant.diagnosis.metrics import make_metric
from kquant.diagnosis.pictures import DIFFERENT, SHOWN, pictures
from kquant.diagnosis.samples import Samples

RNG = np.random.default_rng(7)
IMAGES = RNG.uniform(-1, 1, (6, 24, 32, 3)).astype(np.float32)


def decoded(content: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content)))).astype(int)


def network(gain: float = 1.0, mask: bool = True) -> keras.Model:
    """Class 1 where gain * red is above green, else class 0."""
    inputs = keras.Input((24, 32, 3))
    x = layers.Conv2D(2, 1, use_bias=False)(inputs)
    model = keras.Model(inputs, keras.ops.argmax(x, -1) if mask else x)
    model.set_weights([np.array([[[[0, gain], [1, 0], [0, 0]]]], np.float32)])
    return model


def samples(labels: Any = None) -> Samples:
    return Samples(((IMAGES,),), labels, ("image",), ("mask",))


@pytest.mark.parametrize("kind", ["agreement", "mean_iou:2", {"mask": "pixel_accuracy:2"}])
@pytest.mark.parametrize("mask", [True, False])
def test_the_samples_that_differ_most_come_first(kind: Any, mask: bool) -> None:
    labels = RNG.integers(0, 2, (6, 24, 32))
    metric = make_metric(kind, samples({"mask": labels} if isinstance(kind, dict) else labels), network(mask=mask))
    found = pictures(metric, network(2.0, mask))
    share = np.mean((IMAGES[..., 0] > IMAGES[..., 1]) != (2 * IMAGES[..., 0] > IMAGES[..., 1]), (1, 2))
    assert len(found) == SHOWN
    assert [p.sample for p in found] == np.argsort(-share, kind="stable")[:SHOWN].tolist()
    np.testing.assert_allclose([p.differs for p in found], np.sort(share)[::-1][:SHOWN])
    for picture in found:
        for content in (picture.image, picture.float_drawn, picture.quantized_drawn, picture.difference):
            assert decoded(content).shape == (24, 32, 3)


def test_equal_networks_have_equal_pictures() -> None:
    metric = make_metric("agreement", samples(), network())
    for picture in pictures(metric, network()):
        assert picture.differs == 0 and picture.float_drawn == picture.quantized_drawn
        assert decoded(picture.difference).min() > 140  # pale, and no mark


def test_what_differs_is_marked() -> None:
    image = np.full((1, 24, 32, 3), 0.5, np.float32)
    image[0, :, 16:, 1] = -0.8
    metric = make_metric("agreement", Samples(((image,),), None, ("image",), ("mask",)), network())
    (picture,) = pictures(metric, network(-2.0))  # 0 and 1 become 0 and 0
    marked = decoded(picture.difference)
    assert np.abs(marked[:, 18:] - DIFFERENT).max() < 40
    assert np.abs(marked[:, :14] - DIFFERENT).max(-1).min() > 100


def test_networks_that_name_a_class_or_make_images_have_none() -> None:
    inputs = keras.Input((24, 32, 3))
    classifier = keras.Model(inputs, layers.Dense(3)(layers.GlobalAveragePooling2D()(inputs)))
    assert pictures(make_metric("agreement", samples(), classifier), classifier) == ()
    filtered = keras.Model(inputs, layers.Conv2D(3, 3, padding="same")(inputs))
    assert pictures(make_metric("sqnr", samples(), filtered), filtered) == ()


def test_a_mask_has_the_colours_of_its_classes() -> None:
    black, classes = np.zeros((20, 30, 3), np.uint8), RNG.integers(0, 5, (20, 30))
    drawn = draw_mask(black, [classes])
    np.testing.assert_allclose(drawn, COVER * np.array([colour(k) for k in range(5)])[classes], atol=0.5)
    np.testing.assert_array_equal(draw_mask(black, [np.eye(5)[classes]]), drawn)
    assert len({colour(k) for k in range(40)}) == 40


def test_boxes_are_drawn_where_they_are_if_plausible() -> None:
    black = np.zeros((30, 40, 3), np.uint8)
    drawn = draw_boxes(black, np.array([[5, 6, 25, 20, 2, 0.9], [0, 0, 40, 30, 1, 0.1]]))
    rows, columns = np.nonzero(drawn.any(-1))
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (6, 19, 5, 24)
    assert tuple(drawn[6, 5]) == colour(2) and not drawn[10:16, 10:20].any()
    np.testing.assert_array_equal(draw_boxes(black, np.zeros((0, 6))), black)
