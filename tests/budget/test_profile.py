"""What files cost: bytes that add up, multiplications by their formula, latencies from tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kquant
from kquant.budget.latency import measured, this_device
from kquant.targets.litert.reader import read
from kquant.targets.litert.timing import alone, seconds, signature
from kquant_tools import profile as app
from tests.support.apps import run_app


def network(channels: int = 8, name: str = "net") -> tuple[keras.Model, np.ndarray]:
    keras.utils.set_random_seed(0)
    x = inputs = keras.Input((9, 9, 4))
    y = keras.layers.Conv2D(channels, 3, strides=2, padding="same", activation="relu", name="conv")(x)
    y = keras.layers.DepthwiseConv2D(3, padding="same", name="depthwise")(y)
    y = keras.layers.Conv2D(6, 1, name="<script>")(y)
    y = keras.layers.Conv2DTranspose(3, 3, strides=2, name="up")(y)
    y = keras.layers.Dense(5, name="head")(keras.layers.Flatten()(y))
    model = keras.Model(inputs, keras.layers.Softmax(name="softmax")(y), name=name)
    return model, np.random.default_rng(0).normal(size=(16, 9, 9, 4)).astype(np.float32)


def content(preset: str = "w8a8", channels: int = 8) -> bytes:
    model, data = network(channels)
    return kquant.export_tflite(kquant.quantize_model(model, data, preset, progress=False)).content


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    return {preset: content(preset) for preset in ("w8a8", "w4a8", "w2a8")}


def table_of(file: bytes) -> kquant.LatencyTable:
    """A table of made-up times."""
    found = {signature(op): 1e-6 * (k + 1) for k, op in enumerate(read(file).operators)}
    return kquant.LatencyTable(device="a phone", seconds={**found, "(start)": 1e-5})


def test_the_parts_add_up_to_the_size_of_the_file(files: dict[str, bytes]) -> None:
    for file in files.values():
        found = kquant.profile(file, latency=False)
        assert found.bytes == len(file) == found.structure + sum(x.bytes for x in found.layers)
        assert found.structure > 0 and all(x.bytes >= 0 for x in found.layers)
        assert found.seconds is None and found.latency_device == ""


@settings(max_examples=3, deadline=None)
@given(channels=st.integers(1, 9))
def test_multiplications_follow_the_formula(channels: int) -> None:
    found = {x.name: x for x in kquant.profile(content(channels=channels), latency=False).layers}
    assert found["conv"].macs == 5 * 5 * channels * 3 * 3 * 4
    assert found["depthwise"].macs == 5 * 5 * channels * 3 * 3
    assert found["<script>"].macs == 5 * 5 * 6 * channels
    assert found["up"].macs == 5 * 5 * 6 * 3 * 3 * 3
    assert found["head"].macs == 11 * 11 * 3 * 5
    assert found["conv"].bit_operations == found["conv"].macs * 8 * 8


@pytest.mark.parametrize(("preset", "bits"), [("w8a8", 8), ("w4a8", 4), ("w2a8", 2)])
def test_bits_are_those_of_the_integers(files: dict[str, bytes], preset: str, bits: int) -> None:
    found = {x.name: x for x in kquant.profile(files[preset], latency=False).layers}
    assert {found[n].weight_bits for n in ("conv", "depthwise", "<script>", "up", "head")} == {bits}
    assert found["softmax"].weight_bits == found["softmax"].macs == 0


def test_a_table_of_another_device_is_used_as_it_is(files: dict[str, bytes], tmp_path: Path) -> None:
    table = table_of(files["w8a8"])
    table.save(tmp_path / "phone.json")
    for latency in (table, tmp_path / "phone.json"):
        found = kquant.profile(files["w8a8"], latency=latency)
        assert found.latency_device == "a phone" and found.measured_seconds is None
        assert found.seconds == pytest.approx(1e-5 + sum(x.seconds or 0 for x in found.layers))
        assert found.seconds == pytest.approx(table.total(files["w8a8"]))
    other = kquant.profile(files["w4a8"], latency=table)
    assert other.seconds is None and "not known" in other.notes[0]
    with pytest.raises(kquant.ConfigError, match="lack .* operators"):
        table.total(files["w4a8"])


def test_latencies_are_measured_once_and_kept(files: dict[str, bytes], tmp_path: Path) -> None:
    path = tmp_path / "kept" / "latency.json"
    first = measured([files["w8a8"]], cache=path)
    assert first.device == this_device() and not first.missing(read(files["w8a8"]).operators)
    kept = json.loads(path.read_text())["seconds"]
    assert measured([files["w8a8"]], cache=path).seconds == kept == first.seconds
    found = kquant.profile(files["w8a8"], cache=path)
    assert found.seconds == pytest.approx(first.total(files["w8a8"])) and found.measured_seconds is not None
    assert found.measured_seconds > 0
    table_of(files["w8a8"]).save(path)
    with pytest.raises(kquant.ConfigError, match="a phone"):
        measured([files["w8a8"]], cache=path)


def test_an_operator_runs_alone_and_has_one_signature(files: dict[str, bytes]) -> None:
    """Wherever it is: its values do not matter, its shape does."""
    first, second = (read(content(channels=c)).operators for c in (8, 9))
    again = read(files["w8a8"]).operators
    assert [signature(op) for op in first] == [signature(op) for op in again]
    assert signature(first[0]) != signature(second[0])
    (op,) = read(alone(first[0])).operators
    assert signature(op) == signature(first[0])
    assert seconds(alone(first[0])) > 0


def test_models_and_paths(files: dict[str, bytes], tmp_path: Path) -> None:
    model, data = network()
    qmodel = kquant.quantize_model(model, data, {"preset": "w8a8", "target": "tflm"}, progress=False)
    assert kquant.profile(qmodel, latency=False).target == "tflm"
    (tmp_path / "m.tflite").write_bytes(files["w8a8"])
    found = kquant.profile(tmp_path / "m.tflite", latency=False)
    assert found.name == "m" and found.bytes == len(files["w8a8"])
    in_float = kquant.profile(model, latency=False)
    assert in_float.bytes > 1.5 * found.bytes and in_float.macs == found.macs
    with pytest.raises(kquant.ModelError, match="int"):
        kquant.profile(3)  # type: ignore[arg-type]


def test_the_arena_is_that_of_the_interpreter() -> None:
    pytest.importorskip("tflite_micro", reason="TensorFlow Lite Micro is not installed: pip install .[tflm]")
    from kquant.targets.tflm.runtime import arena

    file = content()
    (device,) = kquant.profile(file, "tflm").devices
    assert device.memory == arena(file).total and not device.estimated and device.flash == len(file)


def test_what_the_compiler_guesses_is_called_an_estimate() -> None:
    pytest.importorskip("ethosu.vela", reason="Vela is not installed: pip install .[ethos-u]")
    model, data = network()
    qmodel = kquant.quantize_model(model, data, {"preset": "w8a8", "target": "ethos_u"}, progress=False)
    found = kquant.profile(qmodel)
    assert all(d.estimated and d.cycles for d in found.devices)
    assert "estimate" in str(found) and sum(x.cycles or 0 for x in found.layers) > 0


def test_text_json_and_page(files: dict[str, bytes], tmp_path: Path) -> None:
    found = kquant.profile(files["w4a8"], latency=table_of(files["w4a8"]))
    assert kquant.Profile.from_json(found.to_json()) == found
    assert f"{found.bytes:,} bytes" in str(found) and "(structure of the file)" in str(found)
    found.save_html(tmp_path / "p.html")
    page = (tmp_path / "p.html").read_text()
    assert "<script>" not in page and "&lt;script&gt;" in page and page.count('class="bar"') >= 4 * len(found.layers)


def test_the_app(files: dict[str, bytes], tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "m.tflite").write_bytes(files["w8a8"])
    table_of(files["w8a8"]).save(tmp_path / "phone.json")
    paths = {"json": tmp_path / "p.json", "html": tmp_path / "p.html"}
    options = {"model": tmp_path / "m.tflite", "latencies": tmp_path / "phone.json", "measure": False}
    assert run_app(app, **options, **paths) == 0
    assert "a phone" in capsys.readouterr().out and all(p.exists() for p in paths.values())
    assert kquant.Profile.from_json(paths["json"].read_text()).bytes == len(files["w8a8"])
    assert run_app(app, model="nothing.tflite", measure=False) == 1
