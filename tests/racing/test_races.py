"""A race is the same lanes trained alone, but for the work that it saves."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import yoto_jax as yoto
from yoto_jax import racing

LOSSES = {"fit": 0.0, "size": 0.0, "smooth": 0.0}
NAMES = tuple(LOSSES)
WEIGHTINGS = {
    "fit alone": yoto.weightings.static({"fit": 1.0, "size": 0.0, "smooth": 0.0}),
    "random": yoto.weightings.random(key=jax.random.key(3)),
    "upgrad": yoto.weightings.every(yoto.weightings.upgrad(), 3),
    "yoto": yoto.weightings.smooth(yoto.weightings.yoto("fit")),
}
UPGRAD = yoto.weightings.upgrad()
TX = optax.MultiSteps(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2)), 2)
KEY = jax.random.key(7)

pytestmark = pytest.mark.usefixtures("quick_compilation")


def loss_fn(w, batch):
    x, y = batch
    prediction = jnp.tanh(x @ w)
    return {
        "fit": jnp.mean((prediction - y) ** 2),
        "size": jnp.sum(w**2),
        "smooth": jnp.mean(jnp.abs(prediction)),
    }


def batch_of(step):
    x = jax.random.normal(jax.random.fold_in(KEY, step), (16, 5))
    return x, jnp.sin(x[:, :2])


def begin(weighting):
    w = jax.random.normal(KEY, (5, 2))
    return w, TX.init(w), weighting.init(LOSSES)


def step_of(weighting):
    value_and_grad = yoto.value_and_grad(loss_fn, weighting)

    def step(lane, batch):
        w, opt_state, state = lane
        losses, grads, state = value_and_grad(w, state, batch)
        updates, opt_state = TX.update(grads, opt_state, w)
        return (optax.apply_updates(w, updates), opt_state, state), losses

    return step


def train(step, lanes, rung):
    for number in range(rung.start, rung.stop):
        lanes, _ = step(lanes, batch_of(number))
    return lanes


def score(w):
    return -loss_fn(w, batch_of(1000))["fit"]


scores_of = jax.jit(jax.vmap(score))


TRACED = []  # numbers of lanes


@functools.cache
def vmapped():
    step = jax.vmap(step_of(racing.one_of(WEIGHTINGS)), in_axes=(0, None))

    def counted(lanes, batch):
        TRACED.append(len(lanes[0]))
        return step(lanes, batch)

    return jax.jit(counted)


def run(race, lanes, step=0):
    """The lanes after the last cut, and which arms they are."""
    for rung in race.after(step):
        lanes = train(vmapped(), lanes, rung)
        kept = racing.keep(lanes, scores_of(lanes[0]), rung.keep)
        lanes = kept.lanes
    return lanes


@functools.cache
def everyone_to_the_end():
    lanes = racing.start(begin(racing.one_of(WEIGHTINGS)), len(WEIGHTINGS))
    (rung,) = racing.plan(20, len(WEIGHTINGS), []).rungs
    return train(vmapped(), lanes, rung)


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_a_lane_is_its_weighting_alone(name):
    weighting, number = WEIGHTINGS[name], list(WEIGHTINGS).index(name)
    step, lane = jax.jit(step_of(weighting)), begin(weighting)
    for i in range(20):
        lane, _ = step(lane, batch_of(i))
    raced = racing.lane(everyone_to_the_end(), number)
    np.testing.assert_allclose(raced[0], lane[0], rtol=2e-5, atol=2e-6)
    found, same, state = racing.alone(WEIGHTINGS, raced[2])
    assert (found, same) == (name, weighting)
    assert jax.tree.structure(state) == jax.tree.structure(lane[2])
    close = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-5)
    numbers = lambda x: (
        jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    )
    jax.tree.map(lambda x, y: close(numbers(x), numbers(y)), state, lane[2])
    weights = optax.tree.get(lane[2], "loss_weights")
    jax.tree.map(close, raced[2].loss_weights, weights)


def test_the_winner_is_where_its_lane_is_without_cuts():
    race = racing.plan(20, len(WEIGHTINGS), [(0.25, 2), (0.5, 1)])
    lanes = racing.start(begin(racing.one_of(WEIGHTINGS)), race.arms)
    w, _, state = racing.lane(run(race, lanes), 0)
    alone = racing.lane(everyone_to_the_end(), int(state.arm))
    np.testing.assert_allclose(w, alone[0], rtol=2e-5, atol=2e-6)
    # One program for each number of lanes.
    assert set(TRACED) == {1, 2, 4}
    traced = len(TRACED)
    run(race, lanes)
    assert len(TRACED) == traced


def test_a_race_that_was_killed_ends_bit_for_bit_as_if_not():
    race = racing.plan(16, len(WEIGHTINGS), [(0.25, 2), (0.5, 1)])
    lanes = racing.start(begin(racing.one_of(WEIGHTINGS)), race.arms)
    whole = run(race, lanes)
    # In the middle of rungs, before cuts and right after them.
    for stop, cut in ((2, False), (4, False), (4, True), (6, False), (8, True)):
        lanes = racing.start(begin(racing.one_of(WEIGHTINGS)), race.arms)
        for rung in race.rungs:
            lanes = train(vmapped(), lanes, rung._replace(stop=min(rung.stop, stop)))
            if rung.stop < stop or (rung.stop == stop and cut):
                scores = scores_of(lanes[0])
                lanes = racing.keep(lanes, scores, rung.keep).lanes
            if rung.stop >= stop:
                break
        assert cut or len(lanes[0]) == race.lanes_at(stop)
        is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        saved = jax.tree.map(
            lambda x: np.asarray(jax.random.key_data(x) if is_key(x) else x), lanes
        )
        again = jax.tree.map(
            lambda x, like: (
                jax.random.wrap_key_data(x) if is_key(like) else jnp.asarray(x)
            ),
            saved,
            lanes,
        )
        ended = run(race, again, stop)
        data = lambda x: jax.random.key_data(x) if is_key(x) else x
        jax.tree.map(
            lambda x, y: np.testing.assert_array_equal(data(x), data(y)), ended, whole
        )


def test_lanes_that_diverge_lose_and_disturb_nobody():
    def step(lane, batch):
        w, rate, weights = lane
        losses = lambda w: sum(
            weights[name] * loss for name, loss in loss_fn(w, batch).items()
        )
        return (w - rate * jax.grad(losses)(w), rate, weights)

    rates = jnp.array([0.1, 1e30, 0.05, 0.2])
    weights = racing.stack([{"fit": 1.0, "size": s, "smooth": 0.0} for s in range(4)])
    w = racing.start(jax.random.normal(KEY, (5, 2)), 4)
    every = jax.jit(jax.vmap(step, in_axes=(0, None)))
    lanes = (w, rates, weights)
    others = jax.tree.map(lambda x: x[jnp.array([0, 2, 3])], lanes)
    for i in range(30):
        lanes, others = every(lanes, batch_of(i)), every(others, batch_of(i))
    scores = scores_of(lanes[0])
    assert not np.isfinite(scores[1])
    kept = racing.keep(lanes, scores, 3)
    np.testing.assert_array_equal(kept.indices, [0, 2, 3])
    # Programs of three and of four lanes round differently.
    close = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, kept.lanes, others)


def test_lanes_spread_over_eight_devices():
    assert jax.device_count() == 8
    race = racing.plan(8, 4, [(0.5, 1)])
    first = racing.start(begin(racing.one_of(WEIGHTINGS)), 4)
    lanes = racing.spread(first)
    assert lanes[0].sharding.shard_shape(lanes[0].shape)[0] == 1
    for rung in race.rungs:
        lanes = train(vmapped(), lanes, rung)
        lanes = racing.keep(lanes, scores_of(lanes[0]), rung.keep).lanes
        lanes = racing.spread(lanes)
        assert lanes[0].sharding.num_devices == 8
    expected = run(race, first)
    np.testing.assert_allclose(lanes[0], expected[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(lanes[2].arm, expected[2].arm)


def two_arms(losses, params):
    """Two lanes after five steps."""
    arms = racing.one_of({k: WEIGHTINGS[k] for k in ("random", "upgrad")})
    value_and_grad = yoto.value_and_grad(losses, arms)

    def step(lane, batch):
        params, state = lane
        _, grads, state = value_and_grad(params, state, batch)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), state

    lanes = racing.start((params, arms.init(LOSSES)), 2)
    every = jax.jit(jax.vmap(step, in_axes=(0, None)))
    for i in range(5):
        lanes = every(lanes, batch_of(i))
    return lanes


def test_linen():
    model = nn.Dense(2)
    variables = model.init(KEY, jnp.zeros((1, 5)))

    def losses(variables, batch):
        x, y = batch
        error = jnp.mean((model.apply(variables, x) - y) ** 2)
        size = optax.tree.norm(variables, squared=True)
        return {"fit": error, "size": size, "smooth": 0.1 * size}

    lanes = two_arms(losses, variables)
    scores = jax.vmap(lambda v: -losses(v, batch_of(100))["fit"])(lanes[0])
    kept = racing.keep(lanes, scores, 1)
    assert kept.indices[0] == int(scores[1] > scores[0])
    assert kept.lanes[0]["params"]["kernel"].shape == (1, 5, 2)


def test_nnx_by_its_graph_and_its_state():
    model = nnx.Linear(5, 2, rngs=nnx.Rngs(0))
    graph, params = nnx.split(model, nnx.Param)

    def losses(params, batch):
        x, y = batch
        merged = nnx.merge(graph, params, copy=True)
        error = jnp.mean((merged(x) - y) ** 2)
        size = optax.tree.norm(params, squared=True)
        return {"fit": error, "size": size, "smooth": 0.1 * size}

    lanes = two_arms(losses, params)
    won = racing.lane(racing.keep(lanes, jnp.array([0.0, 1.0]), 1).lanes, 0)
    nnx.update(model, won[0])
    assert model(jnp.ones((3, 5))).shape == (3, 2)


def test_nothing_is_lost_with_one_arm():
    weightings = {"upgrad": UPGRAD}
    arms = racing.one_of(weightings)
    step, plain = jax.jit(step_of(arms)), jax.jit(step_of(UPGRAD))
    raced, alone = begin(arms), begin(UPGRAD)
    for i in range(5):
        raced, _ = step(raced, batch_of(i))
        alone, _ = plain(alone, batch_of(i))
    np.testing.assert_allclose(raced[0], alone[0], rtol=1e-6)
