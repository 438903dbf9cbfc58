"""The compression benchmark: an exact coder, right measures, complete records."""

import math

import constriction
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from benchmarks.harness.options import Options
from benchmarks.harness.results import read_json, select, values
from benchmarks.tasks.compression import coder, jpeg, methods, report, task
from benchmarks.tasks.compression import run as compression

SEEDS = 2
SIZE = task.SIZES["quick"]

pytestmark = pytest.mark.usefixtures("any_rank", "quick_compilation")


@pytest.fixture(scope="module")
def source():
    return task.load(SIZE, None)


@pytest.fixture(scope="module")
def stats(source):
    return task.statistics(source.crops, SIZE.channels)


# The range coder.


def round_trip(symbols, levels):
    encoder = constriction.stream.queue.RangeEncoder()
    coder.encode_symbols(encoder, symbols, levels)
    words = encoder.get_compressed()
    decoder = constriction.stream.queue.RangeDecoder(words)
    np.testing.assert_array_equal(coder.decode_symbols(decoder, levels), symbols)
    return 32 * len(words)


def test_random_symbols_come_back_for_about_their_entropy():
    rng = np.random.default_rng(0)
    scales = np.exp(rng.uniform(np.log(0.2), np.log(40), 20_000)).astype(np.float32)
    symbols = np.round(rng.logistic(0, scales)).astype(np.int64)
    coded = round_trip(symbols, coder.level_of(scales))
    entropy = float(np.sum(task.bits(symbols.astype(np.float32), scales)))
    assert abs(coded / entropy - 1) < 0.005


@pytest.mark.parametrize("level", [0, 20, 63])
def test_extreme_symbols_come_back(level):
    reached = coder.reach(level)
    near = [s * (reached + d) for s in (-1, 1) for d in (-1, 0, 1, 2)]
    symbols = np.array([*near, 0, 10**6, -(10**6), 2**30, 1, -1])
    round_trip(symbols, np.full(len(symbols), level))


def test_no_symbols_are_no_problem():
    assert round_trip(np.zeros(0, np.int64), np.zeros(0, np.int32)) == 0


@pytest.mark.parametrize("level", [0, 13, 40, 63])
def test_tables_are_the_distribution_of_the_model(level):
    found, reached = coder.table(level), coder.reach(level)
    np.testing.assert_allclose(found.sum(), 1, rtol=1e-12)
    np.testing.assert_array_equal(found[:-1], found[-2::-1])
    symbols = np.arange(-min(reached, 20), min(reached, 20) + 1.0)
    expected = 2.0 ** -task.bits(symbols, np.float32(coder.LEVELS[level]))
    np.testing.assert_allclose(
        found[(symbols + reached).astype(int)], expected, rtol=3e-3, atol=1e-12
    )


def test_levels_are_the_nearest():
    np.testing.assert_array_equal(coder.level_of(coder.LEVELS), np.arange(64))
    np.testing.assert_array_equal(coder.level_of(np.array([1e-3, 1e4])), [0, 63])


def test_quantisation_saves_bits_only_where_it_pays():
    difference = np.random.default_rng(0).normal(0, 2, 1000).astype(np.float32)
    scale, penalty = np.float32(0.7), np.float32(2.0)

    def cost(symbols):
        rate = task.bits(symbols.astype(np.float32), scale)
        return rate + penalty * (difference - symbols) ** 2

    symbols = coder.quantize(difference, scale, penalty)
    nearest = np.round(difference)
    changed = symbols != nearest
    assert 0.05 < changed.mean() < 0.5
    assert (np.abs(symbols) <= np.abs(nearest)).all()
    assert (cost(symbols)[changed] < cost(nearest)[changed]).all()
    exact = coder.quantize(difference, scale, np.float32(1e6))
    np.testing.assert_array_equal(exact, nearest)


# The entropy model.


@pytest.mark.parametrize("scale", [0.1, 1.0, 9.0])
def test_probabilities_add_up_to_one(scale):
    symbols = jnp.arange(-400, 401) + 0.3
    np.testing.assert_allclose(jnp.sum(2 ** -task.bits(symbols, scale)), 1, rtol=1e-4)


