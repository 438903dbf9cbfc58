"""Momenta of all losses, from the gradient of one loss at a time."""

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


def gradient(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    draw = lambda p: jnp.asarray(rng.normal(0.2, scale, p.shape), p.dtype)
    return jax.tree.map(draw, PARAMS)


def flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]).astype(float)


def m_config(losses=3, **options):
    return yoto.aggregate_momenta(weightings.config(), losses, **options)


def orders(count):
    rng = np.random.default_rng(0)
    return {
        "in turns": [n % count for n in range(4 * count)],
        "at random": rng.integers(0, count, 8 * count).tolist(),
    }


@pytest.mark.parametrize("order", ["in turns", "at random"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_update_is_that_of_the_authors_operator(count, order):
    tx = m_config(count)
    state, update = tx.init(PARAMS), jax.jit(tx.update)
    reference = oracles.PseudoMomentum(count, 8)
    for n, place in enumerate(orders(count)[order]):
        g = gradient(n, scale=10.0 ** (place - 1))
        updates, state = update(g, state, loss=jnp.int32(place))
        expected = reference.step(place, flat(g))
        np.testing.assert_allclose(flat(updates), expected, rtol=2e-3, atol=2e-4)
    assert int(state.num_combined) == reference.t > 0
    assert state.num_seen.tolist() == reference.t_grads.tolist()
    np.testing.assert_allclose(
        flat(state.second_moment), reference.s, rtol=1e-3, atol=1e-9
    )


def test_double_precision_is_that_of_the_operator_to_the_last_digits():
    rng = np.random.default_rng(0)
    reference = oracles.PseudoMomentum(3, 6)
    with jax.enable_x64(True):
        tx = m_config(3)
        state = tx.init(jnp.zeros(6))
        for n in range(9):
            g = rng.normal(size=6)
            updates, state = tx.update(jnp.asarray(g), state, loss=n % 3)
            expected = reference.step(n % 3, g)
            np.testing.assert_allclose(updates, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("promotion", ["standard", "strict"])
def test_options_wider_than_the_parameters_leave_the_state_its_type(promotion):
    with jax.enable_x64(True), jax.numpy_dtype_promotion(promotion):
        tx = m_config(2, b1=np.float64(0.5), b2=jnp.asarray(0.9), eps=np.float64(1e-8))
        state = tx.init(PARAMS)
        updates, after = tx.update(gradient(0), state, loss=0)
        chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, gradient(0))


def test_one_trace_whatever_the_loss_with_donation_and_export():
    tx = m_config(2)
    state = first = tx.init(PARAMS)
    step = jax.jit(lambda g, s, n: tx.update(g, s, loss=n), donate_argnums=1)
    for n in range(5):
        _, state = step(gradient(n), state, jnp.int32(n % 2))
    assert step._cache_size() == 1
    chex.assert_trees_all_equal_shapes_and_dtypes(state, tx.init(PARAMS))
    pytest.importorskip("flatbuffers")
    exported = jax.export.export(step)(gradient(0), state, jnp.int32(0))
    assert exported.serialize()
    assert jax.tree.structure(first) == jax.tree.structure(state)


def test_other_weightings_combine_as_they_do():
    tx = yoto.aggregate_momenta(weightings.upgrad(), 3, b1=0.5, b2=0.9)
    one = yoto.aggregate(weightings.upgrad(), 3)

    def combine(rows):
        return np.asarray(one.update(jnp.float32(rows), one.init(None))[0], float)

    reference = oracles.PseudoMomentum(3, 8, combine, b1=0.5, b2=0.9)
    state = tx.init(PARAMS)
    for n in range(8):
        updates, state = tx.update(gradient(n), state, loss=n % 3)
        expected = reference.step(n % 3, flat(gradient(n)))
        np.testing.assert_allclose(flat(updates), expected, rtol=1e-3, atol=1e-4)


def test_one_loss_is_adam():
    tx, adam = m_config(1), optax.scale_by_adam()
    state, reference = tx.init(PARAMS), adam.init(PARAMS)
    for n in range(5):
        updates, state = tx.update(gradient(n), state, loss=0)
        expected, reference = adam.update(gradient(n), reference)
        chex.assert_trees_all_close(updates, expected, rtol=1e-3, atol=1e-4)


def test_nothing_moves_before_every_loss_has_been_there():
    tx = m_config(NAMES)
    state = tx.init(PARAMS)
    for name in "aabb":
        updates, state = tx.update(gradient(0), state, loss=name)
        assert not flat(updates).any()
        assert int(state.inner.num_updates) == int(state.num_combined) == 0
    updates, state = tx.update(gradient(1), state, loss="c")
    assert flat(updates).all()
    assert state.num_seen.tolist() == [2, 2, 1]
    assert set(optax.tree.get(state, "loss_weights")) == set("abc")


@pytest.mark.parametrize("seen", [2, 3])
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_bad_gradient_changes_nothing_but_a_counter(bad, seen):
    tx = m_config(NAMES)
    state = tx.init(PARAMS)
    for name in "abc"[:seen]:
        _, state = tx.update(gradient(0), state, loss=name)
    broken = gradient(1) | {"b": jnp.array([1.0, bad])}
    updates, after = tx.update(broken, state, loss="b")
    assert np.isnan(flat(updates)).all()
    assert int(after.inner.num_skipped) == 1
    held = after._replace(inner=after.inner._replace(num_skipped=jnp.int32(0)))
    chex.assert_trees_all_equal(held, state)


def test_optax_skips_what_is_not_finite_around_it():
    tx = optax.apply_if_finite(m_config(2), max_consecutive_errors=3)
    state = tx.init(PARAMS)
    broken = jax.tree.map(lambda x: x * jnp.nan, gradient(0))
    updates, after = tx.update(broken, state, loss=1)
    assert not flat(updates).any()
    assert int(after.total_notfinite) == 1
    chex.assert_trees_all_equal(after.inner_state, state.inner_state)


def test_zero_gradients_and_forty_losses():
    tx = m_config(40)

    def step(state, n):
        g = jax.random.normal(jax.random.key(n), (64,)) * (n % 40 != 7)
        return tx.update(g, state, loss=n % 40)[::-1]

    state = tx.init(jnp.zeros(64))
    state, updates = jax.jit(lambda s: jax.lax.scan(step, s, jnp.arange(80)))(state)
    assert jnp.all(jnp.isfinite(updates))
    assert int(state.num_combined) == 41
    assert int(state.inner.num_skipped) == 0
    tx = m_config(1)
    updates, _ = tx.update(jnp.zeros(3), tx.init(jnp.zeros(3)), loss=0)
    assert not updates.any()


def test_scan_under_vmap_equals_a_loop():
    tx = m_config(2)
    batches = jax.random.normal(jax.random.key(0), (2, 6, 4))

    def run(batches):
        def step(state, seen):
            n, g = seen
            return tx.update(g, state, loss=n % 2)[::-1]

        return jax.lax.scan(step, tx.init(batches[0]), (jnp.arange(6), batches))[1]

    got = jax.jit(jax.vmap(run))(batches)
    state = tx.init(batches[0, 0])
    for n, g in enumerate(batches[1]):
        updates, state = tx.update(g, state, loss=n % 2)
        np.testing.assert_allclose(got[1, n], updates, rtol=1e-3, atol=1e-5)


def test_dtypes_stay_and_moments_are_wide():
    params = {"half": jnp.ones(3, jnp.bfloat16), "complex": jnp.ones(2, jnp.complex64)}
    tx = m_config(2)
    state = first = tx.init(params)
    for n in range(4):
        updates, state = tx.update(params, state, loss=n % 2)
    assert {k: x.dtype for k, x in updates.items()} == {
        k: x.dtype for k, x in params.items()
    }
    chex.assert_trees_all_equal_shapes_and_dtypes(state, first)
    assert state.momenta["half"].dtype == state.second_moment["complex"].dtype
    np.testing.assert_allclose(updates["half"].astype(float), 1, rtol=0.02)


def test_a_place_may_be_any_integer():
    tx = m_config(3)
    state = tx.init(PARAMS)
    for place in (2, -1, np.int64(-1), jnp.int32(2)):
        _, after = tx.update(gradient(0), state, loss=place)
        assert after.num_seen.tolist() == [0, 0, 1]
    updates, after = jax.jit(lambda n: tx.update(gradient(0), state, loss=n))(3)
    assert after.num_seen.tolist() == [0, 0, 0]
    assert int(after.inner.num_skipped) == 1
    assert all(jnp.isnan(x).all() for x in jax.tree.leaves(updates))


def test_errors_name_what_is_wrong():
    tx = m_config(NAMES)
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match=r"whose gradient it is.*loss="):
        tx.update(gradient(0), state)
    with pytest.raises(ValueError, match="loss 'd' is unknown"):
        tx.update(gradient(0), state, loss="d")
    with pytest.raises(ValueError, match=r"b1 must be in \[0, 1\)"):
        m_config(b1=1.0)
    with pytest.raises(TypeError, match="must be a LossWeighting.*got int"):
        yoto.aggregate_momenta(5, 2)
    with pytest.raises(ValueError, match="loss 5 is out of range for 3 losses"):
        tx.update(gradient(0), state, loss=np.int64(5))
    with pytest.raises(TypeError, match=r"integer scalar, got float32\(\)"):
        jax.jit(lambda n: tx.update(gradient(0), state, loss=n))(1.0)
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), gradient(0))
    with pytest.raises(ValueError, match=r"gradient of one loss.*must have shape \("):
        tx.update(stacked, state, loss="a")
    with pytest.raises(TypeError, match=r"floating-point .*int32 at params\['n'\]"):
        tx.init({"n": jnp.arange(3)})
    tx = yoto.aggregate_momenta(weightings.famo(), 2)
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match="needs the losses"):
        tx.update(gradient(0), state, loss=0)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight (virtual) devices")
