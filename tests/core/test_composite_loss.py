import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import yoto_jax as yoto
from tests.oracles import paper

pytestmark = pytest.mark.usefixtures("quick_compilation")

values = st.floats(0.0, 10.0, width=32)
logits = st.floats(-8.0, 8.0, width=32)
trees = st.recursive(
    values,
    lambda inner: st.one_of(
        st.dictionaries(st.text("abcd", min_size=1), inner, min_size=1, max_size=3),
        st.lists(inner, min_size=1, max_size=3),
        st.tuples(inner, inner),
    ),
    max_leaves=14,
)


@st.composite
def problems(draw):
    """A random tree of losses, logits for it, and both as vectors."""
    losses = draw(trees)
    count = len(jax.tree.leaves(losses))
    position = draw(st.none() | st.integers(0, count - 1))
    learned = draw(
        st.lists(
            logits, min_size=count - (position is not None), max_size=count
        ).filter(lambda x: len(x) == count - (position is not None))
    )
    mu = yoto.LossLogits(
        jnp.array(learned, jnp.float32), jax.tree.structure(losses), position
    )
    full = list(map(float, learned))
    if position is not None:
        full.insert(position, 0.0)
    is_learned = np.arange(count) != (-1 if position is None else position)
    vector = np.array(jax.tree.leaves(losses), np.float64)
    return losses, mu, vector, np.array(full), is_learned


@given(problems())
@settings(deadline=None, max_examples=30)
def test_value_and_gradients_equal_equations_5_and_6(problem):
    losses, mu, vector, full, is_learned = problem
    value_and_grad = jax.value_and_grad(yoto.composite_loss, argnums=(0, 1))
    loss, (d_losses, d_mu) = jax.jit(value_and_grad)(losses, mu)
    weights = paper.softmax(full)
    size = np.abs(vector).max() + 1e-30
    np.testing.assert_allclose(loss, weights @ vector, rtol=2e-5, atol=1e-6 * size)
    assert jax.tree.structure(d_losses) == jax.tree.structure(losses)
    np.testing.assert_allclose(jax.tree.leaves(d_losses), weights, rtol=2e-5)
    closed_form = weights * (vector - weights @ vector)
    np.testing.assert_allclose(
        d_mu.learned, closed_form[is_learned], rtol=1e-4, atol=2e-6 * size
    )
    # The closed form is Eq. 6 as printed, and both are the derivative of Eq. 5.
    np.testing.assert_allclose(
        closed_form, paper.composite_gradient(vector, full), atol=1e-9 * size + 1e-12
    )
    np.testing.assert_allclose(
        closed_form,
        paper.numerical_gradient(lambda x: paper.composite_loss(vector, x), full),
        atol=1e-7 * size + 1e-12,
    )


@pytest.mark.parametrize("logit", [-17.5, 12.0, 17.5])
@pytest.mark.parametrize("values", [(1.0, 2.0), (1000.0, 1000.5)])
def test_the_slope_of_a_dominant_loss_keeps_sign_and_digits(logit, values):
    mu = yoto.LossLogits(jnp.array([logit]), jax.tree.structure([0.0, 0.0]), 0)
    found = jax.grad(yoto.composite_loss, 1)(list(values), mu).learned[0]
    ratio = np.exp(-abs(np.float64(logit)))
    exact = ratio / (1 + ratio) ** 2 * (values[1] - values[0])
    np.testing.assert_allclose(found, exact, rtol=1e-5)


@given(problems())
@settings(deadline=None, max_examples=10)
def test_forward_mode_and_second_derivatives(problem):
    losses, mu, vector, full, is_learned = problem
    if mu.learned.size == 0:
        return
    with jax.enable_x64(True):
        learned = jnp.array(full[is_learned], jnp.float64)
        f = lambda x: yoto.composite_loss(losses, dataclasses.replace(mu, learned=x))
        embed = np.eye(len(full))[is_learned]
        oracle = lambda x: paper.composite_gradient(vector, full + x @ embed)[
            is_learned
        ]
        size = vector.max() + 1.0
        forward, second = jax.jit(lambda x: (jax.jacfwd(f)(x), jax.hessian(f)(x)))(
            learned
        )
        np.testing.assert_allclose(
            forward, oracle(np.zeros(len(learned))), atol=1e-12 * size
        )
        hessian = np.array(
            [(oracle(d) - oracle(-d)) / 2e-6 for d in np.eye(len(learned)) * 1e-6]
        )
        np.testing.assert_allclose(second, hessian, atol=1e-8 * size)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_low_precision_losses_are_combined_in_float32(dtype):
    losses = {"a": jnp.asarray(1.0, dtype), "b": jnp.asarray(0.1, dtype)}
    mu = yoto.init_loss_logits(losses, "a", epsilon=0.01)
    loss, (d_losses, d_mu) = jax.value_and_grad(yoto.composite_loss, argnums=(0, 1))(
        losses, mu
    )
    assert loss.dtype == jnp.float32
    assert not loss.weak_type
    assert d_losses["a"].dtype == dtype
    assert d_mu.learned.dtype == jnp.float32
    exact = {name: np.float64(value) for name, value in losses.items()}
    expected = (exact["a"] + 0.01 * exact["b"]) / 1.01
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_low_precision_logits_keep_their_dtype_and_are_read_in_float32():
    mu = yoto.init_loss_logits((1.0, 2.0), 0)
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), mu)
    assert yoto.composite_loss((1.0, 2.0), low).dtype == jnp.float32
    gradient = jax.grad(yoto.composite_loss, argnums=1)((1.0, 2.0), low)
    assert gradient.learned.dtype == jnp.bfloat16


