"""Distributions over loss weights, their encoding, and conditional objectives."""

import copy
import dataclasses
import functools
import itertools
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from yoto_jax import conditional, weightings
from yoto_jax.conditional import _points

METHODS = ["random", "stratified", "sobol"]
pytestmark = pytest.mark.usefixtures("quick_compilation")


@functools.partial(jax.jit, static_argnames=("n", "groups", "method"))
def sample(distribution, key, n, groups=None, method="random"):
    return distribution.sample(key, n, groups=groups, method=method)


def columns(weights):
    return np.stack(jax.tree.leaves(weights), axis=-1).astype(np.float64)


def log_uniform(count=4):
    names = [f"loss{k}" for k in range(count)]
    low = {name: 10.0**-k for k, name in enumerate(names)}
    return conditional.LogUniform(low, {n: 100 * low[n] for n in names})


# Sampling.


@pytest.mark.parametrize("method", METHODS)
def test_weights_are_log_uniform_and_independent(method):
    stats = pytest.importorskip("scipy.stats")
    n, support = 4096, log_uniform()
    weights = sample(support, jax.random.key(0), n, method=method)
    assert list(weights) == list(support.names)
    assert all(w.shape == (n,) and w.dtype == jnp.float32 for w in weights.values())
    logs = np.log(columns(weights) / np.array([1, 0.1, 0.01, 0.001])) / np.log(100)
    for column in logs.T:
        distance, p = stats.kstest(column, "uniform")
        assert p > 0.01
        if method != "random":
            assert distance < 1.01 / n
    for a, b in itertools.combinations(logs.T, 2):
        assert abs(stats.spearmanr(a, b).statistic) < 3 / np.sqrt(n - 1)


def test_uniform_weights_are_uniform():
    stats = pytest.importorskip("scipy.stats")
    support = conditional.Uniform({"a": 0.0, "b": 0.5}, {"a": 1.0, "b": 3.0})
    a, b = columns(sample(support, jax.random.key(1), 4096)).T
    assert stats.kstest(a, "uniform").pvalue > 0.01
    assert stats.kstest(b, "uniform", (0.5, 2.5)).pvalue > 0.01


@pytest.mark.parametrize("method", METHODS)
def test_one_key_one_sample(method):
    draw = lambda seed: columns(
        sample(log_uniform(), jax.random.key(seed), 64, method=method)
    )
    np.testing.assert_array_equal(draw(0), draw(0))
    assert (draw(0) != draw(1)).mean() > 0.9


@pytest.mark.parametrize("method", METHODS)
def test_every_draw_is_uniform_whatever_its_place(method):
    """Spread evenly over a batch, and yet uniform at each place of it."""
    stats = pytest.importorskip("scipy.stats")
    keys = jax.random.split(jax.random.key(2), 1024)
    points = jax.vmap(lambda key: _points.draw(key, 4, 2, method))(keys)
    for place, dimension in itertools.product((0, 3), (0, 1)):
        assert stats.kstest(points[:, place, dimension], "uniform").pvalue > 0.01


@pytest.mark.parametrize("method", METHODS)
def test_groups_share_their_weights(method):
    weights = columns(
        sample(log_uniform(), jax.random.key(0), 24, groups=6, method=method)
    ).reshape(6, 4, 4)
    np.testing.assert_array_equal(weights, np.repeat(weights[:, :1], 4, axis=1))
    assert len(np.unique(weights[:, 0, 0])) == 6
    one = columns(sample(log_uniform(), jax.random.key(0), 5, groups=1, method=method))
    assert len(np.unique(one, axis=0)) == 1


at = jax.jit(lambda support, positions: support.at(positions))
encode = jax.jit(conditional.encode)
RANGES = [
    (1e-30, 1e30),
    (1.0, 1 + 1e-6),
    (0.1, 0.3),
    (1e-37, 1e-36),
    (0.125, 512.0),
    (3e38, 3.3e38),
]


@pytest.mark.parametrize("bounds", RANGES, ids=str)
@pytest.mark.parametrize("kind", [conditional.LogUniform, conditional.Uniform])
def test_bounds_are_never_left(kind, bounds):
    low, high = map(np.float32, bounds)
    support = kind({"free": low, "pinned": 0.7}, {"free": high, "pinned": 0.7})
    near = np.linspace(0, 1, 999, dtype=np.float32)
    near = np.concatenate([near, [2.0**-24, 1 - 2.0**-24]]).astype(np.float32)
    weights = at(support, np.stack([near, 0 * near], axis=-1))
    assert weights[:, 0].min() == low
    assert weights[:, 0].max() == high
    np.testing.assert_array_equal(weights[:, 1], np.float32(0.7))
    for method in METHODS:
        weights = sample(support, jax.random.key(0), 256, method=method)
        free = np.asarray(weights["free"])
        assert (low <= free).all()
        assert (free <= high).all()
        np.testing.assert_array_equal(weights["pinned"], np.float32(0.7))
    # The encoding of whatever was drawn is inside its own range, too.
    encoded = encode(weights, support)
    assert (abs(encoded) <= 1 + 1e-6).all()
    assert conditional.encode(weights, support).shape == (256, 1)


def test_stratified_draws_have_an_interval_each():
    for n in (100, 2**14):
        points = np.asarray(_points.draw(jax.random.key(0), n, 3, "stratified"))
        assert points.max() < 1
        for column in points.T:
            np.testing.assert_array_equal(np.sort(np.floor(column * n)), np.arange(n))


def test_sobol_points_are_those_of_scipy_up_to_shift_and_order():
    qmc = pytest.importorskip("scipy.stats.qmc")
    n = 256
    known = qmc.Sobol(16, scramble=False).random(n)
    known = {tuple(row) for row in (known * 2**24).astype(np.int64)}
    points = _points.draw(jax.random.key(0), n, 16, "sobol")
    points = (np.asarray(points, np.float64) * 2**24).astype(np.int64)
    # Sobol's points are a group under exclusive or: any point undoes the shift.
    assert {tuple(row) for row in points ^ points[7]} == known
    assert {tuple(row) for row in points} != known
    # All 32 digits of the direction numbers: of the points 2^k.
    last = qmc.Sobol(16, scramble=False, bits=32).fast_forward(2**20 - 1).random(2)
    table = _points.sobol_directions(16).astype(np.uint64)
    gray = [i ^ (i >> 1) for i in (2**20 - 1, 2**20)]
    for i, row in zip(gray, last, strict=True):
        bits = [k for k in range(32) if i >> k & 1]
        ours = np.bitwise_xor.reduce(table[:, bits], axis=1)
        np.testing.assert_array_equal(ours / 2**32, row)


def test_two_sobol_weights_are_a_net():
    """Each box of area 1 / n with sides that are powers of two has one point."""
    m = 8
    x, y = np.asarray(_points.draw(jax.random.key(3), 2**m, 2, "sobol")).T
    for k in range(m + 1):
        box = np.floor(x * 2**k) * 2 ** (m - k) + np.floor(y * 2 ** (m - k))
        np.testing.assert_array_equal(np.sort(box), np.arange(2**m))