@pytest.mark.parametrize("check", [True, False])
def test_eight_devices_that_hold_parts_equal_one(check):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = {"part": jax.P("d"), "whole": jax.P()}
    params = {"part": jnp.zeros((8, 2)), "whole": jnp.zeros(3)}
    batches = [
        jax.tree.map(
            lambda p, n=n: jax.random.normal(jax.random.key(n), p.shape), params
        )
        for n in range(5)
    ]
    batches[2]["part"] = batches[2]["part"].at[3, 0].set(jnp.nan)  # on one device
    one, many = m_config(2), m_config(2, param_specs=specs)
    rows = {"part": jax.P(None, "d"), "whole": jax.P()}
    state_specs = jax.tree.map(lambda _: jax.P(), one.init(params))._replace(
        momenta=rows, combined=specs, second_moment=specs
    )
    shard = jax.shard_map(
        lambda g, state, n: many.update(g, state, loss=n),
        mesh=mesh,
        in_specs=(specs, state_specs, jax.P()),
        out_specs=(specs, state_specs),
        check_vma=check,
    )
    state = expected = one.init(params)
    for n, g in enumerate(batches):
        got, state = jax.jit(shard)(g, state, jnp.int32(n % 2))
        want, expected = one.update(g, expected, loss=n % 2)
        chex.assert_trees_all_close(got, want, rtol=1e-3, atol=1e-4)
    chex.assert_trees_all_close(state, expected, rtol=1e-4)
    assert int(state.inner.num_skipped) == 1
