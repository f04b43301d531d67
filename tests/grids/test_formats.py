"""Grids with a table: what each way of making one minimizes, against brute force and closed forms."""

import itertools

import numpy as np
import pytest

from kquant.config.quant_config import QuantConfig
from kquant.config.specs import WEIGHTS, QuantSpec
from kquant.errors import ConfigError
from kquant.grids.formats import weight_grid
from kquant.grids.formats.binary_bases import bases_design
from kquant.grids.grid import Grid, dequantize, fake_quantize, nearest, quantize
from kquant.targets.target import get_target

RNG = np.random.default_rng(0)


def spec(**changes) -> QuantSpec:
    return WEIGHTS.override(changes)


def error(w, grid):
    return np.square(fake_quantize(w, grid) - w, dtype=np.float64)


def a_grid(table, scale=0.5, zero_point=0, axis=None, **blocks):
    table = np.asarray(table, np.int32)
    zeros = np.full(np.shape(scale)[:1], zero_point, np.int32)
    return Grid(np.float32(scale), zeros, int(table.min()), int(table.max()), axis, table, **blocks)


def test_values_go_to_the_nearest_allowed_integer():
    grid = a_grid([-9, -2, 0, 1, 7], zero_point=1)
    x = RNG.normal(size=400).astype(np.float32) * 4
    allowed = 0.5 * (np.array([-9, -2, 0, 1, 7]) - 1)
    want = allowed[np.argmin(np.abs(x[:, None] - allowed), axis=1)]
    np.testing.assert_array_equal(fake_quantize(x, grid), want.astype(np.float32))
    np.testing.assert_array_equal(dequantize(quantize(x, grid), grid), fake_quantize(x, grid))
    assert np.isin(quantize(x, grid), grid.table).all()


def test_of_two_that_are_equally_near_the_lower_is_taken():
    np.testing.assert_array_equal(nearest(np.float32([0.5, 1.5, -0.5]), [-1.0, 0.0, 1.0, 2.0]), [0, 1, -1])


