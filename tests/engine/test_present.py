"""Losses that are absent from a batch: the method on those that are there."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import yoto_jax as yoto
from tests.contract.test_weightings import MESH, ROWS, unkeyed
from yoto_jax import weightings

pytestmark = pytest.mark.usefixtures("quick_compilation")

NAMES = "abc"
# "b" is absent in half of the batches; "a" leads methods that have a primary loss.
BATCHES = [(1, 1, 1), (1, 0, 1), (1, 1, 1), (1, 0, 1), (1, 0, 1), (1, 1, 1)]


def batch(step):
    """Losses and statistics of one step, consistent with each other."""
    rng = np.random.default_rng(step)
    rows = rng.normal(size=(3, 5)) * np.array([1.0, 0.5, 2.0])[:, None]
    values = rng.uniform(0.3, 2.0, 3)
    others = rows + 0.3 * rng.normal(size=(3, 5))  # of an independent batch
    return values, {
        "gramian": rows @ rows.T,
        "cross_gramian": rows @ others.T,
        "norms": np.linalg.norm(rows, axis=1),
        "max_abs": np.abs(rows).max(1),
        "mean_abs": np.abs(rows).mean(1),
        "std": rows.std(1),
        "alignment": rows @ rows[0],
        "ntk_diagonal": (rows**2).sum(1),
    }


def told(weighting, losses, statistics, there):
    """What an update is told of the losses that are there."""
    names = [NAMES[k] for k in there]
    tree = {name: np.float32(losses[k]) for name, k in zip(names, there, strict=True)}
    seen = {}
    for name in weighting.needs:
        if name != "losses":
            x = statistics[name][there]
            x = x[:, there] if x.ndim == 2 else x
            seen[name] = np.asarray(x, np.float32)
    return tree, seen


def axes_of_losses(full, part):
    """Which axes of a leaf have one entry per loss, told by two numbers of losses."""
    return [k for k in range(full.ndim) if full.shape[k] != part.shape[k]]


def places(size, there):
    """Entries of the losses that are there; the first loss may have none."""
    return there if size == 3 else [k - 1 for k in there if k]


def restrict(full, template, there):
    """A state of three losses as one of those that are there."""

    def take(x, like):
        for axis in axes_of_losses(x, like):
            x = np.take(x, places(x.shape[axis], there), axis)
        return jnp.asarray(x, like.dtype)

    leaves = by_path(full)
    found = [take(leaves[path], like) for path, like in by_path(template).items()]
    return jax.tree.unflatten(jax.tree.structure(template), found)


def by_path(tree):
    flat = jax.tree.leaves_with_path(unkeyed(tree))
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in flat}


def put_back(full, part, there):
    """What has become of them, in the state of three losses."""

    def put(x, y):
        if not (axes := axes_of_losses(x, y)):
            return y
        x = np.array(x)
        index = [np.arange(n) for n in x.shape]
        for axis in axes:
            index[axis] = np.asarray(places(x.shape[axis], there))
        x[np.ix_(*index)] = y
        return x

    parts = by_path(part)
    found = [put(x, parts.get(path, x)) for path, x in by_path(full).items()]
    return jax.tree.unflatten(jax.tree.structure(full), found)


def rekeyed(tree, like):
    wrap = lambda x, y: (
        jax.random.wrap_key_data(jnp.asarray(x, jnp.uint32))
        if jnp.issubdtype(y.dtype, jax.dtypes.prng_key)
        else jnp.asarray(x, y.dtype)
    )
    return jax.tree.map(wrap, tree, like)


def restricted_update(name, weighting, state, losses, statistics, there):
    """The method, made for the losses that are there, on their part of the state."""
    tree, seen = told(weighting, losses, statistics, there)
    template = weighting.init(tree)
    part = rekeyed(restrict(state, template, there), template)
    scale = 1.0
    if name == "gradnorm":  # Its weights sum to the number of losses.
        total = jnp.sum(jnp.abs(part.inner.task_weights))
        scale = total / len(there)
        inner = part.inner._replace(task_weights=part.inner.task_weights / scale)
        part = part._replace(inner=inner)
    weights, part = update_of(name)(tree, part, **seen)
    if name == "gradnorm":
        inner = part.inner._replace(task_weights=part.inner.task_weights * scale)
        part = part._replace(inner=inner)
    return weights, rekeyed(put_back(state, part, there), state)


@functools.cache
def made(name):
    return ROWS[name].make("a")


@functools.cache
def update_of(name):
    return jax.jit(made(name).update)


# For these, `make test` has the contract's check of fewer losses, which is the same
# comparison over three updates.
COMPARED = ("equal", "famo", "lr_annealing", "ntk_surrogate")
COMPARED += ("nash_mtl", "aligned_mtl", "upgrad")
METHODS = [
    pytest.param(name, marks=pytest.mark.slow if name in COMPARED else ())
    for name in ROWS
    if name != "random"
]


@pytest.mark.parametrize("name", METHODS)
def test_a_run_is_that_of_the_losses_that_are_there(name):
    chex.clear_trace_counter()  # It counts by name, over all tests.
    weighting = made(name)
    everything = [0, 1, 2]
    state = weighting.init(told(weighting, *batch(0), everything)[0])
    expected = state
    once = chex.assert_max_traces(n=1)
    masked = jax.jit(once(lambda *args, **kwargs: weighting.update(*args, **kwargs)))
    for step, present in enumerate(BATCHES):
        losses, statistics = batch(step)
        there = [k for k in everything if present[k]]
        tree, seen = told(weighting, losses, statistics, everything)
        if not present[1]:  # What stands for an absent loss does not matter.
            tree["b"] = np.float32(np.nan)
            for x in seen.values():
                x[1] = np.inf
        here = {n: np.bool_(p) for n, p in zip(NAMES, present, strict=True)}
        weights, state = masked(tree, state, present=here, **seen)
        expected_weights, expected = restricted_update(
            name, weighting, expected, losses, statistics, there
        )
        got = {NAMES[k]: weights[NAMES[k]] for k in there}
        chex.assert_trees_all_close(got, expected_weights, rtol=2e-4, atol=1e-6)
        if not present[1]:
            assert weights["b"] == 0
        chex.assert_trees_all_close(
            unkeyed(state), unkeyed(expected), rtol=2e-4, atol=1e-6
        )
    nothing = dict.fromkeys(NAMES, np.bool_(False))
    weights, after = masked(tree, state, present=nothing, **seen)
    assert not any(jax.tree.leaves(weights))
    chex.assert_trees_all_equal(unkeyed(after), unkeyed(state))


def test_random_weights_are_shared_among_the_present():
    weighting = weightings.random(key=0)
    losses = dict.fromkeys(NAMES, jnp.float32(1))
    state = weighting.init(losses)
    everything, _ = weighting.update(losses, state)
    here = {"a": True, "b": False, "c": True}
    weights, _ = weighting.update(losses, state, present=here)
    shared = everything["a"] + everything["c"]
    np.testing.assert_allclose(weights["a"], everything["a"] / shared, rtol=1e-6)
    np.testing.assert_allclose(weights["c"], everything["c"] / shared, rtol=1e-6)
    assert weights["b"] == 0


def test_famo_learns_from_the_losses_that_are_there_after_the_step():
    weighting = weightings.famo(exact=True)
    losses = {"a": 1.0, "b": 2.0, "c": 3.0}
    here = {"a": True, "b": False, "c": True}
    after = {"a": 0.5, "b": np.nan, "c": 3.0}

    @jax.jit
    def logits(losses, after, present=None):
        _, state = weighting.update(losses, weighting.init(losses), present=present)
        return weighting.observe_step(after, state, present=present).inner.task_logits

    tell = lambda tree: {name: tree[name] for name in "ac"}
    found, alone = logits(losses, after, here), logits(tell(losses), tell(after))
    np.testing.assert_allclose(np.asarray(found)[[0, 2]], alone)
    assert found[1] == 0


# The engine.

PARAMS = {"w": jnp.linspace(-1, 1, 12).reshape(4, 3), "b": jnp.linspace(0.1, 0.4, 3)}
X = jax.random.normal(jax.random.key(3), (16, 4))
MASKS = {  # "b" is labelled on the first quarter alone, "c" nowhere
    "a": jnp.ones(16, bool),
    "b": jnp.arange(16) < 4,
    "c": jnp.zeros(16, bool),
}


def encoder(params, x, masks):
    return jnp.tanh(x @ params["w"])


def errors(params, z):
    y = z @ params["b"]
    return {"a": (y - 0.5) ** 2, "b": jnp.sum(z**2, -1), "c": (y + 1.0) ** 2}


def head(params, z, x, masks, axis_name=None):
    return yoto.masked_mean(errors(params, z), masks, axis_name=axis_name)


def loss_fn(params, x, masks, axis_name=None):
    return head(params, encoder(params, x, masks), x, masks, axis_name)


def two_losses(params, x):
    values = errors(params, encoder(params, x, None))
    return {"a": jnp.mean(values["a"]), "b": jnp.mean(values["b"][:4])}


WAYS = {
    "all": yoto.of_parameters(),
    "chunks": yoto.of_parameters(chunk_size=2),
    "not kept": yoto.of_parameters(keep=False),
    "selected": yoto.of_parameters(select=lambda params: params["w"]),
    "encoder": yoto.of_representation(encoder, weigh_heads=True),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_engine_weighs_what_is_there(way):
    source = WAYS[way]
    f = head if way == "encoder" else loss_fn
    weighting = weightings.upgrad()
    state = weighting.init(jax.eval_shape(loss_fn, PARAMS, X, MASKS).losses)
    step = jax.jit(yoto.value_and_grad(f, weighting, gradients=source))
    losses, grads, state = step(PARAMS, state, X, MASKS)
    assert isinstance(losses, yoto.MaskedLosses)
    assert jax.tree.map(bool, losses.present) == {"a": True, "b": True, "c": False}

    g = two_losses
    if way == "encoder":
        encode = lambda params, x: encoder(params, x, None)
        source = yoto.of_representation(encode, weigh_heads=True)
        g = lambda params, z, x: {
            "a": jnp.mean(errors(params, z)["a"]),
            "b": jnp.mean(errors(params, z)["b"][:4]),
        }
    first = weighting.init(jax.eval_shape(two_losses, PARAMS, X))
    expected, expected_grads, after = jax.jit(
        yoto.value_and_grad(g, weighting, gradients=source)
    )(PARAMS, first, X)
    chex.assert_trees_all_close(grads, expected_grads, rtol=1e-4, atol=1e-6)
    for name in "ab":
        np.testing.assert_allclose(losses.losses[name], expected[name], rtol=1e-6)
        np.testing.assert_allclose(
            state.loss_weights[name], after.loss_weights[name], rtol=1e-4
        )


@pytest.mark.parametrize("way", ["all", "encoder"])
def test_plain_losses_with_a_mask_of_their_own(way):
    weighting = weightings.mgda()
    f = lambda params, x: {**two_losses(params, x), "c": jnp.float32(0)}
    state = weighting.init(jax.eval_shape(f, PARAMS, X))
    _, grads, after = jax.jit(yoto.value_and_grad(f, weighting))(PARAMS, state, X)
    largest = max(float(jnp.max(jnp.abs(g))) for g in jax.tree.leaves(grads))
    assert largest < 1e-12, "all weight on c, but for rounding"
    present = {"a": True, "b": True, "c": False}
    masked = lambda *args: yoto.MaskedLosses(f(*args[:-1]), args[-1])
    source = None
    if way == "encoder":  # which an absent loss need not depend on
        source = yoto.of_representation(lambda params, *_: params)
        masked = lambda _, z, x, there: yoto.MaskedLosses(f(z, x), there)
    step = jax.jit(yoto.value_and_grad(masked, weighting, gradients=source))
    losses, grads, after = step(PARAMS, state, X, present)
    assert set(losses.losses) == set("abc")
    chex.assert_trees_all_equal(losses.present, present)
    first = weighting.init(jax.eval_shape(two_losses, PARAMS, X))
    pair = jax.jit(yoto.value_and_grad(two_losses, weighting))
    _, expected, _ = pair(PARAMS, first, X)
    chex.assert_trees_all_close(grads, expected, rtol=1e-4, atol=1e-6)

    nothing = dict.fromkeys(present, False)
    _, grads, same = step(PARAMS, after, X, nothing)
    assert not any(jnp.any(g) for g in jax.tree.leaves(grads))
    chex.assert_trees_all_equal(same, after)


def test_a_downstream_loss_that_only_the_validation_batch_has():
    weighting = weightings.grap("a")
    unlabelled = MASKS | {"a": jnp.zeros(16, bool), "c": jnp.ones(16, bool)}
    labelled = MASKS | {"c": jnp.ones(16, bool)}
    state = weighting.init(jax.eval_shape(loss_fn, PARAMS, X, MASKS).losses)
    step = yoto.value_and_grad(loss_fn, weighting, steering=yoto.on_validation())
    step = jax.jit(step)
    _, _, after = step(PARAMS, state, (X, labelled), X, unlabelled)
    assert (after.inner.statistics.num_compared == 1).all()
    # Nor does a batch without it teach anything where no other one is given.
    train = jax.jit(yoto.value_and_grad(loss_fn, weighting))
    _, _, after = train(PARAMS, state, X, unlabelled)
    assert (after.inner.statistics.num_compared == 0).all()
    assert (after.inner.statistics.num_batches == 1).all()


@pytest.mark.parametrize("all_losses", [False, True])
@pytest.mark.parametrize("make", [weightings.auto_lambda, weightings.softmax_alignment])
def test_a_validation_batch_without_the_downstream_loss_teaches_nothing(
    make, all_losses
):
    """Whether or not the training batch says that it has all losses."""
    weighting = make("a")
    names = dict.fromkeys("abc", True)

    def f(params, x, mask, says):
        losses = {**two_losses(params, x), "c": jnp.mean(params["b"] ** 2)}
        return yoto.MaskedLosses(losses, names | {"a": mask}) if says else losses

    steering = yoto.on_validation(all_losses=all_losses)
    step = yoto.value_and_grad(f, weighting, steering=steering)
    first = weighting.init(dict.fromkeys("abc", 0.0))
    for says in (False, True):
        _, _, after = step(PARAMS, first, (X, False, True), X, True, says)
        chex.assert_trees_all_close(
            optax.tree.get(after, "loss_weights"), first.loss_weights, rtol=1e-6
        )
        _, _, after = step(PARAMS, first, (X, True, True), X, True, says)
        moved = after.inner
        assert not jax.tree.all(
            jax.tree.map(lambda x, y: jnp.all(x == y), moved, first.inner)
        )


@pytest.mark.skipif(MESH is None, reason="needs eight (virtual) devices")
@pytest.mark.parametrize("way", ["shard_map", "unchecked", "pmap"])
def test_devices_that_disagree_about_labels(way):
    """Two of eight devices have labels of "b", none has any of "c"."""
    weighting = weightings.every(weightings.upgrad(), 2)
    state = weighting.init(jax.eval_shape(loss_fn, PARAMS, X, MASKS).losses)
    one = jax.jit(yoto.value_and_grad(loss_fn, weighting))
    f = functools.partial(loss_fn, axis_name="d")
    many = yoto.value_and_grad(f, weighting, axis_name="d")
    shape = lambda tree: jax.tree.map(lambda x: x.reshape(8, 2, *x.shape[1:]), tree)
    if way == "pmap":
        mapped = jax.pmap(many, axis_name="d", in_axes=(None, None, 0, 0))
        step = lambda params, state, x, masks: jax.tree.map(
            lambda y: y[5], mapped(params, state, shape(x), shape(masks))
        )
    else:
        specs = jax.P(), jax.P(), jax.P("d"), jax.P("d")
        mapped = jax.shard_map(
            many, mesh=MESH, in_specs=specs, out_specs=jax.P(), check_vma=way[0] == "s"
        )
        step = jax.jit(mapped)
    expected = got = state
    for x in (X, X[::-1]):
        losses, grads, expected = one(PARAMS, expected, x, MASKS)
        out = step(PARAMS, got, x, MASKS)
        got = out[2]
        chex.assert_trees_all_close(
            out, (losses, grads, expected), rtol=1e-4, atol=1e-6
        )


@pytest.mark.skipif(MESH is None, reason="needs eight (virtual) devices")
def test_losses_are_averaged_over_the_devices_that_have_them():
    weighting = weightings.equal()
    f = lambda w, x, there: yoto.MaskedLosses(
        {"a": jnp.mean(x * w), "b": jnp.where(there[0], x[0] * w, 7)},
        {"a": True, "b": there[0]},
    )
    state = weighting.init({"a": 0.0, "b": 0.0})
    step = yoto.value_and_grad(f, weighting, axis_name="d")
    mapped = jax.shard_map(
        step,
        mesh=MESH,
        in_specs=(jax.P(), jax.P(), jax.P("d"), jax.P("d")),
        out_specs=jax.P(),
    )
    x, there = jnp.arange(8.0), jnp.arange(8) >= 6
    (losses, _), grad, _ = jax.jit(mapped)(2.0, state, x, there)
    np.testing.assert_allclose([losses["a"], losses["b"]], [7.0, 13.0])
    np.testing.assert_allclose(grad, (3.5 + 6.5) / 2)
    (losses, _), grad, _ = jax.jit(mapped)(2.0, state, x, there & False)
    np.testing.assert_allclose([losses["a"], losses["b"], grad], [7.0, 0.0, 3.5])


def test_aggregate_leaves_out_absent_rows():
    weighting = weightings.upgrad()
    rows = jnp.array([[3.0, 0.0], [jnp.nan, jnp.inf], [-1.0, 2.0]])
    tx = yoto.aggregate(weighting, 3)
    present = (True, False, True)
    update = jax.jit(functools.partial(tx.update, present=present))
    got, state = update(rows, tx.init(None))
    pair = yoto.aggregate(weighting, 2)
    expected, _ = jax.jit(pair.update)(rows[::2], pair.init(None))
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    assert state.num_updates == 1


# Loss logits.


def test_the_composite_loss_of_present_losses():
    losses = {"a": 2.0, "b": np.nan, "c": 5.0}
    mu = yoto.init_loss_logits(losses, "a", epsilon={"b": 0.7, "c": 0.25})
    present = {"a": True, "b": False, "c": True}
    f = lambda losses, mu: yoto.composite_loss(losses, mu, present=present)
    value, (d_losses, d_mu) = jax.value_and_grad(f, (0, 1))(losses, mu)
    weights = {"a": 0.8, "c": 0.2}
    np.testing.assert_allclose(value, 0.8 * 2 + 0.2 * 5, rtol=1e-6)
    np.testing.assert_allclose([d_losses["a"], d_losses["c"]], [0.8, 0.2], rtol=1e-6)
    assert d_losses["b"] == 0
    np.testing.assert_allclose(d_mu.learned, [0, weights["c"] * (5 - value)], rtol=1e-6)
    # Without the primary loss, the auxiliary ones share the weight.
    present = {"a": False, "b": False, "c": True}
    assert yoto.composite_loss(losses, mu, present=present) == 5.0
    nothing = dict.fromkeys(present, False)
    assert yoto.composite_loss(losses, mu, present=nothing) == 0


@pytest.mark.parametrize("entropy", ["all", "auxiliary"])
def test_the_regularizer_of_present_losses(entropy):
    losses = dict.fromkeys("abc", 0.0)
    mu = yoto.init_loss_logits(losses, "a", epsilon={"b": 0.7, "c": 0.25})
    pair = yoto.init_loss_logits({"a": 0.0, "c": 0.0}, "a", epsilon=0.25)
    present = {"a": True, "b": False, "c": True}
    f = lambda mu: yoto.regularizer(mu, entropy=entropy, present=present)
    g = lambda mu: yoto.regularizer(mu, entropy=entropy)
    value, slope = jax.value_and_grad(f)(mu)
    expected, expected_slope = jax.value_and_grad(g)(pair)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(slope.learned[1:], expected_slope.learned, rtol=1e-6)
    assert slope.learned[0] == 0


@pytest.mark.parametrize(
    "tx", [yoto.adamw(0.1), yoto.sgdw(0.1), optax.MultiSteps(yoto.adamw(0.1), 1)]
)
def test_optimizers_hold_absent_logits(tx):
    losses = {"a": 1.0, "b": 2.0, "c": 3.0}
    params = {"w": jnp.ones(2), "mu": yoto.init_loss_logits(losses, "a", epsilon=0.5)}
    pair = {
        "w": jnp.ones(2),
        "mu": yoto.init_loss_logits({"a": 1.0, "c": 3.0}, "a", epsilon=0.5),
    }
    here = {"a": True, "b": False, "c": True}

    def run(params, losses, **present):
        @jax.jit
        def step(params, state):
            f = lambda p: yoto.composite_loss(
                jax.tree.map(lambda x: x * jnp.sum(p["w"]), losses), p["mu"], **present
            )
            updates, state = tx.update(jax.grad(f)(params), state, params, **present)
            return optax.apply_updates(params, updates), state

        state = tx.init(params)
        for _ in range(3):
            params, state = step(params, state)
        return params, state

    new, state = run(params, losses, present=here)
    expected, _ = run(pair, {"a": 1.0, "c": 3.0})
    np.testing.assert_allclose(new["w"], expected["w"], rtol=1e-5)
    np.testing.assert_allclose(
        new["mu"].learned[1], expected["mu"].learned[0], rtol=1e-5
    )
    assert new["mu"].learned[0] == params["mu"].learned[0]
    moments = [
        x.learned[0]
        for x in jax.tree.leaves(
            state, is_leaf=lambda x: isinstance(x, yoto.LossLogits)
        )
        if isinstance(x, yoto.LossLogits)
    ]
    assert moments
    assert not any(moments)


# Means over labelled examples.


def test_masked_means():
    rng = np.random.default_rng(0)
    values = {"a": rng.normal(size=(5, 2, 3)), "b": rng.normal(size=5)}
    masks = {"a": np.array([1, 0, 1, 1, 0], bool), "b": np.zeros(5, bool)}
    losses, present = jax.jit(yoto.masked_mean)(values, masks)
    np.testing.assert_allclose(losses["a"], values["a"][masks["a"]].mean(), rtol=1e-6)
    assert losses["b"] == 0
    assert jax.tree.map(bool, present) == {"a": True, "b": False}
    slope = jax.grad(lambda x: yoto.masked_mean(x, masks["a"]).losses)(values["a"])
    expected = np.where(masks["a"][:, None, None], 1 / 18, 0) + 0 * values["a"]
    np.testing.assert_allclose(slope, expected, rtol=1e-6)
    half = jnp.asarray(values["b"], jnp.bfloat16)
    assert yoto.masked_mean(half, jnp.ones(5, bool)).losses.dtype == jnp.float32
    missing = jnp.array([1.0, jnp.nan])
    assert yoto.masked_mean(missing, jnp.array([True, False])).losses == 1


@pytest.mark.parametrize(
    ("values", "masks", "error", "match"),
    [
        (jnp.ones(3), jnp.ones(3), TypeError, "boolean"),
        (jnp.ones(3), jnp.ones(2, bool), ValueError, r"\(3,\).*got \(2,\)"),
        (jnp.ones(3, int), jnp.ones(3, bool), TypeError, "floating-point"),
        ({"a": jnp.ones(3)}, {"b": jnp.ones(3, bool)}, ValueError, "missing: 'a'"),
    ],
)
def test_masks_that_do_not_fit(values, masks, error, match):
    with pytest.raises(error, match=match):
        yoto.masked_mean(values, masks)


@pytest.mark.parametrize(
    ("present", "error", "match"),
    [
        ({"a": True}, ValueError, "missing: 'b'"),
        ({"a": 1.0, "b": 0.0}, TypeError, "boolean"),
        ({"a": jnp.ones(3, bool), "b": True}, TypeError, r"shape \(3,\)"),
    ],
)
def test_presence_that_does_not_fit(present, error, match):
    losses = {"a": 1.0, "b": 2.0}
    weighting = weightings.equal()
    state = weighting.init(losses)
    with pytest.raises(error, match=match):
        weighting.update(losses, state, present=present)
    mu = yoto.init_loss_logits(losses, "a")
    with pytest.raises(error, match=match):
        yoto.composite_loss(losses, mu, present=present)
    f = lambda w: yoto.MaskedLosses({"a": w, "b": w}, present)
    step = yoto.value_and_grad(f, weighting)
    with pytest.raises(error, match=match):
        step(1.0, state)


def test_masked_losses_for_losses():
    masked = yoto.masked_mean({"a": jnp.ones(2)}, {"a": jnp.ones(2, bool)})
    with pytest.raises(TypeError, match="give the losses"):
        weightings.equal().init(masked)


def test_composite_loss_layers():
    linen = pytest.importorskip("yoto_jax.linen")
    nnx = pytest.importorskip("yoto_jax.nnx")
    losses = {"a": 2.0, "b": 7.0, "c": 5.0}
    present = {"a": True, "b": False, "c": True}
    epsilon = {"b": 0.7, "c": 0.25}
    layer = nnx.CompositeLoss(losses, "a", epsilon=epsilon)
    np.testing.assert_allclose(layer(losses, present=present), 2.6, rtol=1e-6)
    module = linen.CompositeLoss("a", epsilon=epsilon)
    value, _ = module.init_with_output(jax.random.key(0), losses, present=present)
    np.testing.assert_allclose(value, 2.6, rtol=1e-6)
