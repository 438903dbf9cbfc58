import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import yoto_jax as yoto

RNG = np.random.default_rng(0)
REWARDS = {
    "correct": RNG.integers(0, 2, (6, 8)).astype(float),
    "length": -RNG.uniform(100, 900, (6, 8)),
    "style": 1e-2 * RNG.normal(size=(6, 8)),
}
WEIGHTS = {"correct": 2.0, "length": 0.5, "style": 1.0}


def oracle(rewards, weights, masks=None, eps=1e-4):
    """Loops over groups, in float64."""
    some = np.zeros((6, 8), bool)
    total = np.zeros((6, 8))
    for name, reward in rewards.items():
        for i, group in enumerate(reward):
            mask = np.ones(8, bool) if masks is None else masks[name][i]
            there = group[mask]
            some[i] |= mask
            if len(there) > 1:
                normal = (there - there.mean()) / (there.std(ddof=1) + eps)
                total[i, mask] += weights[name] * normal
    there = total[some]
    return np.where(some, (total - there.mean()) / (there.std(ddof=1) + eps), 0)


def test_each_reward_is_normalised_in_its_group_and_the_sum_in_the_batch():
    found = yoto.group_advantages(REWARDS, WEIGHTS)
    np.testing.assert_allclose(found, oracle(REWARDS, WEIGHTS), atol=2e-5)
    np.testing.assert_allclose(found.mean(), 0, atol=1e-6)
    np.testing.assert_allclose(found.std(ddof=1), 1, rtol=1e-3)
    ones = dict.fromkeys(WEIGHTS, 1.0)
    np.testing.assert_array_equal(
        yoto.group_advantages(REWARDS), yoto.group_advantages(REWARDS, ones)
    )


def test_the_sum_is_normalised_in_its_group():
    found = yoto.group_advantages(REWARDS, WEIGHTS, normalize="sum")
    total = sum(WEIGHTS[name] * reward for name, reward in REWARDS.items())
    mean, std = total.mean(1, keepdims=True), total.std(1, ddof=1, keepdims=True)
    np.testing.assert_allclose(found, (total - mean) / (std + 1e-4), atol=2e-5)


def test_units_and_offsets_of_a_reward_do_not_matter():
    found = yoto.group_advantages(REWARDS, WEIGHTS, eps=1e-9)
    other = {k: 50.0 * r - 3.0 for k, r in REWARDS.items()}
    np.testing.assert_allclose(
        yoto.group_advantages(other, WEIGHTS, eps=1e-9), found, atol=1e-4
    )


def test_absent_rewards_are_in_no_mean_whatever_stands_there():
    masks = {name: RNG.uniform(size=(6, 8)) < 0.7 for name in REWARDS}
    for mask in masks.values():
        mask[2] = False  # no response to this prompt has a reward
        mask[3] = [True] + 7 * [False]  # one has
    rewards = {k: np.where(masks[k], r, np.nan) for k, r in REWARDS.items()}
    found = yoto.group_advantages(rewards, WEIGHTS, present=masks)
    np.testing.assert_allclose(found, oracle(REWARDS, WEIGHTS, masks), atol=2e-5)
    np.testing.assert_array_equal(found[2], 0)
    by_sum = yoto.group_advantages(rewards, WEIGHTS, present=masks, normalize="sum")
    assert np.isfinite(by_sum).all()


@pytest.mark.parametrize("normalize", ["each", "sum"])
def test_rewards_whose_squares_overflow(normalize):
    rewards = {name: np.float32(r) for name, r in REWARDS.items()}
    found, plain = (
        yoto.group_advantages(
            {name: np.float32(c) * r for name, r in rewards.items()},
            eps=1e-9,
            normalize=normalize,
        )
        for c in (2.0**80, 1.0)
    )
    np.testing.assert_allclose(found, plain, atol=1e-5)


def test_no_spread_no_advantage():
    rewards = {"a": jnp.full((3, 4), 0.1), "b": jnp.ones((3, 4), jnp.int32)}
    for normalize in ("each", "sum"):
        found = yoto.group_advantages(rewards, normalize=normalize)
        np.testing.assert_allclose(found, 0, atol=1e-3)
    np.testing.assert_array_equal(yoto.group_advantages({"a": jnp.ones((5, 1))}), 0)