@pytest.mark.parametrize("axis, block_axis", [(0, 1), (1, 0), (2, 0)])
def test_channels_and_blocks_have_tables_and_scales_of_their_own(axis, block_axis):
    """Each part of the tensor, quantized alone, gives the same."""
    shape = (5, 7, 3)
    x, channels, blocks = RNG.normal(size=shape).astype(np.float32), shape[axis], -(-shape[block_axis] // 2)
    table = np.sort(RNG.integers(-20, 20, (channels, blocks, 4)), axis=-1)
    scale = RNG.uniform(0.05, 0.2, (channels, blocks))
    grid = a_grid(table, scale, axis=axis, block=2, block_axis=block_axis)
    whole = fake_quantize(x, grid)
    for c in range(channels):
        for b in range(blocks):
            part = [slice(None)] * 3
            part[axis], part[block_axis] = slice(c, c + 1), slice(2 * b, 2 * b + 2)
            alone = Grid(np.float32(scale[c, b]), np.int32(0), int(table[c, b].min()), int(table[c, b].max()),
                         table=table[c, b].astype(np.int32))  # fmt: skip
            np.testing.assert_array_equal(whole[tuple(part)], fake_quantize(x[tuple(part)], alone))


def test_bits_are_those_of_a_code_and_width_those_of_the_integers():
    assert (a_grid([-1, 0, 1]).bits, a_grid([-1, 0, 1]).width) == (2, 2)
    assert (a_grid([-100, 0, 1, 90]).bits, a_grid([-100, 0, 1, 90]).width) == (2, 8)
    uniform = weight_grid(RNG.normal(size=(9, 4)), spec(bits=4), 1)
    assert (uniform.bits, uniform.width, uniform.container) == (4, 4, 8)
    assert uniform.entropy([0, 0, 1, 1]) == 1.0 and uniform.entropy([3, 3, 3]) == 0.0
    assert a_grid([-1, 0, 1]).entropy([-1, 0, 1]) == pytest.approx(np.log2(3))


def test_ternary_has_the_least_squared_error_of_all_scales():
    w = RNG.standard_t(4, size=(300, 5)).astype(np.float32)
    grid = weight_grid(w, spec(bits=2, format="ternary"), 1)
    np.testing.assert_array_equal(grid.table, [-1, 0, 1])
    found = error(w, grid).sum(0)
    for factor in np.linspace(0.3, 2.0, 300):
        other = a_grid([-1, 0, 1], grid.scale * np.float32(factor), axis=1)
        assert (found <= error(w, other).sum(0) * (1 + 1e-6)).all()


def test_clusters_are_a_fixed_point_of_lloyds_algorithm_and_beat_the_uniform_grid():
    w = RNG.standard_t(3, size=(400, 6)).astype(np.float32) * RNG.uniform(0.1, 3, 6).astype(np.float32)
    grid = weight_grid(w, spec(bits=4, format="kmeans"), 1)
    assert grid.table.shape == (16,) and grid.qmin >= -127 and grid.qmax <= 127 and grid.scale.shape == (6,)
    uniform = weight_grid(w, spec(bits=4), 1)
    assert error(w, grid).sum() < 0.8 * error(w, uniform).sum()
    steps, integers, mass = w / grid.scale, quantize(w, grid), np.square(np.broadcast_to(grid.scale, w.shape))
    for value in np.unique(integers):
        inside = integers == value
        assert abs(np.average(steps[inside], weights=mass[inside]) - value) < 1.5  # a rounding, and the last step


def test_levels_are_shared_and_scales_are_those_of_least_squares():
    w = RNG.normal(size=(500, 4)).astype(np.float32) * np.float32([1, 2, 0.1, 5])
    for name, bits in (("kmeans", 3), ("binary_bases", 3), ("power_of_two", 4), ("apot", 4), ("binary", 1)):
        grid = weight_grid(w, spec(bits=bits, format=name), 1)
        assert grid.table.ndim == 1 and np.abs(grid.table).max() <= 127 and grid.bits == bits, name
        integers = quantize(w, grid)
        best = (w * integers).sum(0) / np.square(integers).sum(0)
        np.testing.assert_allclose(grid.scale, best, rtol=0.01, err_msg=name)
        for factor in (0.8, 1.25) if name not in ("kmeans", "binary_bases") else ():  # whose levels were fitted, too
            other = a_grid(grid.table, grid.scale * np.float32(factor), axis=1)
            assert (error(w, grid).sum(0) <= error(w, other).sum(0)).all(), name


def test_logarithmic_levels_are_the_papers():
    table = {name: weight_grid(RNG.normal(size=(99, 2)), spec(bits=bits, format=name[:-1]), 1).table.tolist()
             for name, bits in (("power_of_two4", 4), ("power_of_two3", 3), ("apot4", 4), ("apot5", 5))}  # fmt: skip
    assert table["power_of_two4"][7:] == [0, 1, 2, 4, 8, 16, 32, 64] and table["power_of_two3"] == [
        -4,
        -2,
        -1,
        0,
        1,
        2,
        4,
    ]
    assert table["apot4"][7:] == [0, 1, 2, 3, 4, 6, 8, 10]
    assert len(table["apot5"]) == 31 and table["apot5"][-1] == 48
    assert all(rows == [-v for v in reversed(rows)] for rows in table.values())


def test_binary_weights_have_the_mean_magnitude():
    w = RNG.normal(size=(200, 3)).astype(np.float32)
    grid = weight_grid(w, spec(bits=1, format="binary"), 1)
    np.testing.assert_allclose(grid.scale, np.abs(w).mean(0), rtol=1e-6)
    np.testing.assert_array_equal(fake_quantize(w, grid), np.sign(w) * grid.scale)


def test_binary_bases_are_all_sums_of_some_numbers():
    w = RNG.standard_t(4, size=(300, 5)).astype(np.float32)
    for bits in (2, 3, 4):
        grid = weight_grid(w, spec(bits=bits, format="binary_bases"), 1)
        design = bases_design(grid.table)
        a = np.linalg.lstsq(design, grid.table, rcond=None)[0]
        np.testing.assert_allclose(a, np.rint(a), atol=1e-9)
        sums = sorted(int(np.dot(signs, np.rint(a))) for signs in itertools.product((-1, 1), repeat=bits))
        assert sums == grid.table.tolist() and (np.diff(design @ a) >= 0).all()
        free = weight_grid(w, spec(bits=bits, format="kmeans"), 1)
        assert error(w, free).sum() < error(w, grid).sum() < 2 * error(w, free).sum()


@pytest.mark.parametrize("bases", [[5], [3, 3], [1, 2, 4], [0, 7, 7, 20], [2, 3, 5, 6]])
def test_the_terms_of_sums_are_found_again(bases):
    table = sorted(int(np.dot(s, bases)) for s in itertools.product((-1, 1), repeat=len(bases)))
    design = bases_design(np.array(table, np.int32))
    np.testing.assert_allclose(design @ sorted(bases), table)


def test_important_weights_get_the_centroids():
    w = RNG.uniform(-1, 1, (1000, 1)).astype(np.float32)
    importance = np.where(w > 0, 1e4, 1.0)
    plain, weighted = (weight_grid(w, spec(bits=3, format="kmeans"), 1, v) for v in (None, importance))
    assert error(w, weighted)[w > 0].sum() < 0.5 * error(w, plain)[w > 0].sum()
    assert (importance * error(w, weighted)).sum() < 0.5 * (importance * error(w, plain)).sum()


@pytest.mark.parametrize("block", [32, 20])
def test_the_scale_of_a_block_is_a_multiple_of_its_channels_scale(block):
    w = RNG.normal(size=(70, 4)).astype(np.float32) * RNG.uniform(0.1, 1, (70, 1)).astype(np.float32)
    w[:block] *= 0.1
    grid = weight_grid(w, spec(bits=4, block=block), 1)
    assert grid.scale.shape == (4,) and grid.table.shape == (4, -(-70 // block), 15)
    multiples = grid.table[:, :, -1] // 7
    np.testing.assert_array_equal(grid.table, multiples[:, :, None] * np.arange(-7, 8))
    assert multiples.max() == 18 and np.abs(quantize(w, grid)).max() <= 126
    assert (error(w, grid).sum(0) < error(w, weight_grid(w, spec(bits=4), 1)).sum(0)).all()


def test_a_channel_of_zeros_stays_zero():
    w = RNG.normal(size=(64, 3)).astype(np.float32)
    w[:, 1] = 0
    for changes in ({"bits": 2, "format": "ternary"}, {"bits": 4, "format": "kmeans"}, {"bits": 4, "block": 32},
                    {"bits": 2, "format": "kmeans"}, {"bits": 4, "format": "apot"}):  # fmt: skip
        grid = weight_grid(w, spec(**changes), 1)
        assert not fake_quantize(w, grid)[:, 1].any() and np.isfinite(grid.scale).all() and (grid.scale > 0).all()
    for changes in ({"bits": 1, "format": "binary"}, {"bits": 3, "format": "binary_bases"}):  # which have no zero
        grid = weight_grid(w, spec(**changes), 1)
        assert np.abs(fake_quantize(w, grid)[:, 1]).max() < 1e-4 and (grid.scale > 0).all()


def test_pruned_weights_have_a_centroid_at_zero():
    w = RNG.normal(size=(64, 3)).astype(np.float32)
    w[np.abs(w) < 0.3] = 0
    for bits in (2, 3, 4):
        assert not fake_quantize(w, weight_grid(w, spec(bits=bits, format="kmeans"), 1))[w == 0].any()


@pytest.mark.parametrize(
    "changes, message",
    [({"format": "cubic"}, "Unknown format 'cubic'"), ({"format": "ternary"}, "must be 2, found 8"),
     ({"format": "ternary", "bits": 3}, "must be 2, found 3"), ({"format": "binary", "bits": 2}, "must be 1, found 2"),
     ({"format": "apot", "bits": 3}, "from 4 to 5"), ({"format": "power_of_two", "bits": 5}, "from 2 to 4"),
     ({"bits": 1}, 'format="binary"'), ({"format": "kmeans"}, "from 2 to 6"),
     ({"format": "binary_bases", "bits": 1}, "from 2 to 4"), ({"format": None}, "Unknown format None"),
     ({"block": 0}, "block must be"), ({"block": 32, "per_channel": False}, "per_channel"),
     ({"format": "kmeans", "bits": 4, "block": 32}, "Blocks scale given levels"),
     ({"format": "kmeans", "bits": 4, "power_of_two": True}, "power_of_two")],
)  # fmt: skip
def test_impossible_formats_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        spec(**changes)


def test_activations_have_no_format_and_8_bits_no_blocks():
    with pytest.raises(ConfigError, match="Activations are uniform"):
        QuantConfig.load({"preset": "w4a8", "activations": {"symmetric": True, "bits": 4, "format": "kmeans"}})
    with pytest.raises(ConfigError, match="fewer than 8 bits"):
        weight_grid(RNG.normal(size=(64, 3)), spec(bits=8, block=32), 1)


def test_presets_name_formats_and_blocks():
    ternary, blocks = QuantConfig.preset("w2a8-ternary").weights, QuantConfig.preset("w4a8-b32").weights
    assert (ternary.bits, ternary.format, blocks.block, blocks.format) == (2, "ternary", 32, "uniform")
    assert QuantConfig.from_dict(QuantConfig.preset("w4a8-apot-b64").to_dict()).weights.block == 64
    for name in ("w1a8-binary", "w4a8-power_of_two", "w3a8-per_tensor-kmeans", "w3a4-binary_bases", "w4-apot"):
        config = QuantConfig.preset(name)
        assert config.weights.format in name and QuantConfig.from_dict(config.to_dict()) == config
        get_target(config.target).check(config)