def test_gradients_reach_far_into_the_tails():
    slope = jax.grad(lambda x: task.bits(x, 0.05))(30.0)
    np.testing.assert_allclose(slope, 1 / (0.05 * math.log(2)), rtol=1e-4)


def test_context_of_a_block_is_coded_before_it():
    code = jnp.zeros((1, 4, 5, 2)).at[0, 1, 2].set(1.0)
    seen = task.before(code) - task.before(jnp.zeros_like(code))
    changed = {tuple(map(int, x)) for x in np.argwhere(np.any(seen[0], axis=-1))}
    assert changed == {(1, 3), (2, 1), (2, 2), (2, 3)}


# The models.


def test_blocks_come_back():
    images = jax.random.normal(jax.random.key(0), (2, 16, 24, 3))
    blocks = task.to_blocks(images)
    assert blocks.shape == (2, 2, 3, 192)
    np.testing.assert_array_equal(blocks[1, 0, 2].reshape(8, 8, 3), images[1, :8, 16:])
    np.testing.assert_array_equal(task.from_blocks(blocks), images)


def test_components_are_orthonormal(stats):
    np.testing.assert_allclose(
        stats.basis.T @ stats.basis, np.eye(SIZE.channels), atol=1e-5
    )
    assert (np.diff(stats.deviation) <= 0).all()


def test_a_conditional_model_starts_as_the_fixed_one_of_any_weight(source, stats):
    images = jnp.asarray(np.repeat(source.crops[:1], 3, axis=0), jnp.float32)
    weight = jnp.array([0.002, 0.02, 0.128])
    losses = jax.jit(lambda params: task.losses(params, stats, weight, images, key))
    key = jax.random.key(1)
    found = [
        losses(task.init(5, stats, SIZE.width, conditioned))
        for conditioned in (True, False)
    ]
    for name in ("rate", "distortion"):
        np.testing.assert_allclose(found[0][name], found[1][name], rtol=1e-5)
    # More weight on the distortion: less of it, for more bits.
    assert (np.diff(found[0]["distortion"]) < 0).all()
    assert (np.diff(found[0]["rate"]) > 0).all()


def test_weights_are_spread_evenly_over_each_batch():
    weights = task.draw(jax.random.key(0), 5, 8)
    place = np.log(weights / task.LOW) / math.log(task.HIGH / task.LOW)
    np.testing.assert_array_equal(
        np.sort(np.floor(8 * place), axis=1), np.tile(np.arange(8.0), (5, 1))
    )


def test_coding_block_by_block_follows_the_model_of_the_training(source, stats):
    params = task.init(0, stats, SIZE.width, conditioned=True)
    codec, images = coder.Codec(stats), source.test[:, :24, :32]
    coded = coder.compress(codec, params, 0.01, images)
    data, entropy, code = codec.encode(params, 0.01, images)
    assert (data, entropy) == (coded.data, coded.entropy)

    @jax.jit
    def rate(code):
        c = task.condition(params, jnp.full(len(code), 0.01))
        return task.rate(params, stats, c, code)

    np.testing.assert_allclose(entropy, rate(code).sum() * 24 * 32, rtol=1e-4)
    assert coded.images.dtype == np.uint8
    assert coded.images.shape == images.shape


# Measures.


def test_psnr():
    images = np.full((2, 4, 4, 3), 100, np.uint8)
    np.testing.assert_allclose(task.psnr(images, images + 1), 48.1308, atol=1e-4)
    half = images.copy()
    half[0] -= 4  # mean squared error 8, over both images
    np.testing.assert_allclose(task.psnr(images, half), 39.0999, atol=1e-4)


def test_jpeg_without_headers_is_smaller_and_better_with_quality(source):
    sizes, files, decoded = zip(
        *(jpeg.jpeg(source.test, q, "4:4:4") for q in (10, 50, 90)), strict=True
    )
    assert sizes[0] < sizes[1] < sizes[2]
    assert all(0 < s < f for s, f in zip(sizes, files, strict=True))
    psnr = [task.psnr(source.test, x) for x in decoded]
    assert psnr[0] < psnr[1] < psnr[2]


