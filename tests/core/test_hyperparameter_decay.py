import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import yoto_jax as yoto
from tests.oracles import paper

pytestmark = pytest.mark.usefixtures("quick_compilation")

# Each length is compiled for itself: short ones, long ones, where the form changes.
vectors = st.sampled_from([1, 2, 3, 8, 9, 14]).flatmap(
    lambda size: st.lists(st.floats(-8, 8, width=32), min_size=size, max_size=size)
)


def as_logits(learned, with_primary=True):
    count = len(learned) + with_primary
    mu = yoto.init_loss_logits((0.0,) * count, 0 if with_primary else None)
    full = np.concatenate([[0.0] * with_primary, np.array(learned, np.float64)])
    is_learned = np.arange(count) >= with_primary
    return dataclasses.replace(mu, learned=jnp.array(learned)), full, is_learned


@functools.partial(jax.jit, static_argnames="entropy")
def derivatives(mu, entropy="all"):
    """Value, gradient, and gradient in forward mode."""
    f = lambda x: yoto.regularizer(x, entropy=entropy)
    return *jax.value_and_grad(f)(mu), jax.jacfwd(f)(mu)


@given(vectors, st.booleans(), st.sampled_from(["all", "auxiliary"]))
@settings(deadline=None, max_examples=25)
def test_value_and_gradient_equal_equations_7_and_8(learned, with_primary, entropy):
    with jax.enable_x64(True):
        mu, full, is_learned = as_logits(learned, with_primary)
        value, gradient, forward = derivatives(mu, entropy)
        oracle = lambda x: paper.regularizer(x, is_learned, entropy)
        np.testing.assert_allclose(value, oracle(full), atol=1e-12)
        expected = paper.regularizer_gradient(full, is_learned, entropy)
        np.testing.assert_allclose(gradient.learned, expected[is_learned], atol=1e-12)
        numerical = paper.numerical_gradient(oracle, full)[is_learned]
        np.testing.assert_allclose(gradient.learned, numerical, atol=1e-7)
        if entropy == "all":  # the closed form of the gradient
            p = paper.softmax(full)
            closed_form = p * (full - p @ full) + 1 / (1 + np.exp(-full))
            np.testing.assert_allclose(
                gradient.learned, closed_form[is_learned], atol=1e-12
            )
        np.testing.assert_allclose(forward.learned, gradient.learned, atol=1e-12)


@given(vectors)
@settings(deadline=None, max_examples=30)
def test_float32_is_accurate(learned):
    mu, full, is_learned = as_logits(np.float32(learned))
    value, gradient, _ = derivatives(mu)
    assert value.dtype == gradient.learned.dtype == jnp.float32
    np.testing.assert_allclose(
        value, paper.regularizer(full, is_learned), rtol=1e-5, atol=1e-5
    )
    np.testing.assert_allclose(
        gradient.learned,
        paper.regularizer_gradient(full, is_learned)[is_learned],
        # Differences of logits: a few units in the last place of the largest.
        atol=4 * np.finfo(np.float32).eps * (1 + np.max(np.abs(learned))),
    )


@pytest.mark.parametrize(
    ("auxiliary", "logit", "primary_weight"),
    [
        (1, -1.2785, 0.782),
        (2, -1.6239, 0.717),
        (3, -1.8612, 0.682),
        (5, -2.1889, 0.641),
        (10, -2.6730, 0.592),
    ],
)
def test_minimiser_of_the_regularizer_alone(auxiliary, logit, primary_weight):
    np.testing.assert_allclose(paper.minimise_regularizer(auxiliary), logit, atol=5e-5)
    params, _, _ = as_logits(np.full(auxiliary, -3.0, np.float32))
    tx = optax.chain(yoto.add_hyperparameter_decay(20.0), optax.sgd(0.05))

    @jax.jit
    def descend(params):
        def step(carry, _):
            params, state = carry
            zeros = jax.tree.map(jnp.zeros_like, params)
            updates, state = tx.update(zeros, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), length=3000)[0][0]

    minimiser = descend(params)
    np.testing.assert_allclose(minimiser.learned, logit, atol=6e-5)
    np.testing.assert_allclose(
        yoto.loss_weights(minimiser)[0], primary_weight, atol=6e-4
    )


@pytest.mark.parametrize(
    ("auxiliary", "pull"),
    [(1, 1 / 10.016), (2, 1 / 16.8), (3, 1 / 23.3), (5, 1 / 35.7)],
)
def test_strongest_pull_on_one_vanishing_or_dominant_weight(auxiliary, pull):
    """The bounds that the default of adamw is argued from."""
    others = [paper.minimise_regularizer(auxiliary)] * (auxiliary - 1)
    line = np.linspace(-12, 8, 801)
    learned = np.array([[x, *others] for x in line], np.float32)
    mu = dataclasses.replace(as_logits(learned[0])[0], learned=jnp.array(learned))
    gradients = jax.vmap(jax.grad(yoto.regularizer))(mu).learned[:, 0]
    np.testing.assert_allclose(gradients.min(), -pull, rtol=2e-3)
    assert 1.09 < gradients.max() < 1.26


