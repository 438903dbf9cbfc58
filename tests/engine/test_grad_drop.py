"""One sign for each entry of the gradient."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import yoto_jax as yoto
from tests.oracles import stacked as oracles

pytestmark = pytest.mark.usefixtures("quick_compilation")

ROWS = {
    "w": jax.random.normal(jax.random.key(0), (3, 4, 5)),
    "b": jax.random.normal(jax.random.key(1), (3, 7)),
    "none": None,
}


def flat(rows):
    count = len(jax.tree.leaves(rows)[0])
    return np.concatenate(
        [np.reshape(x, (count, -1)) for x in jax.tree.leaves(rows)], axis=1
    ).astype(float)


def vector(tree):
    return flat(jax.tree.map(lambda x: x[None], tree))[0]


def drop(rows, count=3, **options):
    tx = yoto.grad_drop(count, **options)
    return tx.update(rows, tx.init(None))


def draws(state, rows):
    """The uniform numbers of the next update."""
    _, draw = jax.random.split(state.key)
    leaves, structure = jax.tree.flatten(rows)
    keys = [jax.random.fold_in(draw, n) for n in range(len(leaves))]
    parts = [
        jax.random.uniform(k, x.shape[1:]) for k, x in zip(keys, leaves, strict=True)
    ]
    return vector(structure.unflatten(parts))


@pytest.mark.parametrize("leak", [0.0, 0.3, (0.0, 0.5, 1.0)])
def test_every_update_is_that_of_the_paper(leak):
    tx = yoto.grad_drop(3, leak=leak, key=5)
    state, update = tx.init(None), jax.jit(tx.update)
    for n in range(4):
        rows = jax.tree.map(lambda x, n=n: x - 0.3 * n, ROWS)
        uniform = draws(state, rows)
        got, state = update(rows, state)
        expected = oracles.grad_drop(flat(rows), uniform, np.broadcast_to(leak, 3))
        np.testing.assert_allclose(vector(got), expected, rtol=1e-5, atol=1e-6)


def test_the_mean_is_the_plain_sum():
    tx = yoto.grad_drop(3)
    states = jax.vmap(lambda seed: yoto.grad_drop(3, key=jax.random.key(seed)).init(0))
    got, _ = jax.vmap(tx.update, (None, 0))(ROWS, states(jnp.arange(4000)))
    total = jax.tree.map(lambda x: x.sum(0), ROWS)
    mean = jax.tree.map(lambda x: x.mean(0), got)
    chex.assert_trees_all_close(mean, total, atol=0.25)
    spread = jax.tree.map(lambda x: x.std(), got)
    assert all(x > 0.5 for x in jax.tree.leaves(spread))


def test_one_loss_full_leak_and_gradients_that_agree_are_the_plain_sum():
    one = jax.tree.map(lambda x: x[:1], ROWS)
    chex.assert_trees_all_equal(drop(one, 1)[0], jax.tree.map(lambda x: x[0], one))
    total = jax.tree.map(lambda x: x.sum(0), ROWS)
    chex.assert_trees_all_close(drop(ROWS, leak=1.0)[0], total, rtol=1e-5, atol=1e-6)
    agree = jax.tree.map(lambda x: jnp.abs(x) * jnp.sign(x[:1]), ROWS)
    total = jax.tree.map(lambda x: x.sum(0), agree)
    chex.assert_trees_all_close(drop(agree)[0], total, rtol=1e-5)


def test_zero_gradients_and_forty_losses():
    zero = optax.tree.zeros_like(ROWS)
    chex.assert_trees_all_equal(drop(zero)[0], jax.tree.map(lambda x: x[0], zero))
    many = jax.random.normal(jax.random.key(3), (40, 6))
    got, _ = drop(many, 40)
    above, below = jnp.maximum(many, 0).sum(0), jnp.minimum(many, 0).sum(0)
    assert jnp.all(jnp.isclose(got, above) | jnp.isclose(got, below))


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize("count", [1, 3])
def test_what_is_not_finite_stays_so_and_an_outer_guard_counts_it(bad, count):
    rows = jnp.ones((count, 4)).at[0, 1].set(bad)
    for seed in range(8):
        got, _ = drop(rows, count, key=seed)
        assert jnp.isfinite(got).tolist() == [True, False, True, True]
    tx = yoto.skip_outliers(
        optax.chain(yoto.grad_drop(count), optax.adam(0.1)), losses=count
    )
    state = tx.init(jnp.zeros(4))
    updates, after = tx.update(rows, state, losses=(1.0,) * count)
    assert not updates.any()
    assert int(after.num_skipped) == 1
    assert after.inner[0].key == state.inner[0].key  # The draw comes again.


def test_absent_losses_are_as_if_not_there():
    names = {"a": 0.0, "b": 0.0, "c": 0.0}
    rows = jax.tree.map(lambda x: x.at[1].set(jnp.nan), ROWS)
    tx = yoto.grad_drop(names)
    there = {"a": True, "b": False, "c": True}
    got, _ = tx.update(rows, tx.init(None), present=there)
    fewer = jax.tree.map(lambda x: x[jnp.array([0, 2])], ROWS)
    chex.assert_trees_all_close(got, drop(fewer, 2)[0], rtol=1e-6)


def test_dtypes_stay_and_complex_entries_are_two():
    rows = {
        "half": jnp.ones((2, 3), jnp.bfloat16),
        "scalar": jnp.array([1.0, -2.0]),
        "complex": jnp.array([[1.0 + 2.0j], [3.0 - 5.0j]]),
        "integer": np.zeros((2, 3), jax.dtypes.float0),
    }
    got, _ = drop(rows, 2)
    assert {k: x.dtype for k, x in got.items()} == {k: x.dtype for k, x in rows.items()}
    assert got["scalar"] in (1, -2)
    assert got["complex"][0].real == 4
    assert got["complex"][0].imag in (2, -5)
    assert got["integer"].shape == (3,)


def test_scan_under_vmap_equals_a_loop():
    tx = yoto.grad_drop(3)
    batches = jnp.stack([ROWS["b"] - 0.1 * n for n in range(3)])

    def run(batches):
        step = lambda state, rows: tx.update(rows, state)[::-1]
        return jax.lax.scan(step, tx.init(None), batches)[1]

    got = jax.jit(jax.vmap(run))(jnp.stack([batches, -batches]))
    state = tx.init(None)
    for n, rows in enumerate(batches):
        updates, state = tx.update(rows, state)
        np.testing.assert_allclose(got[0, n], updates, rtol=1e-6)


def test_a_leak_is_as_precise_as_the_gradients():
    with jax.enable_x64(True):
        tx = yoto.grad_drop(2, leak=0.1)
        updates, _ = tx.update(jnp.array([[1.0], [-1.0]]), tx.init(None))
        np.testing.assert_allclose(abs(updates), 0.9, rtol=1e-15)


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match=r"leak must be in \[0, 1\], got 1.5"):
        yoto.grad_drop(2, leak=(0.5, 1.5))
    with pytest.raises(TypeError, match="leak must hold numbers, got 'x'"):
        yoto.grad_drop(2, leak="x")
    with pytest.raises(ValueError, match="leak must be one number, or one for each"):
        yoto.grad_drop(2, leak=(0.5, 0.5, 0.5))
    with pytest.raises(ValueError, match=r"update\['v'\].*length 2.*'0', '1'.*\(3,"):
        drop({"v": jnp.ones((3, 2))}, 2)
    with pytest.raises(TypeError, match="key must be"):
        yoto.grad_drop(2, key="a").init(None)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight (virtual) devices")
def test_eight_devices_draw_alike_for_what_they_share_and_apart_for_their_parts():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    # Opposite gradients: what comes out is the sign that was drawn.
    rows = {"whole": jnp.ones((2, 64)), "part": jnp.ones((2, 64))}
    rows = jax.tree.map(lambda x: x.at[1].multiply(-1), rows)
    specs = {"whole": jax.P(), "part": jax.P("d")}
    in_specs = {"whole": jax.P(), "part": jax.P(None, "d")}
    tx = yoto.grad_drop(2, param_specs=specs)
    state = tx.init(None)
    for check in (True, False):
        shard = jax.shard_map(
            tx.update,
            mesh=mesh,
            in_specs=(in_specs, jax.P()),
            out_specs=(specs, jax.P()),
            check_vma=check,
        )
        got, after = jax.jit(shard)(rows, state)
        alone, expected = yoto.grad_drop(2).update(rows, state)
        chex.assert_trees_all_equal(got["whole"], alone["whole"])
        assert after.key == expected.key
        parts = np.reshape(got["part"], (8, 8))
        assert len(np.unique(parts, axis=0)) > 4
    # Under jit arrays may be spread as they like.
    placed = jax.device_put(rows, jax.NamedSharding(mesh, jax.P(None, "d")))
    got, _ = jax.jit(yoto.grad_drop(2).update)(placed, state)
    chex.assert_trees_all_equal(got, alone)