@pytest.mark.parametrize("method", METHODS)
def test_a_support_without_free_weights_is_sampled_as_well(method):
    fixed = conditional.Fixed({"a": 0.0, "b": 4.0})
    weights = sample(fixed, jax.random.key(0), 3, method=method)
    np.testing.assert_array_equal(columns(weights), [[0, 4]] * 3)
    np.testing.assert_array_equal(columns(fixed.grid(5)), [[0, 4]])


def test_a_dirichlet_has_its_moments():
    stats = pytest.importorskip("scipy.stats")
    alpha = {"a": 1.2, "b": 0.5, "c": 3.0}
    preferences = conditional.Dirichlet(alpha)
    draws = columns(sample(preferences, jax.random.key(0), 4096))
    np.testing.assert_allclose(draws.sum(axis=1), 1, atol=1e-6)
    assert (draws >= 0).all()
    total = sum(alpha.values())
    for column, a in zip(draws.T, alpha.values(), strict=True):
        assert stats.kstest(column, stats.beta(a, total - a).cdf).pvalue > 0.01
    with pytest.raises(ValueError, match="drawn by method 'random', got 'sobol'"):
        preferences.sample(jax.random.key(0), 4, method="sobol")


def test_many_losses():
    names = [f"loss{k:02}" for k in range(40)]
    support = conditional.LogUniform(dict.fromkeys(names, 0.1), 10.0)
    weights = columns(sample(support, jax.random.key(0), 8, method="stratified"))
    assert weights.shape == (8, 40)
    assert len(np.unique(weights)) == 320
    assert encode(support.tree(np.ones((8, 40))), support).shape == (8, 40)
    with pytest.raises(ValueError, match="up to 16 weights that vary, got 40"):
        support.sample(jax.random.key(0), 8, method="sobol")
    with pytest.raises((MemoryError, OverflowError, ValueError)):
        support.grid(11)  # At once, rather than after hours.


# Grids.


def test_grids_are_evenly_spaced_with_exact_ends():
    support = conditional.LogUniform({"a": 0.1, "b": 2.0}, {"a": 300.0, "b": 2.0})
    a, b = columns(support.grid(7)).T
    np.testing.assert_allclose(a, np.geomspace(0.1, 300, 7), rtol=1e-5)
    assert (a[0], a[-1]) == (np.float32(0.1), 300)
    np.testing.assert_array_equal(b, 2)
    (linear,) = columns(conditional.Uniform({"a": 0.0}, {"a": 3.0}).grid(4)).T
    np.testing.assert_allclose(linear, [0, 1, 2, 3], rtol=1e-6)


def test_grids_of_several_weights_have_all_combinations_last_fastest():
    support = conditional.Uniform(0.0, {"a": 2.0, "b": 0.0, "c": 20.0})
    expected = [(a, 0, c) for a in (0, 1, 2) for c in (0, 10, 20)]
    np.testing.assert_allclose(columns(support.grid(3)), expected, rtol=1e-6)


@pytest.mark.parametrize(("count", "n"), [(2, 3), (3, 5), (4, 2), (10, 4)])
def test_simplex_lattices(count, n):
    grid = columns(conditional.Dirichlet([1.0] * count).grid(n))
    steps = itertools.product(range(n), repeat=min(count, 4))
    if count <= 4:
        expected = [np.array(row) / (n - 1) for row in steps if sum(row) == n - 1]
        np.testing.assert_allclose(grid, expected, atol=1e-7)
    np.testing.assert_allclose(grid.sum(axis=1), 1, atol=1e-6)
    assert len(np.unique(grid, axis=0)) == len(grid)


# Containers and transformations.


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Losses:
    fit: float
    kl: float


@pytest.mark.parametrize(
    ("low", "names"),
    [
        (
            {"heads": {"depth": 0.1, "pose": 0.2}, "kl": 0.3},
            "heads/depth heads/pose kl",
        ),
        ((0.1, [0.2, 0.3]), "0 1/0 1/1"),
        (Losses(0.1, 0.2), "fit kl"),
        (0.1, ""),
    ],
    ids=["nested", "tuple", "dataclass", "one"],
)
def test_weights_come_in_any_container(low, names):
    support = conditional.LogUniform(low, 2.0)
    assert support.names == tuple(names.split(" "))
    weights = sample(support, jax.random.key(0), 6)
    assert jax.tree.structure(weights) == jax.tree.structure(low)
    ours = conditional.conditional_loss(weights, weights)
    np.testing.assert_allclose(
        ours, np.mean(np.sum(columns(weights) ** 2, axis=1)), rtol=1e-6
    )
    assert conditional.encode(weights, support).shape == (6, len(support.names))
    again = copy.deepcopy(support)
    assert repr(again) == repr(support)


def test_distributions_are_pytrees():
    support = log_uniform(2)
    leaves, structure = jax.tree.flatten(support)
    assert [leaf.shape for leaf in leaves] == [(2,), (2,)]
    assert repr(structure.unflatten(leaves)) == repr(support)
    assert repr(pickle.loads(pickle.dumps(support))) == repr(support)
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree.leaves_with_path(support)]
    assert paths == [".low", ".high"]
    doubled = jax.tree.map(lambda x: 2 * x, support)
    np.testing.assert_array_equal(doubled.high, 2 * support.high)
    assert repr(jax.tree.map(lambda x: None, support))
    hash(structure)
    for other in (conditional.Fixed((1.0, 2.0)), conditional.Dirichlet((1.0, 2.0))):
        leaves, structure = jax.tree.flatten(other)
        assert repr(structure.unflatten(leaves)) == repr(other)


def test_other_bounds_do_not_compile_again():
    traces = []

    @jax.jit
    def program(support, key):
        traces.append(repr(support))
        weights = support.sample(key, 4, method="sobol")
        return conditional.encode(weights, support)

    for low in (0.1, 0.2, 0.3):
        support = conditional.LogUniform({"a": low, "b": 1.0}, {"a": 3.0, "b": 1.0})
        encoded = program(support, jax.random.key(0))
        assert encoded.shape == (4, 1)
        narrower = conditional.narrow(support, {"a": 1.0, "b": 1.0}, 0.5)
        program(narrower, jax.random.key(0))
    assert traces == ["LogUniform(a=?, b=?)"]


def test_sampling_under_vmap_and_scan_and_from_traced_bounds():
    support = log_uniform(3)
    keys = jax.random.split(jax.random.key(0), 5)
    mapped = jax.vmap(lambda key: support.sample(key, 4))(keys)
    _, scanned = jax.lax.scan(lambda s, key: (s, s.sample(key, 4)), support, keys)
    for k, key in enumerate(keys):
        single = columns(sample(support, key, 4))
        np.testing.assert_allclose(columns(mapped)[k], single, rtol=1e-5)
        np.testing.assert_allclose(columns(scanned)[k], single, rtol=1e-5)

    # A batch of distributions, made under vmap of bounds that nobody knows.
    lows = jnp.array([0.01, 0.1, 1.0])
    batch = jax.vmap(lambda low: conditional.LogUniform({"a": low}, {"a": 1.0}))(lows)
    weights = jax.vmap(lambda s: s.sample(keys[0], 64))(batch)["a"]
    assert (weights.min(axis=1) >= lows).all()
    np.testing.assert_array_equal(weights[2], 1)
    # A traced bound counts as free, even one that happens to be pinned.
    encoded = jax.vmap(lambda s, w: conditional.encode({"a": w}, s))(batch, weights)
    assert encoded.shape == (3, 64, 1)
    np.testing.assert_array_equal(encoded[2], -1)


