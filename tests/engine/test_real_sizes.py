"""Gradients of the compiled engine at the sizes of real models.

A compiler may be right for small arrays and wrong for large ones. On a CPU, jaxlib
0.10.2 is, from 2048 rows of 16 features on, where several pullbacks through a norm of
rows are taken at once; 0.10.0 and 0.10.1 are, from 256 rows of 176 numbers on, in
masked means of reshaped arrays. Programs are compiled here as users compile them.
"""

import functools

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import pytest

import yoto_jax as yoto
from yoto_jax import conditional
from yoto_jax._jaxlib import WRONG_GRADIENTS, WRONG_MEANS

BATCH, LENGTH, WIDTH = 32, 64, 32
WEIGHTS = {"cross": 0.5, "fit": 1.0, "label": -0.25, "size": 2.0}
NAMES = list(WEIGHTS)


def rms_norm(x):
    return x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)


def layer_norm(x):
    centred = x - jnp.mean(x, -1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.mean(centred**2, -1, keepdims=True) + 1e-6)


def attention(x, w):
    q, k, v = jnp.split(x @ w, 3, axis=-1)
    scores = jax.nn.softmax(q @ jnp.swapaxes(k, -1, -2) / WIDTH**0.5, axis=-1)
    return scores @ v


def encoder(params, batch):
    z = rms_norm(batch["x"] @ params["embed"])
    z = z + attention(rms_norm(z), params["attention"])
    z = z + jax.nn.gelu(layer_norm(z) @ params["wide"]) @ params["narrow"]
    window = (1,), "SAME"
    numbers = ("NWC", "WIO", "NWC")
    z = z + jax.lax.conv_general_dilated(
        z, params["kernel"], *window, None, None, numbers
    )
    return rms_norm(z) * params["gain"]


def per_example(params, z, batch):
    prediction = z @ params["head"]
    means = lambda x: jnp.mean(x, axis=tuple(range(1, x.ndim)))
    return {
        "cross": means(z[..., 1:] * jnp.tanh(z[..., :-1])),
        "fit": means((prediction[..., 0] - batch["y"]) ** 2),
        "label": means(jax.nn.softplus(prediction[..., 1] * batch["y"])),
        "size": means(z**3),
    }


def head_losses(params, z, batch):
    return jax.tree.map(jnp.mean, per_example(params, z, batch))


def loss_fn(params, batch):
    return head_losses(params, encoder(params, batch), batch)


pytestmark = pytest.mark.usefixtures("any_rank", "full_compilation")


@functools.cache
def problem(dtype):
    keys = iter(jax.random.split(jax.random.key(0), 16))

    def normal(*shape: int, scale: float = 1.0) -> jax.Array:
        return (scale * jax.random.normal(next(keys), shape)).astype(dtype)

    params = {
        "embed": normal(16, WIDTH, scale=0.3),
        "attention": normal(WIDTH, 3 * WIDTH, scale=0.2),
        "wide": normal(WIDTH, 2 * WIDTH, scale=0.2),
        "narrow": normal(2 * WIDTH, WIDTH, scale=0.2),
        "kernel": normal(3, WIDTH, WIDTH, scale=0.1),
        "gain": 1 + normal(WIDTH, scale=0.1),
        "head": normal(WIDTH, 2, scale=0.2),
    }
    batches = [
        {"x": normal(BATCH, LENGTH, 16), "y": normal(BATCH, LENGTH)} for _ in range(2)
    ]
    return params, *batches


@functools.cache
def single_gradients(dtype, validation=False):
    """The gradient of each loss on its own, one backward pass at a time."""
    params, training, other = problem(dtype)
    batch = other if validation else training
    one = jax.jit(jax.grad(lambda p, weights: dot(weights, loss_fn(p, batch))))
    basis = jnp.eye(len(NAMES))
    return [one(params, dict(zip(NAMES, row, strict=True))) for row in basis]


def dot(weights, losses):
    return sum(weights[name] * losses[name].astype(jnp.float32) for name in NAMES)


def flat(tree):
    leaves = [np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)]
    return np.concatenate(leaves)


def rows_of(dtype, part=lambda params: params, **kwargs):
    return np.stack([flat(part(g)) for g in single_gradients(dtype, **kwargs)])


def assert_near(got, expected, dtype, what=""):
    error = np.linalg.norm(got - expected) / np.linalg.norm(expected)
    assert error < (1e-4 if dtype == jnp.float32 else 0.05), (what, error)


