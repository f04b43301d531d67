"""Data sources of the command line."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import kquant
from kquant_tools.data import PREPROCESS, load_data, spread


def inputs(*shapes: tuple[int | None, ...], names: tuple[str, ...] = ("image", "other")) -> list[SimpleNamespace]:
    return [SimpleNamespace(name=name, shape=shape) for name, shape in zip(names, shapes, strict=False)]


GREY = inputs((None, 2, 2, 1))


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def encoded(path: Path, pictures: list[Image.Image], **more: np.ndarray) -> str:
    """An .npz of encoded pictures (PNG, so that decoding is exact)."""
    files = []
    for image in pictures:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        files.append(buffer.getvalue())
    offsets = np.cumsum([0, *map(len, files)])
    np.savez(path, jpeg=np.frombuffer(b"".join(files), np.uint8), offsets=offsets, **more)
    return str(path)


@pytest.mark.parametrize("keys", [("x", "y"), ("images", "labels")])
def test_npz_gives_batches_in_order_and_can_be_read_again(tmp_path, keys):
    x, y = np.arange(40, dtype=np.float32).reshape(10, 2, 2, 1), np.arange(10)
    np.savez(tmp_path / "d.npz", **dict(zip(keys, (x, y), strict=True)))
    data = load_data(str(tmp_path / "d.npz"), GREY, batch_size=4)
    for _ in range(2):
        batches = list(data)
        assert [len(b[0]) for b in batches] == [4, 4, 2]
        np.testing.assert_array_equal(np.concatenate([b[0] for b in batches]), x)
        np.testing.assert_array_equal(np.concatenate([b[1] for b in batches]), y)


def test_npy_and_unlabelled_data_give_bare_arrays(tmp_path):
    x = np.arange(12, dtype=np.float32).reshape(3, 2, 2, 1)
    np.save(tmp_path / "d.npy", x)
    np.savez(tmp_path / "d.npz", x=x, y=np.arange(3))
    for name in ("d.npy", "d.npz"):
        (batch,) = load_data(str(tmp_path / name), GREY, labels=False)
        np.testing.assert_array_equal(batch, x)


def test_several_inputs_come_by_name(tmp_path):
    image, other = np.ones((3, 2, 2, 1), np.float32), np.arange(6).reshape(3, 2)
    np.savez(tmp_path / "d.npz", image=image, other=other)
    (batch,) = load_data(str(tmp_path / "d.npz"), inputs((None, 2, 2, 1), (None, 2)))
    np.testing.assert_array_equal(batch["image"], image)
    np.testing.assert_array_equal(batch["other"], other)
    assert batch["other"].dtype == other.dtype  # ids stay integers


def test_encoded_images_equal_pillows(tmp_path):
    pictures = [picture(6, 4, seed) for seed in range(5)]
    path = encoded(tmp_path / "d.npz", pictures, labels=np.arange(5))
    ((x, y),) = load_data(path, inputs((None, 4, 6, 3)))
    np.testing.assert_array_equal(x, np.stack([np.asarray(p, np.float32) for p in pictures]))
    np.testing.assert_array_equal(y, np.arange(5))
    assert x.dtype == np.float32


def test_crop_cuts_the_centre_and_stretch_resizes(tmp_path):
    image = picture(7, 7)
    path, model = encoded(tmp_path / "d.npz", [image]), inputs((None, 4, 4, 3))
    (cropped,) = load_data(path, model, fit="crop")
    np.testing.assert_array_equal(cropped[0], np.asarray(image, np.float32)[1:5, 1:5])
    (stretched,) = load_data(path, model)
    np.testing.assert_array_equal(stretched[0], np.asarray(image.resize((4, 4), Image.Resampling.BILINEAR), np.float32))
    with pytest.raises(kquant.CalibrationError, match="too small to crop"):
        list(load_data(path, inputs((None, 8, 8, 3)), fit="crop"))


def test_folder_of_classes(tmp_path):
    for k, name in enumerate(("cat", "ant", "bee")):
        (tmp_path / name).mkdir()
        picture(2, 2, k).save(tmp_path / name / "a.png")
    (tmp_path / "bee" / "notes.txt").write_text("not an image")
    ((x, y),) = load_data(str(tmp_path), inputs((None, 2, 2, 3)))
    np.testing.assert_array_equal(y, [0, 1, 2])
    np.testing.assert_array_equal(x, np.stack([np.asarray(picture(2, 2, k), np.float32) for k in (1, 2, 0)]))


def test_flat_folder_and_grey_model(tmp_path):
    picture(2, 2).save(tmp_path / "a.png")
    (x,) = load_data(str(tmp_path), GREY)
    np.testing.assert_array_equal(x[0, :, :, 0], np.asarray(picture(2, 2).convert("L"), np.float32))


def test_preprocessing_maps_the_ends_of_the_range():
    ends = np.array([0, 255], np.float32).reshape(2, 1, 1, 1) * np.ones(3, np.float32)
    np.testing.assert_array_equal(PREPROCESS["none"](ends), ends)
    np.testing.assert_allclose(PREPROCESS["unit"](ends)[:, 0, 0, 0], [0, 1])
    np.testing.assert_allclose(PREPROCESS["tf"](ends)[:, 0, 0, 0], [-1, 1])
    np.testing.assert_allclose(PREPROCESS["torch"](ends)[0, 0, 0], [-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225])
    np.testing.assert_allclose(PREPROCESS["torch"](ends)[1, 0, 0], [0.515 / 0.229, 0.544 / 0.224, 0.594 / 0.225])
    assert all(f(ends).dtype == np.float32 for f in PREPROCESS.values())


def halve(x):
    return x / 2


def stream():
    yield np.full((3, 2, 2, 1), 8.0), np.arange(3)
    yield np.full((3, 2, 2, 1), 4.0), np.arange(3, 6)
    raise AssertionError("read further than the limit")


def test_functions_give_batches_and_preprocessing():
    data = load_data(f"{__name__}:stream", GREY, preprocess=f"{__name__}:halve", limit=5)
    for _ in range(2):
        (a, ya), (b, yb) = data
        assert (a.shape[0], b.shape[0], a.max(), b.max()) == (3, 2, 4.0, 2.0)
        np.testing.assert_array_equal(np.concatenate([ya, yb]), np.arange(5))
    assert isinstance(next(iter(load_data(f"{__name__}:stream", GREY, labels=False))), np.ndarray)


@pytest.mark.parametrize(("count", "limit"), [(10, None), (10, 10), (10, 20), (10, 3), (1000, 7), (5, 1)])
def test_a_limit_is_spread_evenly(count, limit):
    numbers = spread(count, limit)
    assert len(numbers) == min(limit or count, count)
    assert numbers[0] == 0 and numbers[-1] < count
    gaps = np.diff(numbers)
    assert len(gaps) == 0 or (gaps.min() >= 1 and gaps.max() - gaps.min() <= 1)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("missing.npz", {}, "no file or folder"),
        ("words.txt", {}, "neither"),
        ("broken.npz", {}, "Cannot read"),
        ("other.npz", {}, "the model needs x or images"),
        ("empty.npy", {}, "no sample"),
        ("good.npy", {"preprocess": "imagenet"}, "Unknown preprocessing 'imagenet'"),
        ("good.npy", {"limit": 0}, "limit must be at least 1"),
        ("good.npy", {"fit": "pad"}, "Unknown fit 'pad'"),
        ("nowhere.at_all:batches", {}, "Cannot import"),
        ("os:no_such_function", {}, "Cannot import"),
    ],
)
def test_bad_sources_are_named(tmp_path, monkeypatch, source, options, message):
    monkeypatch.chdir(tmp_path)
    Path("words.txt").write_text("x")
    Path("broken.npz").write_text("this is no zip file")
    np.savez("other.npz", a=np.zeros(3))
    np.save("empty.npy", np.zeros((0, 2, 2, 1)))
    np.save("good.npy", np.zeros((1, 2, 2, 1)))
    with pytest.raises(kquant.CalibrationError, match=message):
        load_data(source, GREY, **options)


def test_an_undecodable_image_is_named(tmp_path):
    np.savez(tmp_path / "d.npz", jpeg=np.zeros(9, np.uint8), offsets=np.array([0, 9]))
    with pytest.raises(kquant.CalibrationError, match="Cannot decode"):
        list(load_data(str(tmp_path / "d.npz"), GREY))