def test_a_checkpoint_holds_a_distribution(tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    support = log_uniform(2)
    saved = {
        "support": support,
        "now": conditional.narrow(support, {"loss0": 3.0, "loss1": 0.2}, 0.3),
        "dirichlet": conditional.Dirichlet((1.0, 2.0)),
    }
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "run", saved)
        checkpointer.wait_until_finished()
        abstract = jax.eval_shape(lambda: saved)
        restored = checkpointer.restore(tmp_path / "run", abstract)
    assert jax.tree.structure(restored) == jax.tree.structure(saved)
    for name, distribution in saved.items():
        assert repr(restored[name]) == repr(distribution)


def test_weights_are_float32_under_x64():
    def make(key):
        low, high = {"a": 0.1, "b": np.float64(1)}, {"a": jnp.float64(3.0), "b": 1}
        support = conditional.LogUniform(low, high)
        middle = {"a": 1.0, "b": jnp.float64(1.0)}
        narrower = conditional.narrow(support, middle, jnp.float64(0.5))
        others = [conditional.Dirichlet((1.0, 2.0)), conditional.Uniform(0.0, {"a": 1})]
        for one in (support, narrower, *others):
            for weights in (one.grid(3), one.sample(key, 4)):
                wide = jax.tree.map(lambda x: x.astype(jnp.float64), weights)
                for given in (weights, wide):
                    yield one, weights, conditional.encode(given, one)

    with jax.enable_x64(True):
        key = jax.random.key(0)
        made = jax.eval_shape(lambda key: list(make(key)), key)
        for leaf in jax.tree.leaves(made):
            assert leaf.dtype == jnp.float32
            assert not leaf.weak_type
        losses = {"a": jnp.ones(3, jnp.float64), "b": jnp.ones(3)}
        assert conditional.conditional_loss(losses, losses).dtype == jnp.float64


# Narrower ranges.


def narrow_oracle(outer, inner, center, factor):
    """In float64, on the scale of logarithms."""
    start, end = np.log(outer)
    width = (np.log(inner[1]) - np.log(inner[0])) / (end - start) * factor
    middle = np.clip((np.log(center) - start) / (end - start), 0, 1)
    left = np.clip(middle - width / 2, 0, 1 - width)
    return np.exp(start + np.array([left, left + width]) * (end - start))


@pytest.mark.parametrize("center", [0.01, 0.02, 3.0, 99.0, 100.0, 1e4])
def test_narrower_ranges(center):
    support = conditional.LogUniform({"a": 0.01, "b": 2.0}, {"a": 100.0, "b": 2.0})
    inner = conditional.LogUniform({"a": 0.1, "b": 2.0}, {"a": 10.0, "b": 2.0})
    narrow = jax.jit(conditional.narrow)
    now = narrow(inner, {"a": center, "b": 2.0}, 0.5, support=support)
    expected = narrow_oracle((0.01, 100), (0.1, 10), center, 0.5)
    np.testing.assert_allclose([now.low[0], now.high[0]], expected, rtol=1e-5)
    assert (now.low[1], now.high[1]) == (2, 2)
    assert now.free == (True, False)
    point = narrow(inner, {"a": center, "b": 2.0}, 0.0, support=support)
    np.testing.assert_allclose(point.low[0], np.clip(center, 0.01, 100), rtol=1e-5)
    np.testing.assert_allclose(point.low, point.high, rtol=1e-6)
    same = narrow(support, {"a": center, "b": 2.0}, 1.0)
    np.testing.assert_array_equal(same.low, support.low)
    np.testing.assert_array_equal(same.high, support.high)


def test_ranges_narrow_inside_a_scan():
    support = conditional.LogUniform({"a": 0.01}, {"a": 100.0})

    def step(now, center):
        now = conditional.narrow(now, {"a": center}, 0.5, support=support)
        weights = now.sample(jax.random.key(0), 8)
        return now, conditional.encode(weights, support)

    last, encoded = jax.jit(lambda c: jax.lax.scan(step, support, c))(jnp.ones(20))
    np.testing.assert_allclose(last.low, 1, rtol=1e-4)
    spread = np.ptp(encoded[..., 0], axis=1)
    assert (spread[:10] > 0).all()
    np.testing.assert_allclose(spread[1:8], spread[:7] / 2, rtol=1e-2)


# Wrong arguments.