def test_decay_with_sgd_is_unstable_where_the_learning_rate_times_rho_is_large():
    params = as_logits(np.array([-1.0], np.float32))[0]

    def descend(rho):
        tx = yoto.sgdw(1.0, momentum=0.0, hyperparameter_decay=rho)

        def step(carry, _):
            params, state = carry
            zeros = jax.tree.map(jnp.zeros_like, params)
            updates, state = tx.update(zeros, state, params)
            return (optax.apply_updates(params, updates), state), None

        carry = (params, tx.init(params))
        return jax.lax.scan(step, carry, length=500)[0][0].learned[0]

    np.testing.assert_allclose(descend(8.0), -1.2785, atol=1e-3)
    assert 0.1 < abs(descend(12.0) + 1.2785) < 2.0  # oscillates
    assert descend(30.0) < -10.0  # is lost


def test_auxiliary_entropy_vanishes_where_the_paper_ends():
    """Spec of the variant: no pull between equal logits, nor with one rejected."""
    sigmoid = lambda x: 1 / (1 + np.exp(-x))
    for learned in ([-0.18, -0.18], [-0.18, -40.0]):
        mu, _, _ = as_logits(np.array(learned, np.float32))
        gradient = jax.grad(lambda m: yoto.regularizer(m, entropy="auxiliary"))(mu)
        np.testing.assert_allclose(
            gradient.learned, sigmoid(np.array(learned)), atol=1e-6
        )


def test_a_common_shift_of_all_logits_does_not_change_the_entropy():
    learned = np.array([0.3, -1.0, 2.0])
    softplus = lambda x: np.log1p(np.exp(x)).sum()
    with jax.enable_x64(True):
        entropies = [
            yoto.regularizer(as_logits(learned + shift, False)[0])
            - softplus(learned + shift)
            for shift in (0.0, 5.0, -7.0)
        ]
    np.testing.assert_allclose(entropies, entropies[0], atol=1e-12)


def test_the_link_adds_rho_times_the_gradient_to_loss_logits_alone():
    mu, full, is_learned = as_logits(np.array([0.5, -1.0], np.float32))
    params = {"w": jnp.ones(3), "deep": [mu, {"none": None}]}
    updates = jax.tree.map(jnp.ones_like, params)
    tx = yoto.add_hyperparameter_decay(2.0)
    new, _ = tx.update(updates, tx.init(params), params)
    np.testing.assert_array_equal(new["w"], updates["w"])
    expected = 1 + 2 * paper.regularizer_gradient(full, is_learned)[is_learned]
    np.testing.assert_allclose(new["deep"][0].learned, expected, rtol=1e-6)
    assert jax.tree.structure(new) == jax.tree.structure(params)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_the_link_computes_in_float32_whatever_it_is_given(dtype):
    mu, _, is_learned = as_logits(np.array([0.5, -1.0, 2.0], np.float32))
    low = jax.tree.map(lambda x: x.astype(dtype), mu)
    update = jax.tree.map(lambda x: jnp.full_like(x, 1e-2), low)
    tx = yoto.add_hyperparameter_decay(1.0)
    with pytest.warns(UserWarning, match=f"logits are {jnp.dtype(dtype).name}"):
        state = tx.init(low)
    new, _ = tx.update(update, state, low)
    exact = np.append(0.0, np.array(low.learned, np.float64))
    expected = np.array(update.learned, np.float64)
    expected = expected + paper.regularizer_gradient(exact, is_learned)[is_learned]
    half_a_unit = float(jnp.finfo(dtype).eps) / 2
    np.testing.assert_allclose(
        np.array(new.learned, np.float64), expected, rtol=1.01 * half_a_unit
    )


def test_infinite_logits_leave_finite_gradients():
    for learned in ([-np.inf, -np.inf, 0.0], [3e38, -3e38, 1.0], [-np.inf] * 12):
        mu, _, _ = as_logits(np.array(learned, np.float32))
        np.testing.assert_allclose(sum(yoto.loss_weights(mu)), 1.0, rtol=1e-6)
        gradient = jax.grad(yoto.regularizer)(mu).learned
        assert np.isfinite(gradient).all()
        if max(learned) < 1e38:
            assert np.isfinite(yoto.regularizer(mu))


def test_rho_may_be_a_schedule():
    mu, full, is_learned = as_logits(np.array([0.5], np.float32))
    tx = yoto.add_hyperparameter_decay(lambda count: 10.0 * count)
    state = tx.init(mu)
    slope = paper.regularizer_gradient(full, is_learned)[1]
    for step in range(3):
        updates, state = tx.update(jax.tree.map(jnp.zeros_like, mu), state, mu)
        np.testing.assert_allclose(updates.learned, 10 * step * slope, rtol=1e-6)
    assert optax.tree.get(state, "count") == 3


def test_errors():
    mu, _, _ = as_logits(np.zeros(1, np.float32))
    tx = yoto.add_hyperparameter_decay(1.0)
    with pytest.raises(ValueError, match="needs the current loss logits"):
        tx.update(mu, tx.init(mu))
    bad = (-1.0, float("nan"), float("inf"), np.float32(-1), jnp.float32(np.nan))
    for rho in bad:
        with pytest.raises(ValueError, match="hyperparameter_decay must be"):
            yoto.add_hyperparameter_decay(rho)
    for rho in (None, "1", np.ones(2)):
        with pytest.raises((TypeError, ValueError), match="hyperparameter_decay must"):
            yoto.add_hyperparameter_decay(rho)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="updates hold LossLogits.*dict"):
        tx.update({"mu": mu}, tx.init(mu), {"mu": {"w": jnp.ones(1)}})
    with pytest.raises(ValueError, match="entropy must be.*'some'"):
        yoto.add_hyperparameter_decay(1.0, entropy="some")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="entropy must be.*'some'"):
        yoto.regularizer(mu, entropy="some")  # type: ignore[arg-type]
