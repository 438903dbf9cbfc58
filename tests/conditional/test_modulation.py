"""FiLM folded into the parameters of any model."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from yoto_jax import conditional

ENCODING = jnp.array([0.3, -0.7])


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Conv(5, (3, 3))(x)).mean((1, 2))
        return nn.Dense(3)(nn.LayerNorm()(x))


IMAGES = jax.random.normal(jax.random.key(0), (2, 6, 6, 2))


@pytest.fixture(scope="module")
def params():
    with jax.numpy_rank_promotion("allow"):
        return Net().init(jax.random.key(1), IMAGES)


def trained(params, hidden=(4,), **options):
    """A modulation whose last layers are not zero any more."""
    made = conditional.init_modulation(
        jax.random.key(2), 2, params, hidden=hidden, **options
    )
    leaves, structure = jax.tree.flatten(made["heads"])
    keys = jax.random.split(jax.random.key(3), len(leaves))
    noise = [jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return {**made, "heads": structure.unflatten(noise)}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("hidden", [(), (4,), (4, 6)])
def test_an_untrained_modulation_changes_nothing(params, dtype, hidden):
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    made = conditional.init_modulation(jax.random.key(0), 2, params, hidden=hidden)
    same = conditional.modulated(params, made, ENCODING)
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(same))
    assert jax.tree.all(jax.tree.map(jnp.array_equal, same, params))


def test_kernels_are_scaled_by_output_feature_and_vectors_shifted(params):
    made = trained(params)
    found = conditional.modulated(params, made, ENCODING)
    first = jax.tree.map(np.float64, made["trunk"][0])
    hidden = np.float64(ENCODING) @ first["kernel"] + first["bias"]
    hidden = np.where(hidden > 0, hidden, 0.2 * hidden)
    for path, leaf in jax.tree.leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        head = jax.tree.map(np.float64, made["heads"][name])
        by = hidden @ head["kernel"] + head["bias"]
        leaf = np.float64(leaf)
        expected = leaf + by if leaf.ndim == 1 else leaf * (1 + by)
        (got,) = (
            x for p, x in jax.tree.leaves_with_path(found) if p == path
        )  # fmt: skip
        np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-6)


def test_it_is_film_of_a_linear_layer():
    x = jax.random.normal(jax.random.key(4), (7, 4))
    kernel = jax.random.normal(jax.random.key(5), (4, 3))
    params = {"kernel": kernel, "bias": jnp.zeros(3)}
    made = trained(params, hidden=())
    heads = made["heads"]
    scale = ENCODING @ heads["kernel"]["kernel"] + heads["kernel"]["bias"]
    shift = ENCODING @ heads["bias"]["kernel"] + heads["bias"]["bias"]
    folded = conditional.modulated(params, made, ENCODING)
    np.testing.assert_allclose(
        x @ folded["kernel"] + jnp.broadcast_to(folded["bias"], (7, 3)),
        conditional.modulate(x @ kernel, scale, shift),
        rtol=1e-5,
        atol=1e-5,
    )


def test_one_trace_serves_all_weightings(params):
    made, traces = trained(params), 0

    @jax.jit
    def predict(encoding):
        nonlocal traces
        traces += 1
        with jax.numpy_rank_promotion("allow"):
            return Net().apply(conditional.modulated(params, made, encoding), IMAGES)

    encodings = jnp.array([[0.3, -0.7], [-1.0, 1.0], [0.0, 0.0]])
    one_by_one = jnp.stack([predict(encoding) for encoding in encodings])
    assert traces == 1
    np.testing.assert_allclose(jax.vmap(predict)(encodings), one_by_one, atol=1e-5)
    assert not np.allclose(one_by_one[0], one_by_one[1])


def test_gradients_reach_the_modulation_from_the_start(params):
    made = conditional.init_modulation(jax.random.key(0), 2, params, hidden=(4,))

    def loss(made):
        with jax.numpy_rank_promotion("allow"):
            y = Net().apply(conditional.modulated(params, made, ENCODING), IMAGES)
        return jnp.sum(y**2)

    slopes = jax.grad(loss)(made)
    assert all(float(jnp.abs(h["bias"]).max()) > 0 for h in slopes["heads"].values())


def test_nothing_varies_nothing_changes(params):
    made = conditional.init_modulation(jax.random.key(0), 0, params)
    support = conditional.Fixed({"a": 1.0, "b": 2.0})
    encoding = conditional.encode({"a": 1.0, "b": 2.0}, support)
    assert conditional.modulated(params, made, encoding) is params


def test_a_choice_of_parameters():
    params = {"w": jnp.ones((2, 3)), "b": jnp.ones(3), "t": 2.0, "n": jnp.arange(3)}
    everything = conditional.init_modulation(jax.random.key(0), 1, params)
    assert sorted(everything["heads"]) == ["b", "w"]
    made = trained(params, where=lambda path, leaf: leaf.ndim == 1)
    assert sorted(made["heads"]) == ["b"]
    found = conditional.modulated(params, made, ENCODING)
    assert found["w"] is params["w"]
    assert found["t"] == 2.0
    assert not np.allclose(found["b"], params["b"])


def test_nnx_and_equinox_models():
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    graph, state = nnx.split(model, nnx.Param)
    found = conditional.modulated(state, trained(state), ENCODING)
    x = jnp.ones((1, 2))
    assert not np.allclose(nnx.merge(graph, found)(x), model(x))
    mlp = eqx.nn.MLP(2, 1, 4, 1, key=jax.random.key(0))
    arrays, rest = eqx.partition(mlp, eqx.is_array)
    found = eqx.combine(conditional.modulated(arrays, trained(arrays), ENCODING), rest)
    assert not np.allclose(found(x[0]), mlp(x[0]))


def test_errors_name_what_is_wrong(params):
    made = conditional.init_modulation(jax.random.key(0), 2, params)
    with pytest.raises(ValueError, match=r"of shape \(E,\); got shape \(1, 2\)"):
        conditional.modulated(params, made, ENCODING[None])
    with pytest.raises(ValueError, match=r"lacks what the modulation is for.*Conv_0"):
        conditional.modulated({"other": jnp.ones((2, 3))}, made, ENCODING)
    wider = jax.tree.map(lambda x: jnp.ones((*x.shape[:-1], 9)), params)
    with pytest.raises(ValueError, match="'params/Conv_0/bias' has 5 features"):
        conditional.modulated(wider, made, ENCODING)
    with pytest.raises(ValueError, match="no parameter is modulated"):
        conditional.init_modulation(jax.random.key(0), 2, {"n": jnp.arange(3)})


def test_an_encoding_of_another_size_is_refused(params):
    for hidden in ((), (4,)):
        made = conditional.init_modulation(jax.random.key(0), 2, params, hidden=hidden)
        with pytest.raises(ValueError, match="for encodings of size 2, got 3"):
            conditional.modulated(params, made, jnp.ones(3))
        with pytest.raises(ValueError, match="for encodings of size 2, got 0"):
            conditional.modulated(params, made, jnp.ones(0))


def test_two_parameters_of_one_path_are_refused():
    params = {"a/b": jnp.ones((2, 3)), "a": {"b": jnp.ones((2, 3))}}
    with pytest.raises(ValueError, match="two parameters have the same path 'a/b'"):
        conditional.init_modulation(0, 1, params)