KEY = jax.random.key(0)
KL = conditional.LogUniform({"fit": 1.0, "kl": 0.1}, {"fit": 1.0, "kl": 10.0})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: conditional.LogUniform({"a": 0}, 1), "loss 'a' needs 0 < low <= high"),
        (lambda: conditional.LogUniform({"a": 2}, 1), "got low = 2, high = 1"),
        (lambda: conditional.LogUniform({"a": 1}, np.inf), "finite"),
        (lambda: conditional.LogUniform({"a": 1}, 1e39), "float32"),
        (lambda: conditional.LogUniform({"a": 1e-40}, 1), "float32"),
        (lambda: conditional.LogUniform({"a": np.nan}, 1), "low = nan"),
        (lambda: conditional.Uniform({"a": -1}, 1), "loss 'a' needs 0 <= low <= high"),
        (lambda: conditional.Fixed({"a": -1}), "loss 'a' needs 0 <= low <= high"),
        (lambda: conditional.LogUniform({"a": 1, "b": 1}, {"a": 2}), "missing: 'b'"),
        (lambda: conditional.LogUniform((1.0, 1.0), [2.0, 2.0]), "high bounds do not"),
        (lambda: conditional.LogUniform({}, 1), "no losses"),
        (
            lambda: conditional.Uniform({"a": np.ones(2)}, 2),
            "bound of loss 'a' must be",
        ),
        (lambda: conditional.Dirichlet({"a": 1.0}), "at least two losses"),
        (
            lambda: conditional.Dirichlet({"a": 1.0, "b": 0.0}),
            "of loss 'b' must be pos",
        ),
        (
            lambda: conditional.Dirichlet({"a": np.ones(2), "b": 0.0}),
            "must be a scalar",
        ),
        (lambda: KL.sample(KEY, 0), "must be positive"),
        (lambda: KL.sample(KEY, 6, groups=4), "must divide n; got n = 6, groups = 4"),
        (lambda: KL.sample(KEY, 6, groups=0), "must be positive"),
        (lambda: KL.sample(KEY, 6, groups=12), "must divide n"),
        (
            lambda: KL.sample(KEY, 6, method="halton"),
            "'stratified' or 'sobol', got 'hal",
        ),
        (lambda: KL.grid(1), "at least 2 values"),
        (lambda: conditional.narrow(KL, {"kl": 1.0}, 0.5), "missing: 'fit'"),
        (
            lambda: conditional.narrow(KL, {"fit": 1.0, "kl": 1.0}, 1.5),
            "between 0 and 1",
        ),
        (lambda: conditional.narrow(KL, KL.grid(3), 0.5), "tree of scalars"),
        (
            lambda: conditional.narrow(
                KL,
                {"fit": 1.0, "kl": 1.0},
                0.5,
                support=conditional.LogUniform(0.1, {"kl": 1.0}),
            ),
            "unexpected: 'fit'",
        ),
        (lambda: conditional.encode({"kl": 1.0}, KL), "missing: 'fit'"),
        (
            lambda: conditional.encode({"fit": jnp.ones(2), "kl": 1.0}, KL),
            "must all have one shape",
        ),
    ],
)
def test_wrong_arguments_are_reported(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_dirichlet_has_no_ranges_to_narrow():
    preferences: Any = conditional.Dirichlet((1.0, 1.0))
    with pytest.raises(TypeError, match="got Dirichlet"):
        conditional.narrow(preferences, (0.5, 0.5), 0.5)
    ranges = conditional.LogUniform({"a": 0.01}, {"a": 100.0})
    even = conditional.Uniform({"a": 0.0}, {"a": 100.0})
    with pytest.raises(
        TypeError, match="support must be a LogUniform .* got a Uniform"
    ):
        conditional.narrow(ranges, {"a": 1.0}, 0.5, support=even)


# Encoding.

SUPPORT = conditional.LogUniform(
    {"a": 0.125, "b": 1.0, "c": {"x": 1e-4, "y": 7.0}},
    {"a": 512.0, "b": 1.0, "c": {"x": 1e-2, "y": 7.0}},
)
SCALES = np.log([[0.125, 1e-4], [512.0, 1e-2]])


def standardized(weights):
    logs = np.log(columns(weights)[..., [0, 2]])
    return 2 * (logs - SCALES[0]) / (SCALES[1] - SCALES[0]) - 1


def test_free_weights_are_standardized_and_pinned_ones_dropped():
    weights = sample(SUPPORT, jax.random.key(0), 50)
    encoded = conditional.encode(weights, SUPPORT)
    np.testing.assert_allclose(encoded, standardized(weights), atol=2e-6)
    np.testing.assert_array_equal(
        conditional.encode(SUPPORT.grid(2), SUPPORT),
        [[-1, -1], [-1, 1], [1, -1], [1, 1]],
    )
    uniform = conditional.Uniform({"a": 0.0, "b": 1.0}, {"a": 2.0, "b": 1.0})
    weights = {"a": jnp.array([0.0, 0.5, 2.0]), "b": jnp.ones(3)}
    encoded = conditional.encode(weights, uniform)
    np.testing.assert_allclose(encoded, [[-1], [-0.5], [1]])
    preferences = conditional.Dirichlet((1.0, 1.0, 1.0))
    weights = tuple(jnp.array([0.5, 0.25, 0.25]))
    encoded = conditional.encode(weights, preferences)
    np.testing.assert_allclose(encoded, [0, -0.5, -0.5])


@pytest.mark.parametrize(
    "support",
    [SUPPORT, conditional.Fixed({"a": 1.0, "b": 2.0}), conditional.Uniform(1, (2, 1))],
    ids=["log_uniform", "fixed", "uniform"],
)
def test_encoding_size(support):
    size = conditional.encoding_size(support)
    assert isinstance(size, int)
    encode = functools.partial(conditional.encode, support=support)
    weights = sample(support, jax.random.key(0), 3)
    assert encode(weights).shape == (3, size)
    assert encode(jax.tree.map(lambda w: w[0], weights)).shape == (size,)
    assert encode(jax.tree.map(lambda w: w[:, None], weights)).shape == (3, 1, size)
    if isinstance(support, conditional.Fixed):
        assert size == 0


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0.09, "the weight 0.09 of loss 'kl' is outside its range, 0.1 to 10"),
        (11.0, "the weight 11 of loss 'kl' is outside its range, 0.1 to 10"),
        (-1.0, "the weight -1 of loss 'kl'"),
        (np.nan, "the weight nan of loss 'kl'"),
    ],
)
def test_weights_outside_raise_or_count_as_the_nearest(value, message):
    weights = {"fit": jnp.ones(2), "kl": jnp.array([1.0, value])}
    encode = functools.partial(conditional.encode, support=KL)
    with pytest.raises(ValueError, match=message):
        encode(weights)
    inside = {"fit": jnp.ones(2), "kl": jnp.clip(weights["kl"], 0.1, 10)}
    encoded = jax.jit(encode)(weights)
    if np.isnan(value):
        assert np.isnan(encoded[1]).any()
        assert np.isfinite(encoded[0]).all()
    else:
        np.testing.assert_allclose(encoded, encode(inside), rtol=1e-6)


def test_a_pinned_weight_may_not_change_either():
    with pytest.raises(
        ValueError, match="2 of loss 'fit' is outside its range, 1 to 1"
    ):
        conditional.encode({"fit": 2.0, "kl": 1.0}, KL)
    preferences = conditional.Dirichlet({"a": 1.0, "b": 1.0})
    with pytest.raises(ValueError, match="must sum to 1, not to 1.1"):
        conditional.encode({"a": 0.5, "b": 0.6}, preferences)
    with pytest.raises(
        ValueError, match="weight -0.5 of loss 'a' is outside its range"
    ):
        conditional.encode({"a": -0.5, "b": 1.5}, preferences)


def test_gradients_flow_through_the_encoding():
    """At the bounds as well, in full: a search that starts there must get away."""
    kl = jnp.array([0.1, 0.5, 10.0])
    one = lambda w: conditional.encode({"fit": 1.0, "kl": w}, KL)[0]
    slope = jax.jit(jax.vmap(jax.grad(one)))
    np.testing.assert_allclose(slope(kl), 2 / (kl * np.log(100)), rtol=1e-5)
    np.testing.assert_array_equal(slope(jnp.array([0.0, -1.0, 11.0])), 0)


# Objectives.

NAMES = ["a", "b", "c"]


