"""Initial weights at which auxiliary gradients, or losses, are a share of the main."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import yoto_jax as yoto
from tests.oracles import balance, paper
from yoto_jax._regularizer_range import regularizer_range

pytestmark = pytest.mark.usefixtures("quick_compilation")

RNG = np.random.default_rng(0)
SHAPES = (("b", 0.3, 1.0), ("fit", 2.0, 0.0), ("z", 1.0, 5.0))
"""Losses c |w - a x|^2 by name, with c and a."""
BATCHES = [jnp.asarray(x, jnp.float32) for x in RNG.normal(size=(3, 4))]
W = jnp.asarray(RNG.normal(size=4), jnp.float32)


def quadratics(w, x):
    return {name: c * jnp.sum((w - a * x) ** 2) for name, c, a in SHAPES}


def sizes(by):
    """Gradient norms 2 c |w - a x|, or losses, [batches, K] in float64."""
    w, batches = np.asarray(W, np.float64), np.asarray(BATCHES, np.float64)
    distance = lambda x, a: np.linalg.norm(w - a * x)
    of = {
        "gradient": lambda x, c, a: 2 * c * distance(x, a),
        "loss": lambda x, c, a: c * distance(x, a) ** 2,
    }[by]
    return np.array([[of(x, c, a) for _, c, a in SHAPES] for x in batches])


def vector(epsilon):
    return np.array(jax.tree.leaves(epsilon))


# Ratios.


@pytest.mark.parametrize("by", ["gradient", "loss"])
def test_weights_of_quadratics_are_exact(by):
    found = yoto.balanced_epsilon(
        quadratics, W, BATCHES, "fit", by=by, share=0.5, clip=False
    )
    assert found["fit"] is None
    np.testing.assert_allclose(vector(found), balance.epsilon(sizes(by), 1, 0.5), 1e-6)
    for x in vector(found):
        assert x.dtype == np.float32


def test_weighted_gradients_have_the_shares_that_were_asked_for():
    share = {"b": 0.25, "z": 3.0}
    one = BATCHES[:1]
    found = yoto.balanced_epsilon(quadratics, W, one, "fit", share=share, clip=False)
    mu = yoto.init_loss_logits(quadratics(W, one[0]), "fit", epsilon=found)
    weights = yoto.loss_weights(mu)
    rows = jax.jacrev(quadratics)(W, one[0])
    lengths = {k: weights[k] * jnp.linalg.norm(rows[k]) for k in weights}
    for name, c in share.items():
        np.testing.assert_allclose(lengths[name] / lengths["fit"], c, rtol=1e-5)
    composite = jax.grad(lambda w: yoto.composite_loss(quadratics(w, one[0]), mu))(W)
    np.testing.assert_allclose(composite, sum(weights[k] * rows[k] for k in rows), 1e-4)


def test_units_do_not_matter_and_they_do_to_the_fixed_epsilon():
    def in_other_units(w, x):
        losses = quadratics(w, x)
        return losses | {"z": 1e4 * losses["z"]}

    plain, other = (
        yoto.balanced_epsilon(f, W, BATCHES, "fit", clip=False)
        for f in (quadratics, in_other_units)
    )
    np.testing.assert_allclose(other["z"], plain["z"] / 1e4, rtol=1e-5)
    np.testing.assert_array_equal(other["b"], plain["b"])


def test_after_a_warm_up_the_norms_are_those_of_then():
    tx = optax.sgd(0.05)
    w, state = W, tx.init(W)
    for x in BATCHES:
        grads = jax.grad(lambda w, x=x: sum(quadratics(w, x).values()))(w)
        updates, state = tx.update(grads, state)
        w = optax.apply_updates(w, updates)
    found = yoto.balanced_epsilon(quadratics, w, BATCHES, "fit", clip=False)
    own = np.asarray(w, np.float64)
    norms = [
        [2 * c * np.linalg.norm(own - a * np.asarray(x)) for _, c, a in SHAPES]
        for x in BATCHES
    ]
    np.testing.assert_allclose(vector(found), balance.epsilon(norms, 1), rtol=1e-5)


class Heads(NamedTuple):
    side: tuple
    main: jax.Array


def test_any_container_fits_what_takes_an_epsilon():
    def loss_fn(w, x):
        return Heads((jnp.sum(w**2), jnp.sum(jnp.cos(w))), jnp.sum((w - x) ** 2))

    found = yoto.balanced_epsilon(loss_fn, W, BATCHES, "main")
    losses = loss_fn(W, BATCHES[0])
    mu = yoto.init_loss_logits(losses, "main", epsilon=found)
    assert mu.primary == 2
    np.testing.assert_allclose(mu.learned, np.log(vector(found)), rtol=1e-6)
    weighting = yoto.weightings.yoto("main", epsilon=found)
    weights = weighting.init(losses).loss_weights
    jax.tree.map(np.testing.assert_array_equal, weights, yoto.loss_weights(mu))
    again = yoto.balanced_epsilon(loss_fn, W, BATCHES, "main", share=found, clip=False)
    assert again.main is None


# Where the regulariser can still move a weight.


@pytest.mark.parametrize("count", [1, 2, 40])
def test_the_pull_of_the_regulariser_is_strongest_at_the_ends_of_the_range(count):
    found = regularizer_range(count)
    np.testing.assert_allclose(found, balance.extremes(count), rtol=1e-6)
    others = jnp.log(jnp.full(count - 1, found.preferred))
    mu = yoto.init_loss_logits((0.0,) * (count + 1), 0)

    def slope(logit):
        learned = jnp.concatenate([logit[None], others])
        of = lambda x: yoto.regularizer(type(mu)(x, mu.structure, mu.primary))
        return jax.grad(of)(learned)[0]

    inside = np.geomspace(1.05 * found.low, found.high / 1.05, 5)
    epsilons = np.array([found.low / 1.05, *inside, 1.05 * found.high])
    curvatures = jax.vmap(jax.grad(slope))(jnp.log(epsilons))
    np.testing.assert_array_equal(np.sign(curvatures), [-1, *[1] * 5, -1])


def test_with_one_auxiliary_loss_the_range_has_a_closed_form():
    x = 2 * 1.1996786402577338  # y tanh y = 1, as for the shape of a catenary
    assert x * np.tanh(x / 2) == pytest.approx(2.0)
    low, preferred, high = regularizer_range(1)
    assert (low, high) == pytest.approx((np.exp(-x), np.exp(x)))
    mu = np.log(preferred)
    assert mu + 1 + preferred == pytest.approx(0.0, abs=1e-12)
    assert -1 / balance.slope(-x, 1, 0.0) == pytest.approx(1 + 1 / low - 2)


def test_below_the_range_the_regulariser_takes_ever_longer():
    """Learning rates times rho that it needs to double a weight, by its flow."""

    def needed(epsilon):
        mu = np.log(epsilon) + np.log(2) * (np.arange(1000) + 0.5) / 1000
        return np.log(2) * np.mean([-1 / balance.slope(x, 1, 0.0) for x in mu])

    low = regularizer_range(1).low
    at, below = needed(low), needed(low / 100)
    assert at == pytest.approx(7.78, abs=0.01)
    assert below > 12 * at


def test_weights_are_clipped_to_the_range():
    scales = {"fit": 1.0, "large": 1e5, "small": 1e-5}
    loss_fn = lambda w, x: {k: c * jnp.sum((w - x) ** 2) for k, c in scales.items()}
    found = yoto.balanced_epsilon(loss_fn, W, BATCHES, "fit")
    low, _, high = regularizer_range(2)
    np.testing.assert_allclose(found["large"], low, rtol=1e-6)
    np.testing.assert_allclose(found["small"], high, rtol=1e-6)


# Bad batches, losses without gradient, dtypes, devices.


def test_a_batch_that_is_not_finite_is_left_out():
    bad = jnp.full(4, jnp.nan)
    batches = [BATCHES[0], bad, *BATCHES[1:]]
    for by in ("gradient", "loss"):
        plain, found = (
            yoto.balanced_epsilon(quadratics, W, some, "fit", by=by)
            for some in (BATCHES, batches)
        )
        np.testing.assert_allclose(vector(found), vector(plain), rtol=1e-6)
    lost = lambda w, x: quadratics(w, x) | {"z": jnp.nan * jnp.sum(w)}
    with pytest.raises(ValueError, match="of the 3 batches is finite: the loss 'z' is"):
        yoto.balanced_epsilon(lost, W, BATCHES, "fit")
    steep = lambda w, x: quadratics(w, x) | {"z": jnp.sum(jnp.sqrt(0 * w))}
    with pytest.raises(
        ValueError, match="3 batches is finite: their gradients are not"
    ):
        yoto.balanced_epsilon(steep, W, BATCHES, "fit")


def test_a_loss_without_gradient_starts_where_the_regulariser_has_it():
    def loss_fn(w, x):
        return {"fit": jnp.sum((w - x) ** 2), "hinge": jax.nn.relu(-1 - w @ w)}

    for by in ("gradient", "loss"):
        found = yoto.balanced_epsilon(loss_fn, W, BATCHES, "fit", by=by)
        np.testing.assert_allclose(found["hinge"], 0.27846454, rtol=1e-6)
        what = "has no gradient" if by == "gradient" else "is 0"
        with pytest.raises(ValueError, match=f"primary loss 'hinge' {what}"):
            yoto.balanced_epsilon(loss_fn, W, BATCHES, "hinge", by=by)


def test_a_masked_loss_is_averaged_over_the_batches_that_have_it():
    def loss_fn(w, batch):
        x, known = batch
        masks = {name: jnp.array([name != "z" or known]) for name, *_ in SHAPES}
        masks["b"] = jnp.array([False])
        losses = {name: value[None] for name, value in quadratics(w, x).items()}
        return yoto.masked_mean(losses, {k: jnp.all(m)[None] for k, m in masks.items()})

    batches = list(zip(BATCHES, jnp.array([True, False, True]), strict=True))
    for by in ("gradient", "loss"):
        found = yoto.balanced_epsilon(loss_fn, W, batches, "fit", by=by, clip=False)
        own = sizes(by)
        expected = own[:, 1].mean() / own[[0, 2], 2].mean()
        np.testing.assert_allclose(found["z"], expected, rtol=1e-6)
        np.testing.assert_allclose(found["b"], regularizer_range(2).preferred, 1e-6)


def test_negative_losses_balance_by_their_gradients():
    loss_fn = lambda w, x: {"fit": jnp.sum((w - x) ** 2), "elbo": jnp.sum(w) - 100}
    with pytest.raises(ValueError, match="loss 'elbo' is negative.*by='gradient'"):
        yoto.balanced_epsilon(loss_fn, W, BATCHES, "fit", by="loss")
    found = yoto.balanced_epsilon(loss_fn, W, BATCHES, "fit", clip=False)
    norms = [np.linalg.norm(2 * np.asarray(W - x)) for x in BATCHES]
    np.testing.assert_allclose(found["elbo"], np.mean(norms) / 2, rtol=1e-6)


def test_one_loss_and_forty():
    alone = yoto.balanced_epsilon(lambda w, x: jnp.sum(w * x), W, BATCHES, "")
    assert alone is None
    mu = yoto.init_loss_logits(0.0, "", epsilon=alone)
    assert mu.learned.shape == (0,)
    many = lambda w, x: [(k + 1.0) * jnp.sum((w - x) ** 2) for k in range(41)]
    found = yoto.balanced_epsilon(many, W, BATCHES, 0, chunk_size=7)
    expected = 1 / np.arange(2.0, 42.0)
    np.testing.assert_allclose(vector(found), expected, rtol=1e-5)
    assert regularizer_range(40).low < 1 / 41
    mu = yoto.init_loss_logits(many(W, BATCHES[0]), 0, epsilon=found)
    np.testing.assert_allclose(mu.learned, np.log(expected), rtol=1e-5)


def test_low_precision_is_measured_in_float32():
    w, batches = W.astype(jnp.bfloat16), [x.astype(jnp.bfloat16) for x in BATCHES]
    found = yoto.balanced_epsilon(quadratics, w, batches, "fit", clip=False)
    expected = balance.epsilon(sizes("gradient"), 1)
    np.testing.assert_allclose(vector(found), expected, rtol=0.02)
    assert vector(found).dtype == np.float32


def test_under_jit_nothing_is_lost():
    @jax.jit
    def measure(w, batches):
        epsilon = yoto.balanced_epsilon(quadratics, w, list(batches), "fit")
        return epsilon, yoto.init_loss_logits(
            quadratics(w, batches[0]), "fit", epsilon=epsilon
        )

    found, mu = measure(W, jnp.stack(BATCHES))
    plain = yoto.balanced_epsilon(quadratics, W, BATCHES, "fit")
    np.testing.assert_allclose(vector(found), vector(plain), rtol=1e-6)
    np.testing.assert_allclose(mu.learned, np.log(vector(plain)), rtol=1e-6)
    lost, mu = measure(W, jnp.full((3, 4), jnp.nan))
    np.testing.assert_allclose(vector(lost), regularizer_range(2).preferred, rtol=1e-6)
    assert np.isfinite(mu.learned).all()
    zero, _ = measure(jnp.zeros(4), jnp.zeros((3, 4)))
    np.testing.assert_allclose(vector(zero), regularizer_range(2).preferred, rtol=1e-6)


def test_lanes_are_measured_side_by_side():
    ws = jnp.stack([W, 2 * W])
    measure = lambda w: yoto.balanced_epsilon(quadratics, w, BATCHES, "fit", clip=False)
    found = jax.vmap(measure)(ws)
    for lane, w in enumerate(ws):
        own = jax.tree.map(lambda x, lane=lane: x[lane], found)
        np.testing.assert_allclose(vector(own), vector(measure(w)), rtol=1e-6)


def test_a_batch_spread_over_devices_is_measured_as_a_whole():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    x = jnp.asarray(RNG.normal(size=(8, 4)), jnp.float32)
    loss_fn = lambda w, x: {
        "fit": jnp.mean((x @ w - 1) ** 2),
        "size": jnp.mean(jnp.abs(x @ w)) + jnp.sum(w**2),
    }
    for by in ("gradient", "loss"):
        whole = yoto.balanced_epsilon(loss_fn, W, [x], "fit", by=by)
        measure = lambda w, x, by=by: yoto.balanced_epsilon(
            loss_fn, w, [x], "fit", by=by, axis_name="data"
        )
        specs = (jax.P(), jax.P("data"))
        spread = jax.shard_map(
            measure, mesh=mesh, in_specs=specs, out_specs={"fit": None, "size": jax.P()}
        )
        np.testing.assert_allclose(spread(W, x)["size"], whole["size"], rtol=1e-5)


def test_a_pair_is_losses_and_auxiliary_output():
    pair = lambda w, x: (quadratics(w, x), w)
    for by in ("gradient", "loss"):
        plain = yoto.balanced_epsilon(quadratics, W, BATCHES, "fit", by=by)
        found = yoto.balanced_epsilon(pair, W, BATCHES, "fit", by=by, has_aux=True)
        jax.tree.map(np.testing.assert_array_equal, found, plain)


# A start that is balanced, in training.


def test_yoto_goes_on_from_there():
    epsilon = yoto.balanced_epsilon(quadratics, W, BATCHES, "fit")
    losses = quadratics(W, BATCHES[0])
    params = {"w": W, "mu": yoto.init_loss_logits(losses, "fit", epsilon=epsilon)}
    tx = yoto.adamw(0.01)
    of = lambda p: yoto.composite_loss(quadratics(p["w"], BATCHES[0]), p["mu"])
    updates, _ = tx.update(jax.grad(of)(params), tx.init(params), params)
    mu = np.concatenate([[0.0], np.log(vector(epsilon))])
    learned = np.arange(3) > 0
    pull = 10 * paper.regularizer_gradient(mu, learned)[1:]
    own = np.array([losses["fit"], losses["b"], losses["z"]])
    push = np.sign(paper.composite_gradient(own, mu))[1:]
    np.testing.assert_allclose(updates["mu"].learned, -0.01 * (push + pull), rtol=1e-4)


# Misuse.


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"batches": {"x": 1.0}}, TypeError, "must be a list of batches, got one dict"),
        ({"batches": BATCHES[0]}, TypeError, "put it in a list"),
        ({"batches": Heads((), W)}, TypeError, "got one Heads"),
        ({"batches": 3}, TypeError, "got one int"),
        ({"batches": []}, ValueError, "at least one batch"),
        ({"by": "norm"}, ValueError, "by must be 'gradient' or 'loss', got 'norm'"),
        ({"clip": 1}, TypeError, "clip must be True or False"),
        ({"primary": None}, TypeError, "primary must name the loss to measure by"),
        ({"primary": "q"}, ValueError, "primary 'q' is unknown"),
        ({"share": 0.0}, ValueError, "share of loss 'b' must be positive"),
        ({"share": {"b": 1.0}}, ValueError, "share must be one number"),
        ({"has_aux": True}, TypeError, "must return .losses, aux."),
    ],
)
def test_misuse(arguments, error, message):
    given = {"batches": BATCHES[:1], "primary": "fit", **arguments}
    with pytest.raises(error, match=message):
        yoto.balanced_epsilon(quadratics, W, **given)


def test_ratios_that_overflow_or_vanish_end_at_the_bounds():
    losses = lambda w: {"fit": w, "faint": 1e-15 * w, "loud": 1e15 * w}
    found = yoto.balanced_epsilon(
        lambda w, x: losses(w),
        jnp.float32(1.0),
        [0.0],
        "fit",
        share={"faint": 1e30, "loud": 1e-30},
    )
    low, _, high = regularizer_range(2)
    np.testing.assert_allclose([found["loud"], found["faint"]], [low, high], rtol=1e-6)
