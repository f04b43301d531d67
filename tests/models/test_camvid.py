"""Street scenes: the boxes of masks, what training sees, and what detectors' outputs say."""

import numpy as np
import pytest

from models import camvid, camvid_detector, camvid_segmenter

RNG = np.random.default_rng(1)


def mask_of(*shapes: tuple[str, slice, slice], fill: str = "road") -> np.ndarray:
    """A mask with rectangles (class, rows, columns)."""
    mask = np.full((camvid.HEIGHT, camvid.WIDTH), camvid.CLASSES.index(fill), np.uint8)
    for name, rows, columns in shapes:
        mask[rows, columns] = camvid.CLASSES.index(name)
    return mask


def test_boxes_are_those_of_connected_components_largest_first() -> None:
    mask = mask_of(
        ("pedestrian", np.s_[50:90], np.s_[10:30]),
        ("car", np.s_[100:150], np.s_[60:160]),
        ("car", np.s_[20:25], np.s_[100:106]),  # 30 pixels: too small to be asked for
        ("building", np.s_[0:20], np.s_[0:200]),  # has no box
    )
    mask[150, 160] = camvid.CLASSES.index("car")  # touches at a corner
    boxes = camvid.boxes_of(mask)
    assert boxes[:3].tolist() == [[60, 100, 161, 151, 0, 0], [10, 50, 30, 90, 1, 0], [100, 20, 106, 25, 0, 1]]
    assert boxes.shape == (camvid.MOST, 6) and (boxes[3:] == -1).all()


def test_images_and_masks_change_together() -> None:
    mask = RNG.integers(0, 11, (9, 12)).repeat(20, 0).repeat(20, 1).astype(np.uint8)
    image = (mask[..., None] * np.array([20, 10, 0]) + 30).astype(np.uint8)
    sizes = set()
    for seed in range(12):
        pixels, changed = camvid.augmented(image, mask, np.random.default_rng(seed))
        assert pixels.shape == image.shape and changed.shape == mask.shape
        known = changed != camvid.VOID
        # brightness and contrast are one line for all pixels, as far as they are not at an edge or cut off
        red, expected = pixels[..., 0][known].astype(float), changed[known].astype(float)
        middle = (red > 0) & (red < 255)
        fit = np.polyfit(expected[middle], red[middle], 1)
        assert np.median(np.abs(np.polyval(fit, expected[middle]) - red[middle])) < 3
        sizes.add(int(known.sum()))
    assert len(sizes) > 3


def test_the_distances_of_targets_are_the_boxes() -> None:
    """Outputs that equal the targets decode to the boxes of the mask."""
    mask = mask_of(
        ("car", np.s_[60:150], np.s_[60:190]),
        ("bicyclist", np.s_[30:62], np.s_[10:26]),
        ("pedestrian", np.s_[20:36], np.s_[210:220]),
    )
    targets = camvid_detector.targets(mask[None])
    assert {name: y.shape[1:] for name, y in targets.items()} == {"boxes": (918, 5), "scores": (918, 4)}
    distances, objects = targets["boxes"][..., :4], targets["boxes"][..., 4]
    assert objects.sum() > 3 and (targets["scores"][..., :3].sum(-1) == objects).all()
    outputs = [np.log(np.maximum(distances, 1e-3)), 20 * targets["scores"][..., :3] - 10]
    (found,) = camvid_detector.decode(outputs)
    expected = camvid.boxes_of(mask)
    expected = expected[expected[:, 4] >= 0]
    assert len(found) == len(expected) == 3
    for box in expected:
        nearest = found[np.abs(found[:, :4] - box[:4]).sum(-1).argmin()]
        np.testing.assert_allclose(nearest[:5], box[:5], atol=1e-3)
    assert camvid_detector.metric()(camvid.boxes_of(mask)[None], outputs) == pytest.approx(100)


def test_large_things_are_seen_by_coarse_levels_and_tiny_ones_are_left_out() -> None:
    _, strides = camvid_detector.places()
    sizes = {8: 20, 16: 90, 32: 178}
    for stride, size in sizes.items():
        mask = mask_of(("car", np.s_[1 : 1 + size], np.s_[20 : 20 + size]))
        objects = camvid_detector.targets(mask[None])["boxes"][0, :, 4]
        assert set(strides[objects > 0]) == {stride}
    tiny = camvid_detector.targets(mask_of(("car", np.s_[80:85], np.s_[80:86]))[None])
    assert tiny["boxes"][..., 4].sum() == 0 and (tiny["scores"][..., 3] == 0).sum() >= 1


def test_losses_of_outputs() -> None:
    targets = camvid_detector.targets(mask_of(("car", np.s_[60:150], np.s_[60:190]))[None])
    right = np.log(np.maximum(targets["boxes"][..., :4], 1e-3)).astype(np.float32)
    assert float(camvid_detector.box_loss(targets["boxes"], right)) == pytest.approx(0, abs=1e-5)
    # a box of half the width and height around each place: IoU 1/4, and the union is the hull
    half = right - np.float32(np.log(2))
    assert float(camvid_detector.box_loss(targets["boxes"], half)) == pytest.approx(0.75, abs=1e-4)
    sure = np.where(targets["scores"][..., :3] > 0, 20, -20).astype(np.float32)
    assert float(camvid_detector.score_loss(targets["scores"], sure)) < 1e-6
    undecided = float(camvid_detector.score_loss(targets["scores"], 0 * sure))
    wanted, counts = targets["scores"][..., :3], targets["scores"][..., 3:]
    expected = np.sum(counts * (0.75 - 0.5 * wanted) * 0.25 * np.log(2)) / wanted.sum()
    assert undecided == pytest.approx(expected, rel=1e-5)


def test_scenes_of_the_evaluation_data() -> None:
    scenes = camvid.load("test")
    assert scenes.images.shape == (233, 180, 240, 3) and scenes.masks.shape == (233, 180, 240)
    assert scenes.masks.max() == camvid.VOID and scenes.inputs.min() >= -1 and scenes.inputs.max() <= 1
    boxes = scenes.boxes
    assert boxes.shape == (233, camvid.MOST, 6) and np.sum((boxes[..., 4] >= 0) & (boxes[..., 5] == 0)) == 719


def test_batches_of_both_recipes() -> None:
    images, classes, weights = next(camvid_segmenter.batches(1, 1, limit=8))
    assert images.shape == (8, 180, 240, 3) and classes["logits"].max() < 11
    assert weights["logits"].shape == classes["logits"].shape
    assert np.unique(weights["logits"]).size <= 12 and (weights["logits"] == 0).any()
    again = next(camvid_segmenter.batches(1, 1, limit=8))
    np.testing.assert_array_equal(images, again[0])
    images, targets = next(camvid_detector.batches(1, 1, limit=8))
    assert {name: y.shape for name, y in targets.items()} == {"boxes": (8, 918, 5), "scores": (8, 918, 4)}


def test_class_weights_are_one_on_average_and_nothing_for_void() -> None:
    masks = np.repeat(np.arange(12), np.arange(1, 13) ** 2).astype(np.uint8)
    weights, counts = camvid_segmenter.class_weights(masks), np.arange(1, 12) ** 2
    assert weights[camvid.VOID] == 0
    assert np.average(weights[:11], weights=counts) == pytest.approx(1)
    np.testing.assert_allclose(weights[:11] * np.sqrt(counts), weights[0], rtol=1e-5)