def random_problem(n=12, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    losses = {k: rng.uniform(0.1, 3, n).astype(dtype) for k in NAMES}
    weights = {k: np.exp(rng.uniform(-3, 3, n)).astype(np.float32) for k in NAMES}
    return losses, weights


DIVISORS = {
    None: lambda w: np.ones(len(w)),
    "sum": lambda w: w.sum(axis=1),
    "geometric": lambda w: np.prod(w, axis=1) ** (1 / w.shape[1]),
    "max": lambda w: w.max(axis=1),
}


@pytest.mark.parametrize("groups", [None, 1, 4])
@pytest.mark.parametrize("normalize", DIVISORS)
def test_the_objective_in_closed_form(normalize, groups):
    losses, weights = random_problem()
    loss = jax.jit(
        functools.partial(
            conditional.conditional_loss, normalize=normalize, groups=groups
        )
    )(losses, weights)
    values, w = columns(losses), columns(weights)
    if groups is not None:
        values, w = (x.reshape(groups, -1, 3).mean(axis=1) for x in (values, w))
    expected = np.mean((values * w).sum(axis=1) / DIVISORS[normalize](w))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert loss.dtype == jnp.float32
    assert not loss.weak_type


def test_a_divisor_of_ones_own():
    losses, weights = random_problem()
    loss = conditional.conditional_loss(
        losses, weights, normalize=lambda w: 1 + w["b"] ** 2
    )
    w = columns(weights)
    sums = (columns(losses) * w).sum(axis=1)
    np.testing.assert_allclose(loss, np.mean(sums / (1 + w[:, 1] ** 2)), rtol=1e-5)
    with pytest.raises(ValueError, match=r"shape \(12,\); got shape \(12, 1\)"):
        conditional.conditional_loss(
            losses, weights, normalize=lambda w: w["b"][:, None]
        )


def test_gradients_with_respect_to_losses_are_weights_over_n():
    losses, weights = random_problem()
    objective = functools.partial(conditional.conditional_loss, normalize="sum")
    plain = jax.grad(conditional.conditional_loss)(losses, weights)
    normalized = jax.grad(objective)(losses, weights)
    w = columns(weights)
    np.testing.assert_allclose(columns(plain), w / 12, rtol=1e-6)
    shares = w / w.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(columns(normalized), shares / 12, rtol=1e-5)


def test_large_weights_have_most_of_the_attention():
    """What the documentation says of log-uniform weights from 1/8 to 512."""
    support = conditional.LogUniform({"fit": 1, "kl": 0.125}, {"fit": 1, "kl": 512})
    kl = columns(support.sample(jax.random.key(0), 2**14, method="stratified"))[:, 1]
    np.testing.assert_allclose(kl.mean(), (512 - 0.125) / np.log(4096), rtol=1e-3)
    np.testing.assert_allclose(kl[kl > 128].sum() / kl.sum(), 0.75, atol=2e-3)
    assert abs((kl > 128).mean() - 1 / 6) < 1e-3


def test_to_normalize_is_to_draw_from_another_density():
    """E[f / c] under p is E[f] under p / c, but for a constant: here by quadrature."""
    grid = np.exp(np.linspace(np.log(0.125), np.log(512), 20001))
    weights = {"fit": np.ones_like(grid), "kl": grid}
    losses = {"fit": 1 / (1 + grid), "kl": np.log1p(1 / grid)}
    value = conditional.conditional_loss(losses, weights, normalize="sum")
    f = losses["fit"] + grid * losses["kl"]
    density = 1 / (grid * (1 + grid))  # of the weight: that of 1/w, over c = 1 + w
    uniform = 1 / grid
    integral = lambda y: np.sum((y[1:] + y[:-1]) / 2 * np.diff(grid))
    under_other = integral(f * density) / integral(density)
    constant = integral(density) / integral(uniform)
    np.testing.assert_allclose(value, under_other * constant, rtol=1e-3)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_low_precision_losses_are_weighed_in_float32(dtype):
    losses = {k: jnp.asarray(v, dtype) for k, v in random_problem()[0].items()}
    weights = random_problem()[1]
    exact = np.mean((columns(losses) * columns(weights)).sum(axis=1))
    for groups in (None, 12):
        with jax.numpy_dtype_promotion("strict"):
            loss, gradient = jax.value_and_grad(conditional.conditional_loss)(
                losses, weights, groups=groups
            )
        assert loss.dtype == jnp.float32
        np.testing.assert_allclose(loss, exact, rtol=1e-5)
        assert gradient["a"].dtype == dtype
    means = conditional.group_mean(losses, 2)
    assert means["a"].dtype == jnp.float32
    np.testing.assert_allclose(
        columns(means), columns(losses).reshape(2, 6, 3).mean(axis=1), rtol=1e-6
    )


def test_a_nan_loss_is_not_hidden():
    losses, weights = random_problem()
    losses["b"][3] = np.nan
    for scalarization in (
        None,
        conditional.cosmos,
        conditional.smooth_chebyshev,
        conditional.pbi,
    ):
        loss = conditional.conditional_loss(
            losses, weights, scalarization=scalarization
        )
        assert np.isnan(loss)


ONES = {"a": jnp.ones(4), "b": jnp.ones(4)}


@pytest.mark.parametrize(
    ("losses", "keywords", "message"),
    [
        ({"a": jnp.ones(4)}, {}, "missing: 'b'"),
        (ONES | {"c": jnp.ones(4)}, {}, "unexpected: 'c'"),
        ((jnp.ones(4), jnp.ones(4)), {}, "do not match those of the weights"),
        (ONES | {"b": jnp.ones(3)}, {}, r"'b' must have one value per .* shape \(3,\)"),
        (ONES | {"b": jnp.ones((4, 1))}, {}, r"got shape \(4, 1\)"),
        (ONES | {"b": 1.0}, {}, r"got shape \(\), beside \(4,\).*see group_mean"),
        ({"a": jnp.ones(2), "b": jnp.ones(2)}, {}, r"shape \(2,\), beside \(4,\)"),
        (ONES, {"normalize": "mean"}, "sum, geometric, max; got 'mean'"),
        (ONES, {"groups": 3}, "must divide the number of examples, 4; got 3"),
        (ONES, {"groups": 0}, "must divide the number of examples, 4; got 0"),
        (ONES, {"scalarization": lambda x, w: x["a"].sum()}, r"got shape \(\)"),
        (
            ONES,
            {"scalarization": functools.partial(conditional.pbi, ideal={"a": 0.0})},
            r"ideal must be one number, or one for each loss \('a', 'b'\), got",
        ),
    ],
)
def test_losses_that_do_not_match_are_reported(losses, keywords, message):
    with pytest.raises(ValueError, match=message):
        conditional.conditional_loss(losses, ONES, **keywords)


def test_weights_that_do_not_match_are_reported():
    weights = ONES | {"b": jnp.ones(3)}
    with pytest.raises(ValueError, match="the weight of loss 'b' must have one value"):
        conditional.conditional_loss(ONES, weights)
    with pytest.raises(ValueError, match="no losses to weigh"):
        conditional.conditional_loss({}, {})
    with pytest.raises(ValueError, match=r"losses have shape \(4,\), but weights \(\)"):
        conditional.weighted_sum(ONES, {"a": 1.0, "b": 1.0})
    with pytest.raises(ValueError, match="all weights must have one shape"):
        conditional.weighted_sum(ONES, {"a": 1.0, "b": jnp.ones(4)})


# Scalarizations.


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_scalarizations_in_closed_form():
    losses, weights = random_problem()
    ideal = {"a": 0.05, "b": 0.0, "c": -1.0}
    v, w = columns(losses), columns(weights)
    z = v - np.array([0.05, 0.0, -1.0])
    linear = (v * w).sum(axis=1)
    np.testing.assert_allclose(
        conditional.weighted_sum(losses, weights), linear, rtol=1e-5
    )
    np.testing.assert_allclose(
        conditional.cosmos(losses, weights, penalty=3.0),
        linear - 3 * (unit(v) * unit(w)).sum(axis=1),
        rtol=1e-5,
    )
    np.testing.assert_allclose(
        conditional.smooth_chebyshev(losses, weights, smoothing=0.7, ideal=ideal),
        0.7 * np.log(np.exp(w * z / 0.7).sum(axis=1)),
        rtol=1e-5,
    )
    along = (z * unit(w)).sum(axis=1)
    away = np.linalg.norm(z - along[:, None] * unit(w), axis=1)
    np.testing.assert_allclose(
        conditional.pbi(losses, weights, penalty=4.0, ideal=ideal),
        along + 4 * away,
        rtol=1e-5,
    )
    objective = conditional.conditional_loss(
        losses,
        weights,
        scalarization=functools.partial(conditional.pbi, penalty=4.0, ideal=ideal),
    )
    np.testing.assert_allclose(objective, np.mean(along + 4 * away), rtol=1e-5)


@pytest.mark.parametrize("ideal", [-1.0, [-1.0, -1.0, -1.0]], ids=["one", "sequence"])
@pytest.mark.parametrize("method", [conditional.smooth_chebyshev, conditional.pbi])
def test_ideal_values_are_given_as_everywhere(method, ideal):
    losses, weights = random_problem()
    expected = method(losses, weights, ideal=dict.fromkeys(NAMES, -1.0))
    np.testing.assert_array_equal(method(losses, weights, ideal=ideal), expected)


def test_stch_weighs_by_the_gradient_of_smooth_chebyshev():
    losses, preference = {"a": 1.0, "b": 3.0, "c": 2.0}, {"a": 0.2, "b": 0.5, "c": 0.3}
    weighting = weightings.stch(preference=preference, ideal=0.5)
    weights, _ = weighting.update(losses, weighting.init(losses))
    slopes = jax.grad(conditional.smooth_chebyshev)(losses, preference, ideal=0.5)
    for name in losses:
        np.testing.assert_allclose(weights[name], slopes[name], rtol=1e-6)


def test_the_golden_value_of_cosmos():
    value = conditional.cosmos({"a": 2.0, "b": 1.0}, {"a": 0.3, "b": 0.7}, penalty=2.0)
    np.testing.assert_allclose(value, -0.226773, atol=1e-6)
    # A batch shares one draw: the objective is that of the means.
    losses = {"a": jnp.array([1.0, 3.0]), "b": jnp.array([0.0, 2.0])}
    weights = {"a": jnp.full(2, 0.3), "b": jnp.full(2, 0.7)}
    batch = conditional.conditional_loss(
        losses, weights, scalarization=conditional.cosmos, groups=1
    )
    np.testing.assert_allclose(batch, -0.226773, atol=1e-6)


@pytest.mark.parametrize(
    "scalarization",
    [conditional.cosmos, conditional.smooth_chebyshev, conditional.pbi],
)
def test_zero_losses_and_zero_weights_have_finite_gradients(scalarization):
    some = {"a": jnp.array([0.0, 1.0, 0.0]), "b": jnp.array([0.0, 2.0, 0.0])}
    other = {"a": jnp.array([1.0, 0.0, 0.0]), "b": jnp.array([1.0, 0.0, 0.0])}
    total = lambda losses, weights: scalarization(losses, weights).sum()
    value, gradients = jax.value_and_grad(total, argnums=(0, 1))(some, other)
    for leaf in jax.tree.leaves((value, gradients)):
        assert np.isfinite(leaf).all()


@pytest.mark.parametrize("size", [1e7, 1e12])
def test_losses_far_above_the_smoothing_have_a_maximum_and_a_slope(size):
    draws = np.random.default_rng(0).uniform(0.1, 2, (50, 3))
    soft = lambda x: conditional.smooth_chebyshev(list(x), [1.0] * 3, smoothing=1e-3)
    losses = jnp.asarray(size * draws, jnp.float32)
    values, slopes = jax.lax.map(jax.value_and_grad(soft), losses)
    np.testing.assert_allclose(values, losses.max(1), rtol=1e-6)
    np.testing.assert_allclose(slopes, losses == losses.max(1, keepdims=True))


def test_limits_of_the_smooth_maximum():
    losses, weights = random_problem()
    terms = columns(losses) * columns(weights)
    sharp = conditional.smooth_chebyshev(losses, weights, smoothing=1e-4)
    np.testing.assert_allclose(sharp, terms.max(axis=1), rtol=1e-4)
    total = lambda losses, mu: jnp.sum(
        conditional.smooth_chebyshev(losses, weights, smoothing=mu)
    )
    # Where its value is not known, 0 is the maximum itself, with its gradient.
    value, slope = jax.jit(jax.value_and_grad(total))(losses, 0.0)
    np.testing.assert_allclose(value, terms.max(axis=1).sum(), rtol=1e-6)
    largest = terms == terms.max(axis=1, keepdims=True)
    np.testing.assert_allclose(columns(slope), largest * columns(weights), rtol=1e-6)
    soft = conditional.smooth_chebyshev(losses, weights, smoothing=1e4) - 1e4 * np.log(
        3
    )
    np.testing.assert_allclose(soft, terms.mean(axis=1), atol=0.02)


def minimize(objective, start, steps=3000, rate=0.05):
    """Gradient descent with a rate that falls to 0, many weightings side by side."""

    def step(x, k):
        gradient = jax.grad(lambda x: objective(x).sum())(x)
        scale = rate * 0.5 * (1 + jnp.cos(jnp.pi * k / steps))
        return x - scale * jnp.clip(gradient, -1, 1), None

    return jax.jit(lambda x: jax.lax.scan(step, x, jnp.arange(steps))[0])(start)


def test_minimisers_on_a_convex_front_are_where_theory_says():
    """Of the losses x^2 and (1 - x)^2, whose front is sqrt(l) + sqrt(m) = 1."""
    w = jnp.linspace(0.1, 0.9, 9)
    weights = {"l": w, "m": 1 - w}
    losses_at = lambda x: {"l": x**2, "m": (1 - x) ** 2}
    start = jnp.full_like(w, 0.5)
    at = lambda f, **keywords: minimize(
        lambda x: f(losses_at(x), weights, **keywords), start
    )
    np.testing.assert_allclose(at(conditional.weighted_sum), 1 - w, atol=1e-4)

    x = at(conditional.smooth_chebyshev, smoothing=1e-3)
    losses = losses_at(x)
    np.testing.assert_allclose(w * losses["l"], (1 - w) * losses["m"], atol=5e-3)
    x_exact = jnp.sqrt(1 - w) / (jnp.sqrt(w) + jnp.sqrt(1 - w))
    np.testing.assert_allclose(x, x_exact, atol=5e-3)

    x = at(conditional.pbi, penalty=10.0)
    x_exact = jnp.sqrt(w) / (jnp.sqrt(w) + jnp.sqrt(1 - w))
    np.testing.assert_allclose(x, x_exact, atol=5e-3)


def test_on_a_concave_front_linear_weights_find_only_its_ends():
    w = jnp.array([0.3, 0.45, 0.55, 0.7])
    weights = {"l": w, "m": 1 - w}

    def losses_at(free):
        x = jax.nn.sigmoid(free)
        return {"l": x, "m": 1 - x**2}

    start = jnp.full_like(w, 0.3)
    linear, chebyshev = (
        jax.nn.sigmoid(minimize(lambda x: f(losses_at(x), weights), start, rate=0.3))
        for f in (
            conditional.weighted_sum,
            functools.partial(conditional.smooth_chebyshev, smoothing=1e-3),
        )
    )
    assert ((linear < 0.01) | (linear > 0.99)).all()
    # w x = (1 - w)(1 - x^2)
    ratio = w / (1 - w)
    exact = (-ratio + jnp.sqrt(ratio**2 + 4)) / 2
    np.testing.assert_allclose(chebyshev, exact, atol=0.01)


# Families.


def test_the_pinball_loss():
    rng = np.random.default_rng(0)
    y, p = rng.normal(size=(2, 6, 3))
    tau = rng.uniform(size=6)
    error = y - p
    expected = np.where(error > 0, tau[:, None] * error, (tau[:, None] - 1) * error)
    loss = conditional.pinball_loss(p, y, tau)
    np.testing.assert_allclose(loss, expected.mean(axis=1), rtol=1e-5)
    one = conditional.pinball_loss(p, y, 0.5)
    np.testing.assert_allclose(one, abs(error).mean(axis=1) / 2, rtol=1e-5)
    # Differences of low-precision numbers are taken in float32.
    near = jnp.array([1000.0], jnp.bfloat16), jnp.array([1.0], jnp.bfloat16)
    loss = conditional.pinball_loss(*near, 1.0 - 2.0**-10)
    np.testing.assert_allclose(loss, 999 * 2.0**-10, rtol=1e-6)
    assert loss.dtype == jnp.float32
    with pytest.raises(ValueError, match=r"\(6, 1\) and \(6,\)"):
        conditional.pinball_loss(p[:, :1], y[:, 0], tau)
    with pytest.raises(ValueError, match=r"one shape \(n, ...\)"):
        conditional.pinball_loss(1.0, 2.0, 0.5)
    with pytest.raises(ValueError, match=r"quantile must be a scalar or have shape"):
        conditional.pinball_loss(p, y, tau[:3])


def test_the_focal_loss():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(8, 4)), rng.integers(0, 4, 8)
    gamma = rng.uniform(0, 5, 8)
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    right = p[np.arange(8), labels]
    loss = conditional.focal_loss(logits, labels, gamma)
    np.testing.assert_allclose(loss, -((1 - right) ** gamma) * np.log(right), rtol=1e-5)
    plain = conditional.focal_loss(logits, labels, 0.0)
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    np.testing.assert_allclose(plain, expected, rtol=1e-5)
    with pytest.raises(ValueError, match=r"got \(8, 4\) and \(8, 1\)"):
        conditional.focal_loss(logits, labels[:, None], 1.0)
    with pytest.raises(ValueError, match="at least two classes"):
        conditional.focal_loss(logits[:, :1], labels, 1.0)