def looking_at(*needs, downstream=None):
    """A weighting of known weights that shows what it was told."""
    weights = {name: jnp.float32(w) for name, w in WEIGHTS.items()}

    def init(losses):
        return {"loss_weights": weights}

    def update(losses, state, **statistics):
        return weights, {"loss_weights": weights} | statistics

    return yoto.LossWeighting(init, update, needs, downstream)


DTYPES = [jnp.float32, jnp.bfloat16]
SOURCES = {
    "all": {},
    "chunks": {"chunk_size": 2},
    "not kept": {"keep": False},
    "not kept, chunks": {"keep": False, "chunk_size": 2},
    "selected": {"select": lambda params: params["wide"]},
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, jnp.float32) for name in SOURCES),
        pytest.param("all", jnp.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_gradients_of_parameters(name, dtype):
    options = SOURCES[name]
    params, batch, _ = problem(dtype)
    weighting = looking_at("gramian", "norms")
    source = yoto.of_parameters(**options)
    step = jax.jit(yoto.value_and_grad(loss_fn, weighting, gradients=source))
    _, grads, state = step(params, weighting.init(None), batch)
    rows = rows_of(dtype)
    assert_near(flat(grads), np.array(list(WEIGHTS.values())) @ rows, dtype)
    seen = rows_of(dtype, options.get("select", lambda params: params))
    assert_near(np.asarray(state["gramian"]), seen @ seen.T, dtype, "gramian")
    assert_near(np.asarray(state["norms"]), np.linalg.norm(seen, axis=1), dtype)


@pytest.mark.slow
def test_norms_one_gradient_at_a_time():
    params, batch, _ = problem(jnp.float32)
    weighting = looking_at("max_abs", "mean_abs")
    source = yoto.of_parameters(keep=False, chunk_size=3)
    f = yoto.value_and_grad(loss_fn, weighting, gradients=source)
    _, _, state = jax.jit(f)(params, weighting.init(None), batch)
    rows = np.abs(rows_of(jnp.float32))
    assert_near(np.asarray(state["max_abs"]), rows.max(1), jnp.float32)
    assert_near(np.asarray(state["mean_abs"]), rows.mean(1), jnp.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_the_representation(dtype):
    params, batch, _ = problem(dtype)
    weighting = looking_at("gramian")
    source = yoto.of_representation(encoder, weigh_heads=True)
    step = yoto.value_and_grad(head_losses, weighting, gradients=source)
    _, grads, state = jax.jit(step)(params, weighting.init(None), batch)
    rows = rows_of(dtype)
    assert_near(flat(grads), np.array(list(WEIGHTS.values())) @ rows, dtype)

    z = jax.jit(encoder)(params, batch)
    of_z = lambda z, weights: dot(weights, head_losses(params, z, batch))
    one = jax.jit(jax.grad(of_z))
    seen = np.stack(
        [flat(one(z, dict(zip(NAMES, row, strict=True)))) for row in jnp.eye(4)]
    )
    assert_near(np.asarray(state["gramian"]), seen @ seen.T, dtype, "gramian")


def test_a_jacobian_and_its_aggregate():
    params, batch, _ = problem(jnp.float32)
    f = yoto.value_and_jacobian(loss_fn)
    losses, jacobian = jax.jit(f)(params, batch)
    rows = rows_of(jnp.float32)
    each = [jax.tree.map(lambda x, k=k: x[k], jacobian) for k in range(len(NAMES))]
    for got, row in zip(each, rows, strict=True):
        assert_near(flat(got), row, jnp.float32)

    tx = yoto.aggregate(looking_at("gramian"), losses)
    state = tx.init(params)

    @jax.jit
    def step(params, state, batch):
        _, jacobian = f(params, batch)
        return tx.update(jacobian, state, params)

    grads, state = step(params, state, batch)
    assert_near(flat(grads), np.array(list(WEIGHTS.values())) @ rows, jnp.float32)
    assert_near(np.asarray(state["gramian"]), rows @ rows.T, jnp.float32)


@pytest.mark.parametrize(
    ("needs", "all_losses"),
    [
        ("alignment", True),
        ("gramian", False),
        pytest.param("alignment", False, marks=pytest.mark.slow),
        pytest.param("gramian", True, marks=pytest.mark.slow),
    ],
)
def test_downstream_rows_and_directional_derivatives(needs, all_losses):
    params, batch, other = problem(jnp.float32)
    weighting = looking_at(needs, downstream="label")
    steering = yoto.on_validation(all_losses=all_losses)
    step = jax.jit(yoto.value_and_grad(loss_fn, weighting, steering=steering))
    _, grads, state = step(params, weighting.init(None), (other,), batch)
    training, held_out = rows_of(jnp.float32), rows_of(jnp.float32, validation=True)
    assert_near(flat(grads), np.array(list(WEIGHTS.values())) @ training, jnp.float32)
    place = NAMES.index("label")
    v = held_out[place]
    if needs == "alignment":
        expected = (held_out if all_losses else training) @ v
    elif all_losses:
        expected = held_out @ held_out.T
    else:
        expected = training @ training.T
        expected[place] = expected[:, place] = training @ v
        expected[place, place] = v @ v
    assert_near(np.asarray(state[needs]), expected, jnp.float32, needs)


def test_conditional_losses_per_example():
    params, batch, _ = problem(jnp.float32)
    spread = lambda w: jnp.linspace(abs(w), 2 * abs(w), BATCH)
    weights = {name: spread(w) for name, w in WEIGHTS.items()}

    def objective(params, batch):
        losses = per_example(params, encoder(params, batch), batch)
        return conditional.conditional_loss(losses, weights)

    got = jax.jit(jax.grad(objective))(params, batch)
    one = jax.jit(jax.grad(lambda params, example, w: dot(w, loss_fn(params, example))))
    total = 0
    for k in range(BATCH):
        example = jax.tree.map(lambda x, k=k: x[k : k + 1], batch)
        w = {name: w[k] for name, w in weights.items()}
        total = total + flat(one(params, example, w)) / BATCH
    assert_near(flat(got), total, jnp.float32)


def test_a_residual_kernel():
    """Gradients of single points, in one ``vmap``."""
    params, batch, _ = problem(jnp.float32)
    points = batch["x"].reshape(BATCH, LENGTH, 16)
    residual = lambda w, x: jnp.mean(rms_norm(x @ w) ** 3)
    kernel = jax.jit(lambda w: yoto.weightings.ntk_diagonal(residual, w, points))
    got = kernel(params["embed"])
    one = jax.jit(jax.grad(residual))
    expected = np.mean([np.sum(flat(one(params["embed"], x)) ** 2) for x in points])
    np.testing.assert_allclose(got, expected, rtol=1e-4)


@pytest.mark.parametrize(
    "shape", [(256, 11, 16), (2048, 4, 10), (256, 25, 40)], ids=str
)
@pytest.mark.parametrize("bound", [0.0, 2.0])
def test_masked_means_of_reshaped_arrays(shape, bound):
    """What a loss over the labelled pixels of each image is made of."""
    x = jax.random.uniform(jax.random.key(0), shape, minval=1.0, maxval=8.0)
    rows = lambda x: x.reshape(len(x), -1)

    @jax.jit
    def means(x):
        return jnp.mean(rows(x), axis=1, where=rows(x > bound))

    @jax.jit
    def helped(x):
        return yoto.masked_mean({"a": x}, {"a": x > bound}).losses["a"]

    exact = np.asarray(x, np.float64)
    expected = np.mean(rows(exact), axis=1, where=rows(exact > bound))
    np.testing.assert_allclose(means(x), expected, rtol=1e-5)
    np.testing.assert_allclose(helped(x), exact[exact > bound].mean(), rtol=1e-5)


def test_versions_with_wrong_means_are_warned_of(monkeypatch):
    monkeypatch.setattr(jaxlib, "__version__", WRONG_MEANS[0])
    equal = yoto.weightings.equal()
    step = yoto.value_and_grad(lambda w: {"a": w**2, "b": w}, equal)
    with pytest.warns(RuntimeWarning, match=r"0\.10\.0.*wrong means.*pip install"):
        step(1.0, equal.init({"a": 0.0, "b": 0.0}))
    with pytest.warns(RuntimeWarning, match="wrong means"):
        yoto.masked_mean({"a": jnp.ones(3)}, {"a": jnp.ones(3, bool)})


def test_versions_that_miscompile_are_refused(monkeypatch):
    monkeypatch.setattr(jaxlib, "__version__", WRONG_GRADIENTS[0])
    weighting = looking_at("gramian")
    step = yoto.value_and_grad(lambda w: {"a": w**2, "b": w}, weighting)
    with pytest.raises(RuntimeError, match=r"0\.10\.2.*pip install"):
        step(1.0, weighting.init(None))
    with pytest.raises(RuntimeError, match=r"0\.10\.2"):
        yoto.value_and_jacobian(lambda w: {"a": w**2})(1.0)
    # One backward pass is right everywhere.
    equal = yoto.weightings.equal()
    f = yoto.value_and_grad(lambda w: {"a": w**2, "b": w}, equal)
    _, grad, _ = f(1.0, equal.init({"a": 0.0, "b": 0.0}))
    assert grad == 1.5
