import jax
import jax.numpy as jnp
import numpy as np
import pytest

from yoto_jax import conditional

RNG = np.random.default_rng(0)
LOSSES = {"a": RNG.uniform(0, 3, 4), "b": RNG.normal(size=4), "c": RNG.normal(size=4)}
WEIGHTS = {"a": 0.2, "b": 0.5, "c": 0.3}


def oracle(losses, weights, mu, ideal=0.0):
    """In float64, without a shift: exponentials of moderate numbers."""
    smallest = {k: -mu * np.log(np.exp(-x / mu).sum()) for k, x in losses.items()}
    return mu * np.log(
        sum(np.exp(weights[k] * (m - ideal) / mu) for k, m in smallest.items())
    )


@pytest.mark.parametrize("mu", [0.1, 1.0, 5.0])
def test_value_is_the_formula_and_slopes_are_products_of_two_softmaxes(mu):
    found = lambda losses: conditional.smooth_chebyshev_set(
        losses, WEIGHTS, smoothing=mu, ideal=-2.0
    )
    value, slopes = jax.jit(jax.value_and_grad(found))(LOSSES)
    np.testing.assert_allclose(value, oracle(LOSSES, WEIGHTS, mu, -2.0), rtol=1e-5)
    smallest = {k: -mu * np.log(np.exp(-x / mu).sum()) for k, x in LOSSES.items()}
    large = {k: np.exp(WEIGHTS[k] * (m + 2) / mu) for k, m in smallest.items()}
    for name, x in LOSSES.items():
        share = WEIGHTS[name] * large[name] / sum(large.values())
        of_models = np.exp(-x / mu) / np.exp(-x / mu).sum()
        np.testing.assert_allclose(slopes[name], share * of_models, rtol=1e-4)


def test_little_smoothing_is_the_largest_of_the_smallest():
    worst = max(WEIGHTS[name] * x.min() for name, x in LOSSES.items())
    found = conditional.smooth_chebyshev_set(LOSSES, WEIGHTS, smoothing=1e-4)
    np.testing.assert_allclose(found, worst, atol=1e-3)
    exact = jax.jit(
        lambda mu: conditional.smooth_chebyshev_set(LOSSES, WEIGHTS, smoothing=mu)
    )
    np.testing.assert_allclose(exact(0.0), worst, rtol=1e-6)


def test_with_one_model_it_is_smooth_chebyshev():
    one = {name: x[:1] for name, x in LOSSES.items()}
    alone = {name: x[0] for name, x in one.items()}
    np.testing.assert_allclose(
        conditional.smooth_chebyshev_set(one, WEIGHTS, smoothing=0.3),
        conditional.smooth_chebyshev(alone, WEIGHTS, smoothing=0.3),
        rtol=1e-6,
    )


def test_the_order_of_models_and_losses_does_not_matter():
    expected = conditional.smooth_chebyshev_set(LOSSES, WEIGHTS)
    turned = {name: x[::-1] for name, x in LOSSES.items()}
    found = conditional.smooth_chebyshev_set(turned, WEIGHTS)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    back = lambda tree: [tree[name] for name in sorted(tree, reverse=True)]
    found = conditional.smooth_chebyshev_set(back(LOSSES), back(WEIGHTS))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_extreme_losses_in_low_precision_stay_finite():
    losses = {"a": jnp.array([1e30, 2.0], jnp.bfloat16), "b": jnp.array([-1e30, 0.0])}
    weights = {"a": 1.0, "b": 1.0}
    total = lambda x: conditional.smooth_chebyshev_set(x, weights, smoothing=0.1)
    value, slopes = jax.value_and_grad(total)(losses)
    assert value.dtype == jnp.float32
    for leaf in jax.tree.leaves((value, slopes)):
        assert np.isfinite(np.asarray(leaf, float)).all()


def test_python_numbers_for_weights_under_strict_promotion():
    losses = {"a": jnp.ones(2), "b": jnp.zeros(2)}
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        value = conditional.smooth_chebyshev_set(losses, {"a": 1, "b": 0.5})
    assert jnp.isfinite(value)


def test_further_axes_stay():
    losses = {name: jnp.stack([x, 2 * x], axis=1) for name, x in LOSSES.items()}
    weights = {name: jnp.full(2, weight) for name, weight in WEIGHTS.items()}
    found = conditional.smooth_chebyshev_set(losses, weights)
    twice = {name: 2 * x for name, x in LOSSES.items()}
    expected = [oracle(LOSSES, WEIGHTS, 1.0), oracle(twice, WEIGHTS, 1.0)]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_misuse():
    with pytest.raises(ValueError, match="loss 'a' must have an axis of models"):
        conditional.smooth_chebyshev_set({"a": 1.0}, {"a": 1.0})
    with pytest.raises(ValueError, match=r"one shape, got \[\(2,\), \(3,\)\]"):
        conditional.smooth_chebyshev_set([jnp.ones(3), jnp.ones(2)], [1.0, 1.0])
    with pytest.raises(ValueError, match="smoothing must be positive"):
        conditional.smooth_chebyshev_set(LOSSES, WEIGHTS, smoothing=0.0)
    with pytest.raises(ValueError, match="unexpected: 'c'"):
        conditional.smooth_chebyshev_set(LOSSES, {"a": 1.0, "b": 1.0})