@pytest.mark.parametrize("classes", [2, 5])
def test_the_focal_loss_of_extreme_logits(classes):
    logits = 1e4 * np.array([[1.0] + [-1.0] * (classes - 1)] * 2, np.float32)
    labels = np.array([0, 1])

    @jax.jit
    def both(logits, gamma):
        total = lambda x, g: conditional.focal_loss(x, labels, g).sum()
        value = conditional.focal_loss(logits, labels, gamma)
        return value, jax.grad(total, argnums=(0, 1))(logits, gamma)

    for gamma in (0.0, 0.5, 2.0):
        value, gradients = both(logits, gamma)
        np.testing.assert_allclose(value, [0, 2e4], rtol=1e-6)
        for leaf in jax.tree.leaves(gradients):
            assert np.isfinite(leaf).all()


def test_a_grid_of_too_many_models_says_so():
    low = {str(k): 0.1 for k in range(40)}
    support = conditional.LogUniform(low, 10.0)
    with pytest.raises(ValueError, match="use sample instead"):
        support.grid(2)


def test_narrowing_leaves_a_pinned_weight_where_it_is():
    pinned = conditional.LogUniform({"a": 1.0, "b": 0.1}, {"a": 1.0, "b": 10.0})
    wider = conditional.LogUniform({"a": 0.1, "b": 0.01}, {"a": 10.0, "b": 100.0})
    narrowed = conditional.narrow(pinned, {"a": 5.0, "b": 1.0}, 0.5, support=wider)
    np.testing.assert_array_equal(narrowed.low[0], 1.0)
    np.testing.assert_array_equal(narrowed.high[0], 1.0)
    np.testing.assert_allclose(narrowed.high[1] / narrowed.low[1], 10.0, rtol=1e-4)