def test_rates_at_equal_quality():
    psnr = np.array([28.0, 30.0, 33.0, 36.0])
    bpp = np.array([0.3, 0.5, 1.0, 1.9])
    theirs = [(psnr, bpp)]
    assert report.bd_rate(theirs, theirs) == 0
    np.testing.assert_allclose(report.bd_rate([(psnr, bpp / 2)], theirs), -0.5)
    # What is 1 dB better everywhere is measured where both are.
    better = report.bd_rate([(psnr + 1, bpp)], theirs)
    at = np.linspace(29, 36, 200)
    expected = report.log_rate(theirs, at - 1) - report.log_rate(theirs, at)
    np.testing.assert_allclose(better, np.expm1(expected.mean()), rtol=1e-6)
    # One point is no curve, and curves without a common quality have no difference.
    for ours in ((psnr + 20, bpp), (psnr[1:2], bpp[1:2])):
        assert math.isnan(report.bd_rate([ours], theirs))


def test_points_that_others_beat_are_left_out():
    psnr, bpp = np.array([30.0, 29.0, 31.0, 31.5]), np.array([1.0, 1.2, 0.9, 2.0])
    kept = report._ascending(psnr, bpp)
    np.testing.assert_array_equal(kept, [[31.0, 31.5], [0.9, 2.0]])


# The benchmark.


@pytest.fixture(scope="module")
def folder(tmp_path_factory, source):
    folder = tmp_path_factory.mktemp("results")
    few = source._replace(test=source.test[:, :40, :48])
    with jax.numpy_rank_promotion("allow"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(task, "load", lambda size, data: few)
        size = {"preset": "quick", "seeds": SEEDS, "steps": 30}
        compression.main(Options("compression", **size, out=folder))
    return folder


@pytest.fixture(scope="module")
def result(folder):
    return read_json(folder / "compression.json")


def test_records_are_complete(result):
    records = result["records"]
    metrics = ("bpp", "entropy", "mse", "psnr")
    for method, weights in (("conditional", 3), ("fixed", 2)):
        for metric in metrics:
            found = select(records, method=method, metric=metric)
            assert len(found) == SEEDS * weights
        (seconds,) = select(records, method=method, metric="run_seconds")
        assert seconds["compute"] == (1 if method == "conditional" else weights)
    jpegs = len(methods.QUALITIES) * len(methods.SUBSAMPLINGS)
    assert len(select(records, method="jpeg", metric="psnr")) == jpegs
    assert len(report.shared_weights(result)) == 2
    assert all(np.isfinite(r["value"]) for r in records)


def test_bytes_are_close_to_the_entropy(result):
    coded = [r for r in result["records"] if r["method"] != "jpeg"]
    bpp = values(coded, metric="bpp")
    entropy = values(coded, metric="entropy")
    pixels = 40 * 48
    assert (np.abs(bpp - entropy) < 0.02 * entropy + 64 / pixels).all()


def test_tables_and_figures_follow_from_the_file(folder, result):
    table = report.table(result)
    assert len(table.rows) == 3
    some = [table, report.summary(result), *report.tables(result).values()]
    for one in some:
        assert all(len(row) == len(one.columns) for row in one.rows)
    assert len(report.conclusions(result)) == 5
    report.figure(result, folder / "again.png")
    written = (folder / "compression.png").read_bytes()
    assert (folder / "again.png").read_bytes() == written
    with Image.open(folder / "compression_examples.png") as drawn:
        assert min(drawn.size) > 400


def test_gaps_are_of_the_objective(result):
    weight = report.shared_weights(result)[1]
    ours, theirs = (
        report.objective(result, m, weight) for m in ("conditional", "fixed")
    )
    np.testing.assert_allclose(
        report.gap(result, weight), ours - theirs, rtol=1e-3, atol=1e-3
    )


def test_folders_of_photographs(tmp_path):
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name, shape in ((split, (52, 60, 3)), (f"{split}annot", (52, 60))):
            (tmp_path / name).mkdir()
            for i in range(3):
                pixels = rng.integers(0, 11, shape).astype(np.uint8)
                Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
    source = task.load(SIZE._replace(test_images=2), tmp_path)
    assert source.name == tmp_path.resolve().name
    assert source.crops.shape == (SIZE.crops, task.CROP, task.CROP, 3)
    assert source.test.shape == (2, 48, 56, 3)
    assert source.crops.max() == 10
