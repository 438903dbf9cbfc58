"""Gradients with a memory, one for each loss, and the methods that are made of it."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import yoto_jax as yoto
from tests.oracles import stacked as oracles
from yoto_jax import weightings

pytestmark = pytest.mark.usefixtures("quick_compilation")

PARAMS = {"w": jnp.zeros((2, 3)), "b": jnp.zeros(2), "none": None}
NAMES = {"a": 0.0, "b": 0.0, "c": 0.0}


def rows_of(seed, count=3):
    rng = np.random.default_rng(seed)
    draw = lambda p: jnp.asarray(
        rng.normal(0.3, 1, (count, *p.shape))
        * rng.uniform(0.2, 2, (count, *[1] * p.ndim)),
        jnp.float32,
    )
    return jax.tree.map(draw, PARAMS)


def flat(rows, count=3):
    return np.concatenate(
        [np.reshape(x, (count, -1)) for x in jax.tree.leaves(rows)], axis=1
    ).astype(float)


def vector(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]).astype(float)


def run(tx, batches, **options):
    """Updates of a compiled chain, one vector for each batch."""
    state, update = tx.init(PARAMS), jax.jit(tx.update)
    for rows in batches:
        updates, state = update(rows, state, PARAMS, **options)
        yield vector(updates), state


BATCHES = [rows_of(seed) for seed in range(6)]


@pytest.mark.parametrize(("gamma", "rho"), [(0.1, 0.0), (0.05, 0.5), (3.0, 0.0)])
def test_moco_is_an_average_and_a_weighting(gamma, rho):
    weighting = weightings.moco(learning_rate=gamma, regularization=rho)
    memory = yoto.per_loss(optax.ema(0.7, debias=False), 3)
    tx = optax.chain(memory, yoto.aggregate(weighting, 3))
    expected = oracles.moco([flat(x) for x in BATCHES], 0.3, gamma, rho)
    for (got, state), (weights, direction) in zip(
        run(tx, BATCHES), expected, strict=True
    ):
        np.testing.assert_allclose(got, direction, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(
            optax.tree.get(state, "loss_weights"), weights, atol=1e-5
        )


@pytest.mark.parametrize("sigma", [0.0, 0.5])
def test_db_mtl_is_an_average_with_a_decay_that_decays_and_a_weighting(sigma):
    ema = optax.inject_hyperparams(optax.ema, static_args="debias")
    memory = ema(decay=lambda n: 0.9 / (n + 1.0) ** sigma, debias=False)
    tx = optax.chain(yoto.per_loss(memory, 3), yoto.aggregate(weightings.db_mtl(), 3))
    expected = oracles.db_mtl([flat(x) for x in BATCHES], 0.9, sigma)
    for (got, _), direction in zip(run(tx, BATCHES), expected, strict=True):
        np.testing.assert_allclose(got, direction, rtol=1e-4, atol=1e-5)


def test_adatask_is_adam_of_each_loss_and_the_sum():
    total = yoto.aggregate(weightings.static(1.0), 3)
    adam = yoto.per_loss(optax.scale_by_adam(), 3)
    tx = optax.chain(adam, total, optax.scale_by_learning_rate(0.01))
    expected = oracles.adatask([flat(x) for x in BATCHES], 0.01)
    options = {"losses": (1.0, 1.0, 1.0)}
    for (got, _), step in zip(run(tx, BATCHES, **options), expected, strict=True):
        np.testing.assert_allclose(got, step, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("gamma", "rho"), [(0.1, 0.0), (0.05, 0.5), (3.0, 0.0)])
def test_modo_steps_on_the_products_of_two_batches(gamma, rho):
    weighting = weightings.modo(learning_rate=gamma, regularization=rho)
    tx = yoto.aggregate(weighting, 3)
    state, update = tx.init(PARAMS), jax.jit(tx.update)
    pairs = [(rows_of(2 * n), rows_of(2 * n + 1)) for n in range(5)]
    expected = oracles.modo([(flat(x), flat(y)) for x, y in pairs], gamma, rho)
    for (first, second), (weights, direction) in zip(pairs, expected, strict=True):
        cross = yoto.cross_gramian(first, second)
        mean = jax.tree.map(lambda x, y: (x + y) / 2, first, second)
        got, state = update(mean, state, PARAMS, cross_gramian=cross)
        np.testing.assert_allclose(2 * vector(got), direction, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(state.loss_weights, weights, atol=1e-5)
    assert int(state.num_updates) == 5


@pytest.mark.parametrize(
    ("rate", "strength", "preference"),
    [(10.0, 0.3, None), (1.0, 0.0, None), (1.0, 2.0, (0.5, 0.25, 0.25))],
)
def test_sdmgrad_is_that_of_the_authors(rate, strength, preference):
    sdmgrad = weightings.sdmgrad(
        learning_rate=rate, regularization=strength, preference=preference
    )
    pairs = [(flat(rows_of(2 * n)), flat(rows_of(2 * n + 1))) for n in range(5)]
    matrices = [x @ (x + 0.5 * y).T for x, y in pairs]
    wanted = np.full(3, 1 / 3) if preference is None else np.array(preference)
    state, update = sdmgrad.init([0.0] * 3), jax.jit(sdmgrad.update)
    expected = oracles.sdmgrad(matrices, strength, wanted, rate)
    for matrix, weights in zip(matrices, expected, strict=True):
        got, state = update([0.0] * 3, state, cross_gramian=jnp.float32(matrix))
        np.testing.assert_allclose(np.stack(got), weights, atol=1e-3)
    # No scale of all gradients makes a difference, nor does a gradient of nothing.
    first = sdmgrad.init([0.0] * 3)
    got, _ = update([0.0] * 3, first, cross_gramian=jnp.float32(matrices[0]))
    tiny, _ = update([0.0] * 3, first, cross_gramian=jnp.float32(matrices[0] * 1e-30))
    np.testing.assert_allclose(np.stack(tiny), np.stack(got), atol=1e-4)
    _, state = update([0.0] * 3, first, cross_gramian=jnp.zeros((3, 3)))
    assert int(state.num_skipped) == 0


@pytest.mark.parametrize("length", [1.0, 10.0, 1000.0])
def test_sdmgrad_converges_beside_a_long_gradient(length):
    """To the shortest combination, whose products with all gradients are equal."""
    rows = np.array([[1, 0, 0, 0], [-0.5, 1, 0, 0], [-0.5, 0, 1, 0], [-0.5, 0, 0, 1]])
    rows[0] *= length
    weighting = weightings.sdmgrad(regularization=0.0)
    losses = [0.0] * 4
    state, update = weighting.init(losses), jax.jit(weighting.update)
    cross = jnp.float32(rows @ rows.T)
    for _ in range(10):
        weights, state = update(losses, state, cross_gramian=cross)
    best = np.linalg.solve(rows @ rows.T, np.ones(4))
    np.testing.assert_allclose(weights, best / best.sum(), rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("wide", [False, True])
def test_sdmgrad_of_float32_losses_where_there_is_float64(wide):
    options = {"regularization": np.float64(0.3), "learning_rate": np.float64(1.0)}
    with jax.enable_x64(True):
        weighting = weightings.sdmgrad(**options if wide else {})
        losses = [jnp.float32(1.0), jnp.float32(2.0)]
        weights, _ = weighting.update(
            losses, weighting.init(losses), cross_gramian=jnp.eye(2)
        )
    np.testing.assert_allclose(weights, 0.5, rtol=1e-6)


def test_with_one_batch_for_both_modo_is_moco():
    modo, moco = (yoto.aggregate(w(), 3) for w in (weightings.modo, weightings.moco))
    one = two = moco.init(PARAMS)
    for rows in BATCHES:
        cross = yoto.cross_gramian(rows, rows)
        _, one = modo.update(rows, one, cross_gramian=cross)
        _, two = moco.update(rows, two)
    chex.assert_trees_all_close(one, two, rtol=1e-5)


def test_moco_goes_to_the_weights_of_mgda():
    gramian = flat(BATCHES[0]) @ flat(BATCHES[0]).T
    rate = 1 / np.linalg.eigvalsh(gramian)[-1]
    moco = weightings.moco(learning_rate=rate)
    update = jax.jit(moco.update)
    state = moco.init(NAMES)
    for _ in range(300):
        weights, state = update(NAMES, state, gramian=jnp.float32(gramian))
    mgda = weightings.mgda()
    expected, _ = mgda.update(NAMES, mgda.init(NAMES), gramian=jnp.float32(gramian))
    chex.assert_trees_all_close(weights, expected, atol=1e-3)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e6])
@pytest.mark.parametrize("count", [1, 2, 5, 40])
def test_the_projection_is_that_of_the_authors(count, scale):
    modo = weightings.modo(learning_rate=1.0)
    for seed in range(5):
        matrix = np.random.default_rng(seed).normal(size=(count, count)) * scale
        losses = [0.0] * count
        weights, _ = modo.update(
            losses, modo.init(losses), cross_gramian=jnp.float32(matrix)
        )
        start = np.full(count, 1 / count)
        expected = oracles.project_to_simplex(start - matrix @ start)
        np.testing.assert_allclose(
            np.stack(weights), expected, atol=2e-7 * scale + 1e-6
        )


def test_the_engine_takes_the_products_of_halves_as_a_statistic():
    def loss_fn(w, x):
        return {"fit": jnp.mean((x @ w - 1) ** 2), "size": jnp.mean(w**2)}

    gradients = yoto.value_and_jacobian(loss_fn)

    def of_halves(w, x):
        (_, first), (_, second) = gradients(w, x[::2]), gradients(w, x[1::2])
        return yoto.cross_gramian(first, second)

    modo = weightings.modo()
    step = yoto.value_and_grad(loss_fn, modo, statistics={"cross_gramian": of_halves})
    w, x = jnp.arange(3.0), jax.random.normal(jax.random.key(0), (8, 3))
    _, _, state = jax.jit(step)(w, modo.init({"fit": 0.0, "size": 0.0}), x)
    matrix = np.asarray(of_halves(w, x), float)
    start = np.full(2, 0.5)
    expected = oracles.project_to_simplex(start - 0.1 * matrix @ start)
    got = [float(state.loss_weights[name]) for name in ("fit", "size")]
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("count", [1, 3, 7])
def test_the_cross_gramian_of_any_arrays(count):
    first, second = rows_of(0, count), rows_of(1, count)
    expected = flat(first, count) @ flat(second, count).T
    got = jax.jit(yoto.cross_gramian)(first, second)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), first)
    assert yoto.cross_gramian(half, half).dtype == jnp.float32


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight (virtual) devices")
@pytest.mark.parametrize("count", [3, 7])
def test_the_cross_gramian_on_eight_devices_that_hold_parts_is_that_on_one(count):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = {"part": jax.P("d"), "whole": jax.P()}
    rows = {"part": jax.P(None, "d"), "whole": jax.P()}
    first, second = (
        {
            "part": jax.random.normal(jax.random.key(n), (count, 8, 2)),
            "whole": jax.random.normal(jax.random.key(n), (count, 5)),
        }
        for n in range(2)
    )
    shard = jax.shard_map(
        lambda x, y: yoto.cross_gramian(x, y, param_specs=specs),
        mesh=mesh,
        in_specs=(rows, rows),
        out_specs=jax.P(),
    )
    got, expected = jax.jit(shard)(first, second), yoto.cross_gramian(first, second)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_gradients_of_two_batches_must_be_alike():
    first = {"a": jnp.ones((2, 3)), "b": jnp.ones((2, 1))}
    with pytest.raises(ValueError, match="other batch do not match.*missing: 'b'"):
        yoto.cross_gramian(first, {"a": first["a"]})
    for shape in ((2, 3), (1, 1), (3, 1), ()):
        with pytest.raises(ValueError, match="'b' must have one shape in both"):
            yoto.cross_gramian(first, first | {"b": jnp.ones(shape)})
    uneven = first | {"b": jnp.ones((1, 1))}
    with pytest.raises(ValueError, match="'b' must have one shape.* losses"):
        yoto.cross_gramian(uneven, uneven)
    with pytest.raises(ValueError, match="no leaves"):
        yoto.cross_gramian({}, {})


# The link itself.


def test_each_row_goes_through_a_transformation_of_its_own():
    inner = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())
    tx = yoto.per_loss(inner, 3)
    state, alone = tx.init(PARAMS), [inner.init(PARAMS)] * 3
    for rows in BATCHES[:3]:
        got, state = tx.update(rows, state, PARAMS)
        for k in range(3):
            row = jax.tree.map(lambda x, k=k: x[k], rows)
            want, alone[k] = inner.update(row, alone[k], PARAMS)
            mine = jax.tree.map(lambda x, k=k: x[k], got)
            chex.assert_trees_all_close(mine, want, rtol=1e-4, atol=1e-6)


def test_a_bare_average_changes_its_shape_which_this_one_does_not():
    bare = optax.ema(0.9)
    rows = jnp.ones((3, 2))
    with jax.numpy_rank_promotion("allow"):
        _, after = bare.update(rows, bare.init(jnp.zeros(2)))
    assert after.ema.shape != bare.init(jnp.zeros(2)).ema.shape
    tx = yoto.per_loss(bare, 3)
    step = lambda state, rows: tx.update(rows, state)[::-1]
    batches = jax.random.normal(jax.random.key(0), (2, 5, 3, 2))
    first = tx.init(jnp.zeros(2))
    many = jax.jit(jax.vmap(lambda x: jax.lax.scan(step, first, x)))
    (last, got) = many(batches)
    state = first
    for n in range(5):
        updates, state = tx.update(batches[1, n], state)
        np.testing.assert_allclose(got[1, n], updates, rtol=1e-5)
    assert last.ema.shape == (2, 3, 2)


def test_chains_with_a_memory_are_exported():
    pytest.importorskip("flatbuffers")
    tx = optax.chain(
        yoto.per_loss(optax.ema(0.9), 3), yoto.aggregate(weightings.moco(), 3)
    )
    exported = jax.export.export(jax.jit(tx.update))(BATCHES[0], tx.init(PARAMS))
    assert exported.serialize()


def test_absent_losses_keep_their_state():
    tx = optax.chain(
        yoto.per_loss(optax.ema(0.9), NAMES), yoto.aggregate(weightings.moco(), NAMES)
    )
    state = tx.init(PARAMS)
    _, state = tx.update(BATCHES[0], state)
    there = {"a": True, "b": False, "c": True}
    rows = jax.tree.map(lambda x: x.at[1].set(jnp.nan), BATCHES[1])
    updates, after = tx.update(rows, state, present=there)
    chex.assert_tree_all_finite(updates)
    assert after[0].count.tolist() == [2, 1, 2]
    row = lambda tree: jax.tree.map(lambda x: x[1], tree)
    chex.assert_trees_all_equal(row(after[0]), row(state[0]))
    assert after[1].loss_weights["b"] == state[1].loss_weights["b"]
    assert int(after[1].num_skipped) == 0


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_bad_batch_is_skipped_counted_and_forgotten(bad):
    tx = optax.chain(
        yoto.per_loss(optax.ema(0.9), 3), yoto.aggregate(weightings.moco(), 3)
    )
    _, state = tx.update(BATCHES[0], tx.init(PARAMS))
    broken = BATCHES[1] | {"b": BATCHES[1]["b"].at[2, 0].set(bad)}
    updates, after = tx.update(broken, state)
    assert not np.isfinite(vector(updates)).all()  # For the optimizer to see.
    assert int(after[1].num_skipped) == 1
    chex.assert_trees_all_equal(after[0], state[0])
    chex.assert_trees_all_equal(after[1].inner, state[1].inner)
    guarded = yoto.skip_outliers(tx, losses=3)
    updates, after = guarded.update(
        broken, guarded.init(PARAMS), losses=(1.0, 1.0, 1.0)
    )
    assert not vector(updates).any()
    assert int(after.num_skipped) == 1


def test_dtypes_zero_gradients_and_forty_losses():
    tx = optax.chain(
        yoto.per_loss(optax.ema(0.9, accumulator_dtype=jnp.float32), 40),
        yoto.aggregate(weightings.db_mtl(), 40),
    )
    params = jnp.zeros(64, jnp.bfloat16)
    rows = jax.random.normal(jax.random.key(0), (40, 64), jnp.bfloat16).at[3].set(0)
    updates, state = jax.jit(tx.update)(rows, tx.init(params))
    assert updates.dtype == jnp.float32  # As ``optax.ema`` has it.
    assert state[0].ema.dtype == jnp.float32
    assert jnp.all(jnp.isfinite(updates))
    assert state[1].loss_weights[3] == 0
    updates, _ = tx.update(0 * rows, tx.init(params))
    assert not updates.any()


def test_errors_name_what_is_wrong():
    tx = yoto.per_loss(optax.ema(0.9), NAMES)
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match=r"length 3.*'a', 'b', 'c'.*\(2, 2\)"):
        tx.update(rows_of(0, 2), state)
    assert yoto.per_loss(optax.ema(0.9), np.int64(3)).init(PARAMS).count.shape == (3,)
    with pytest.raises(TypeError, match="must be an Optax transformation, got a func"):
        yoto.per_loss(optax.adam, 2)
    link = yoto.aggregate(weightings.modo(), 3)
    state = link.init(PARAMS)
    with pytest.raises(ValueError, match=r"needs cross_gramian="):
        link.update(BATCHES[0], state)
    with pytest.raises(ValueError, match=r"cross_gramian must have shape \(3, 3\)"):
        link.update(BATCHES[0], state, cross_gramian=jnp.ones(3))
    with pytest.raises(ValueError, match="learning_rate must be positive"):
        weightings.moco(learning_rate=0.0)
    with pytest.raises(ValueError, match="regularization must not be negative"):
        weightings.modo(regularization=-1.0)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight (virtual) devices")
@pytest.mark.parametrize("check", [True, False])
def test_eight_devices_that_hold_parts_equal_one(check):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = {"part": jax.P("d"), "whole": jax.P()}
    rows = {"part": jax.P(None, "d"), "whole": jax.P()}
    params = {"part": jnp.zeros((8, 2)), "whole": jnp.zeros(3)}

    def link(specs=None):
        memory = yoto.per_loss(optax.ema(0.9), 2, param_specs=specs)
        both = yoto.aggregate(weightings.modo(), 2, param_specs=specs)
        return optax.chain(memory, both)

    def step(tx, specs, first, second, state):
        cross = yoto.cross_gramian(first, second, param_specs=specs)
        return tx.update(first, state, cross_gramian=cross)

    state = expected = link().init(params)
    placed = jax.tree.map(lambda _: jax.P(), state)
    placed = (placed[0]._replace(ema=rows), placed[1])
    many = jax.shard_map(
        lambda *seen: step(link(specs), specs, *seen),
        mesh=mesh,
        in_specs=(rows, rows, placed),
        out_specs=(specs, placed),
        check_vma=check,
    )
    draw = lambda key: jax.tree.map(
        lambda p: jax.random.normal(jax.random.key(key), (2, *p.shape)), params
    )
    for n in range(4):
        first, second = draw(n), draw(n + 10)
        if n == 2:  # on one device
            first["part"] = first["part"].at[1, 5, 0].set(jnp.nan)
        got, state = jax.jit(many)(first, second, state)
        want, expected = step(link(), None, first, second, expected)
        chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(state, expected, rtol=1e-4, atol=1e-5)
    assert int(state[1].num_skipped) == 1
    assert state[0].count.tolist() == [3, 3]


def test_losses_draw_numbers_of_their_own():
    class Noise(NamedTuple):
        key: jax.Array

    def update(updates, state, params=None):
        key, own = jax.random.split(state.key)
        return jax.tree.map(
            lambda u: u + jax.random.normal(own, u.shape), updates
        ), Noise(key)

    inner = optax.GradientTransformation(lambda _: Noise(jax.random.key(0)), update)
    tx = yoto.per_loss(inner, 3)
    state = tx.init(jnp.zeros(4))
    for _ in range(2):
        drawn, state = tx.update(jnp.zeros((3, 4)), state)
        assert len(np.unique(drawn)) == 12