def test_weights_of_low_precision_may_be_rounded_over_the_edge():
    support = conditional.LogUniform({"a": 0.01}, {"a": 0.3})
    end = jnp.bfloat16(0.3)
    assert float(end) > 0.3 * (1 + 1e-4)
    np.testing.assert_array_equal(conditional.encode({"a": end}, support), [1.0])
    with pytest.raises(ValueError, match="outside its range"):
        conditional.encode({"a": float(end)}, support)


def test_an_example_that_cannot_be_wrong_has_no_focal_loss():
    logits = jnp.array([[0.0, -jnp.inf]])
    for gamma in (0.0, 2.0):
        loss = conditional.focal_loss(logits, jnp.array([0]), gamma)
        np.testing.assert_array_equal(loss, [0.0])


@pytest.mark.parametrize("classes", [2, 3, 40])
def test_an_example_that_cannot_be_wrong_has_no_slope(classes):
    masked = jnp.full(classes, -jnp.inf).at[0].set(0.0)
    logits = jnp.stack([masked, jnp.linspace(0.0, 1.0, classes)])
    labels = jnp.array([0, 0])
    total = lambda x, gamma: conditional.focal_loss(x, labels, gamma).sum()
    for gamma in (0.0, 0.5, 2.0):
        slopes, by_gamma = jax.grad(total, argnums=(0, 1))(logits, gamma)
        np.testing.assert_array_equal(slopes[0], np.zeros(classes))
        alone = lambda x, g: conditional.focal_loss(x, labels[1:], g).sum()
        wanted = jax.grad(alone, argnums=(0, 1))(logits[1:], gamma)
        np.testing.assert_allclose(slopes[1:], wanted[0], rtol=1e-6)
        np.testing.assert_allclose(by_gamma, wanted[1], rtol=1e-6)


def test_a_seed_stands_for_its_key():
    support = log_uniform(2)
    typed = support.sample(jax.random.key(3), 4)
    for key in (3, np.int64(3), np.uint32(3), jax.random.PRNGKey(3)):
        for name, found in support.sample(key, 4).items():
            np.testing.assert_array_equal(found, typed[name])
    made = [conditional.init_film(key, 1, 2) for key in (3, jax.random.key(3))]
    jax.tree.map(np.testing.assert_array_equal, *made)


def test_what_is_not_known_under_jit_arrives_as_nan():
    logits, nan = jnp.zeros((3, 2)), np.isnan
    loss = jax.jit(conditional.focal_loss)(logits, jnp.array([1, 2, -1]), 1.0)
    assert nan(loss).tolist() == [False, True, True]
    gamma = jnp.array([0.0, -1.0, jnp.nan])
    loss = jax.jit(conditional.focal_loss)(logits, jnp.array([0, 1, 1]), gamma)
    assert nan(loss).tolist() == [False, True, True]
    weights = {"a": jnp.array([1.0, jnp.nan])}
    assert nan(jax.jit(conditional.conditional_loss)({"a": jnp.ones(2)}, weights))