def test_float64_losses_give_a_float64_loss():
    with jax.enable_x64(True):
        losses = (jnp.float64(1.0), jnp.float64(2.0))
        mu = yoto.init_loss_logits(losses, 0)
        assert mu.learned.dtype == jnp.float32
        assert yoto.composite_loss(losses, mu).dtype == jnp.float64
        python_floats = yoto.composite_loss((1.0, 2.0), mu)
        assert python_floats.dtype == jnp.float32


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("count", [3, 12])
def test_strict_promotion(dtype, count):
    """The pure functions promote nothing implicitly."""
    losses = tuple(jnp.asarray(k + 1, dtype) for k in range(count))
    mu = yoto.init_loss_logits(losses, 0)
    low = jax.tree.map(lambda x: x.astype(dtype), mu)
    with jax.numpy_dtype_promotion("strict"):
        for logits in (mu, low):
            first = jax.grad(yoto.composite_loss, argnums=(0, 1))
            jax.eval_shape(first, losses, logits)
            jax.eval_shape(jax.hessian(yoto.composite_loss, argnums=1), losses, logits)
            jax.eval_shape(jax.hessian(yoto.regularizer), logits)
            jax.eval_shape(yoto.loss_weights, logits)


@pytest.mark.parametrize("count", [3, 9, 10, 40])
def test_few_and_many_losses_take_the_same_values(count):
    """Short vectors are written out entry by entry, long ones are not."""
    rng = np.random.default_rng(count)
    losses = tuple(map(float, rng.uniform(0, 5, count)))
    mu = yoto.init_loss_logits(
        losses, count // 2, epsilon=list(rng.uniform(0.1, 2, count - 1))
    )
    full = np.insert(np.array(mu.learned, np.float64), count // 2, 0.0)
    loss, gradient = jax.value_and_grad(yoto.composite_loss, argnums=1)(losses, mu)
    vector = np.array(losses)
    np.testing.assert_allclose(loss, paper.composite_loss(vector, full), rtol=1e-6)
    np.testing.assert_allclose(
        gradient.learned,
        np.delete(paper.composite_gradient(vector, full), count // 2),
        rtol=1e-4,
        atol=1e-6,
    )


def test_jit_vmap_and_scan_agree_with_eager():
    mu = yoto.init_loss_logits({"a": 0.0, "b": 0.0}, "a")
    losses = {"a": jnp.linspace(1, 2, 5), "b": jnp.linspace(3, 0, 5)}
    runs = dataclasses.replace(mu, learned=jnp.linspace(-1, 1, 5)[:, None])
    at = lambda tree, k: jax.tree.map(lambda x: x[k], tree)
    eager = [yoto.composite_loss(at(losses, k), at(runs, k)) for k in range(5)]
    np.testing.assert_allclose(
        jax.jit(jax.vmap(yoto.composite_loss))(losses, runs), eager, rtol=1e-6
    )
    _, scanned = jax.lax.scan(
        lambda _, xs: (None, yoto.composite_loss(*xs)), None, (losses, runs)
    )
    np.testing.assert_allclose(scanned, eager, rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_non_finite_loss_shows(bad):
    mu = yoto.init_loss_logits((1.0, 1.0), 0)
    loss, gradient = jax.value_and_grad(yoto.composite_loss, argnums=1)((1.0, bad), mu)
    assert not jnp.isfinite(loss)
    assert not jnp.isfinite(gradient.learned).any()


@pytest.mark.parametrize(
    ("losses", "error", "message"),
    [
        ({"a": 1.0}, ValueError, "missing: 'b'"),
        ({"a": 1.0, "c": 1.0}, ValueError, "missing: 'b'; unexpected: 'c'"),
        ({"a": 1.0, "b": (1.0, 1.0)}, ValueError, "unexpected: 'b/0', 'b/1'"),
        ([1.0, 1.0], ValueError, "missing: 'a', 'b'; unexpected: '0', '1'"),
        ({"a": 1.0, "b": jnp.ones((2, 1))}, ValueError, r"'b' must be a scalar.*2, 1"),
        ({"a": 1.0, "b": 2}, TypeError, "'b' must be a floating-point.*int"),
        ({"a": 1.0, "b": jnp.ones((), bool)}, TypeError, "'b'.*bool"),
        ({"a": 1.0, "b": object()}, TypeError, "'b' is a object"),
    ],
)
def test_errors_name_the_culprit(losses, error, message):
    mu = yoto.init_loss_logits({"a": 0.0, "b": 0.0}, "a")
    with pytest.raises(error, match=message):
        yoto.composite_loss(losses, mu)


def test_a_different_container_is_an_error():
    mu = yoto.init_loss_logits((0.0, 0.0), 0)
    with pytest.raises(ValueError, match="containers"):
        yoto.composite_loss([0.0, 0.0], mu)


def test_a_batch_of_logits_needs_vmap():
    mu = yoto.init_loss_logits((0.0, 0.0), 0)
    batch = dataclasses.replace(mu, learned=jnp.zeros((3, 1)))
    with pytest.raises(ValueError, match=r"\(3, 1\).*vmap"):
        yoto.composite_loss((1.0, 1.0), batch)