@pytest.mark.parametrize("value", [0.1, -77777.7, 10000.1, 1e30])
@pytest.mark.parametrize("normalize", ["each", "sum"])
def test_large_equal_rewards_have_no_spread_by_rounding(value, normalize):
    rewards = {"a": jnp.full((2, 7), value)}  # Their mean is not what they are.
    found = yoto.group_advantages(rewards, normalize=normalize)
    np.testing.assert_array_equal(found, 0)


def test_a_reward_that_is_not_finite_is_seen():
    rewards = {**REWARDS, "length": REWARDS["length"].copy()}
    rewards["length"][1, 2] = np.nan
    assert np.isnan(yoto.group_advantages(rewards)).all()
    found = np.asarray(yoto.group_advantages(rewards, normalize="sum"))
    assert np.isnan(found[1]).all()
    assert np.isfinite(found[[0, 2, 3, 4, 5]]).all()


def test_dtypes_jit_vmap_and_no_gradient():
    low = {k: jnp.asarray(r, jnp.bfloat16) for k, r in REWARDS.items()}
    assert yoto.group_advantages(low).dtype == jnp.float32
    with jax.enable_x64(True):
        double = {k: jnp.asarray(r, jnp.float64) for k, r in REWARDS.items()}
        found = yoto.group_advantages(double, WEIGHTS)
        assert found.dtype == jnp.float64
        np.testing.assert_allclose(found, oracle(REWARDS, WEIGHTS), atol=1e-12)
        mixed = {**double, "correct": jnp.asarray(REWARDS["correct"], jnp.int32)}
        with jax.numpy_dtype_promotion("strict"):
            found = yoto.group_advantages(mixed, WEIGHTS)
        np.testing.assert_allclose(found, oracle(REWARDS, WEIGHTS), atol=1e-12)
    expected = yoto.group_advantages(REWARDS, WEIGHTS)
    np.testing.assert_allclose(
        jax.jit(yoto.group_advantages)(REWARDS, WEIGHTS), expected, atol=1e-6
    )
    two = jax.tree.map(lambda r: jnp.stack([r, 2 * r]), REWARDS)
    lanes = jax.vmap(lambda r: yoto.group_advantages(r, WEIGHTS))(two)
    np.testing.assert_allclose(lanes[0], expected, atol=1e-5)
    slope = jax.grad(lambda r: yoto.group_advantages({"r": r})[0, 0])
    np.testing.assert_array_equal(slope(jnp.eye(3)), 0)


def test_prompts_on_several_devices():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",))
    spread = jax.P("data")

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=spread, out_specs=spread)
    def on_devices(rewards):
        return yoto.group_advantages(rewards, WEIGHTS, axis_name="data")

    rewards = {k: jnp.asarray(r, jnp.float32) for k, r in REWARDS.items()}
    expected = yoto.group_advantages(rewards, WEIGHTS)
    np.testing.assert_allclose(on_devices(rewards), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"rewards": {}}, ValueError, "no leaves"),
        ({"rewards": {"a": 1.0}}, ValueError, "must have an axis"),
        (
            {"rewards": {"a": jnp.ones(3), "b": jnp.ones(4)}},
            ValueError,
            r"'b' must have the shape \(3,\) of 'a', got \(4,\)",
        ),
        ({"weights": {"a": 1.0}}, ValueError, "missing: 'b'"),
        (
            {"weights": {"a": 1.0, "b": jnp.ones(2)}},
            ValueError,
            "'b' must be a scalar",
        ),
        ({"present": {"a": True}}, ValueError, "missing: 'b'"),
        ({"present": {"a": jnp.ones(3), "b": jnp.ones(3)}}, TypeError, "boolean"),
        (
            {"present": {"a": jnp.array([True]), "b": jnp.array([True])}},
            ValueError,
            r"present must have the shape \(3,\)",
        ),
        ({"rewards": {"a": 1j * jnp.ones(3)}}, TypeError, "'a' must be real"),
        ({"normalize": "all"}, ValueError, "'each' or 'sum', got 'all'"),
        ({"eps": 0.0}, ValueError, "eps must be positive"),
    ],
)
def test_misuse(arguments, error, message):
    rewards = {"a": jnp.arange(3.0), "b": jnp.ones(3)}
    with pytest.raises(error, match=message):
        yoto.group_advantages(**{"rewards": rewards} | arguments)