PAIR = conditional.LogUniform({"a": 1.0, "b": 0.1}, {"a": 1.0, "b": 1.0})
SHARES = conditional.Dirichlet({str(k): 1.0 for k in range(12)})
KEY = np.uint32([0, 0])
LOSSES = {"a": np.float32([1, 2]), "b": np.float32([3, 4])}
LEVELS = {"a": np.float32([1, 1]), "b": np.float32([0.5, 1])}
LABELS = np.array([0, 1])
loss_of = conditional.conditional_loss
HOSTILE = {
    "key float": (lambda: PAIR.sample(1.0, 2), TypeError, "key must be .*got 1.0"),
    "key none": (lambda: PAIR.sample(None, 2), TypeError, "key must be .*got None"),
    "key bool": (lambda: PAIR.sample(True, 2), TypeError, "key must be .*got True"),
    "n float": (lambda: PAIR.sample(KEY, 2.0), TypeError, "n must be an integer"),
    "n bool": (lambda: PAIR.sample(KEY, True), TypeError, "n must be an integer"),
    "n text": (lambda: PAIR.sample(KEY, "2"), TypeError, "n must be an integer"),
    "groups": (
        lambda: PAIR.sample(KEY, 4, groups=2.0),
        TypeError,
        "groups must be an integer",
    ),
    "grid": (lambda: PAIR.grid(2.5), TypeError, "n must be an integer, got 2.5"),
    "large grid": (lambda: SHARES.grid(40), ValueError, "use sample instead.*random"),
    "few columns": (lambda: PAIR.tree(np.ones((3, 1))), ValueError, "last axis of 2"),
    "more columns": (lambda: PAIR.tree(np.ones((3, 5))), ValueError, "last axis of 2"),
    "no columns": (lambda: PAIR.tree(1.0), ValueError, "last axis of 2"),
    "text bound": (
        lambda: conditional.Uniform({"a": "1"}, 2.0),
        TypeError,
        "bound of loss 'a' must be a number",
    ),
    "text alpha": (
        lambda: conditional.Dirichlet({"a": "1", "b": 1.0}),
        TypeError,
        "concentration of loss 'a' must be a number",
    ),
    "center": (
        lambda: conditional.narrow(PAIR, {"a": 1.0, "b": np.nan}, 0.5),
        ValueError,
        "center must be finite",
    ),
    "narrow none": (
        lambda: conditional.narrow(None, {"a": 1.0}, 0.5),  # type: ignore
        TypeError,
        "got NoneType",
    ),
    "swapped": (
        lambda: conditional.encode(PAIR, LEVELS),
        TypeError,
        "support must be a distribution.*got dict",
    ),
    "support": (
        lambda: conditional.encoding_size(None),
        TypeError,
        "support must be a distribution.*got NoneType",
    ),
    "nan weight": (
        lambda: loss_of(LOSSES, {**LEVELS, "b": np.float32([np.nan, 1])}),
        ValueError,
        "weight of loss 'b' must be non-negative and finite, got nan for 1 of 2",
    ),
    "negative weight": (
        lambda: loss_of(LOSSES, {**LEVELS, "b": np.float32([-1, -1])}),
        ValueError,
        "weight of loss 'b' must be non-negative and finite, got -1 for 2 of 2",
    ),
    "text scalarization": (
        lambda: loss_of(LOSSES, LEVELS, scalarization="cosmos"),
        TypeError,
        "scalarization must be a function.*got 'cosmos'",
    ),
    "normalize": (
        lambda: loss_of(LOSSES, LEVELS, normalize=np.ones(2)),
        ValueError,
        "normalize must be None",
    ),
    "geometric": (
        lambda: loss_of(
            LOSSES, {**LEVELS, "b": np.float32([0, 1])}, normalize="geometric"
        ),
        ValueError,
        "normalize='geometric' must give a positive number.*got 0",
    ),
    "float groups": (
        lambda: loss_of(LOSSES, LEVELS, groups=2.0),
        TypeError,
        "groups must be an integer",
    ),
    "complex": (
        lambda: loss_of({**LOSSES, "a": np.complex64([1j, 1])}, LEVELS),
        TypeError,
        "losses must be real numbers",
    ),
    "nothing": (lambda: loss_of(None, None), ValueError, "no losses to weigh"),
    "no weights": (lambda: loss_of(LOSSES, None), ValueError, "unexpected: 'a', 'b'"),
    "cosmos": (
        lambda: conditional.cosmos(LOSSES, LEVELS, penalty=-2.0),
        ValueError,
        "penalty must not be negative",
    ),
    "pbi": (
        lambda: conditional.pbi(LOSSES, LEVELS, penalty=np.nan),
        ValueError,
        "penalty must not be negative, got nan",
    ),
    "chebyshev": (
        lambda: conditional.smooth_chebyshev(LOSSES, LEVELS, smoothing=0.0),
        ValueError,
        "smoothing must be positive",
    ),
    "quantile": (
        lambda: conditional.pinball_loss(np.zeros(2), np.ones(2), 90.0),
        ValueError,
        r"quantile must be in \(0, 1\), got 90",
    ),
    "float labels": (
        lambda: conditional.focal_loss(np.zeros((2, 2)), np.ones(2), 1.0),
        TypeError,
        "labels must be integers, got dtype float",
    ),
    "labels": (
        lambda: conditional.focal_loss(np.zeros((2, 2)), LABELS + 4, 1.0),
        ValueError,
        "labels must be from 0 to 1, got 4 to 5",
    ),
    "gamma": (
        lambda: conditional.focal_loss(np.zeros((2, 2)), LABELS, -1.0),
        ValueError,
        "gamma must not be negative",
    ),
    "film key": (lambda: conditional.init_film(None, 1, 3), TypeError, "key must be"),
    "no features": (
        lambda: conditional.init_film(KEY, 1, 0),
        ValueError,
        "features and hidden must be positive",
    ),
    "no encoding": (
        lambda: conditional.init_gate(-1, 3),
        ValueError,
        "encoding_size must not be negative",
    ),
    "float size": (
        lambda: conditional.init_gate(1.0, 3),
        TypeError,
        "encoding_size must be an integer",
    ),
    "hidden": (
        lambda: conditional.init_film(KEY, 1, 3, hidden=64),
        TypeError,
        "hidden must be a sequence of widths, got 64",
    ),
    "modulation": (
        lambda: conditional.init_modulation("key", 1, {"w": np.ones((2, 3))}),
        TypeError,
        "key must be .*got 'key'",
    ),
    "complex points": (
        lambda: conditional.pareto_front(np.ones((3, 2), np.complex64)),
        TypeError,
        "points must be real numbers",
    ),
    "no objectives": (
        lambda: conditional.pareto_front(np.ones((3, 0))),
        ValueError,
        r"points must be a tree of arrays \(n,\)",
    ),
    "text reference": (
        lambda: conditional.hypervolume(np.ones((3, 2)), "4"),
        ValueError,
        "one number for each objective, got '4'",
    ),
    "two metrics": (
        lambda: conditional.select(
            {"a/b": np.ones(2), "a": {"b": np.ones(2)}}, minimize="a/b"
        ),
        ValueError,
        "two metrics have the same path 'a/b'",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), HOSTILE.values(), ids=HOSTILE)
def test_what_would_go_wrong_in_silence_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
