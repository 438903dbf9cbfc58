"""A portfolio: what its weights are, what its race costs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import yoto_jax as yoto
from yoto_jax import racing

LOSSES = {"fit": 0.0, "size": 0.0}
STEPS = 3000

pytestmark = pytest.mark.usefixtures("quick_compilation")


def loss_fn(w, x):
    return {"fit": jnp.mean((x @ w - 1.0) ** 2), "size": 50.0 * jnp.sum(w**2)}


def batch_of(step):
    return jax.random.normal(jax.random.fold_in(jax.random.key(0), step), (8, 4))


def train(weighting, steps, lanes=None):
    """A run, or one in each lane."""
    value_and_grad = yoto.value_and_grad(loss_fn, weighting)

    def step(lane, number):
        w, state = lane
        _, grads, state = value_and_grad(w, state, batch_of(number))
        return (w - 1e-3 * grads, state), state.loss_weights

    begin = jnp.full(4, 0.5), weighting.init(LOSSES)
    if lanes is None:
        return jax.jit(lambda lane: jax.lax.scan(step, lane, jnp.arange(steps)))(begin)
    every = jax.vmap(step, in_axes=(0, None))
    scan = lambda lanes: jax.lax.scan(every, lanes, jnp.arange(steps))
    return jax.jit(scan)(racing.start(begin, lanes))


def test_every_lane_holds_the_weights_of_its_share():
    arms = racing.portfolio("fit", STEPS)
    assert list(arms) == ["equal", "share 0.1", "share 1", "share 10"]
    (w, _), weights = train(racing.one_of(arms), 70, lanes=len(arms))
    for number, share in enumerate((0.1, 1.0, 10.0), start=1):
        rule = yoto.weightings.grad_norm_balance(
            "fit", share, decay=0.99, average="norms"
        )

        @jax.jit
        def by_hand(held, state, step, rule=rule):
            x = batch_of(step)
            norms = racing.gradient_norms(loss_fn)(held, x)
            norms = jnp.stack([norms["fit"], norms["size"]])
            wanted, state = rule.update(LOSSES, state, norms=norms)
            total = lambda w: sum(wanted[k] * v for k, v in loss_fn(w, x).items())
            return wanted, held - 1e-3 * jax.grad(total)(held), state

        state, held = rule.init(LOSSES), jnp.full(4, 0.5)
        for step in range(60):  # Two per cent of the steps.
            wanted, held, state = by_hand(held, state, step)
        size = weights["size"][:, number]
        np.testing.assert_allclose(size[59], wanted["size"], rtol=1e-5)
        np.testing.assert_array_equal(size[59:], size[59])
    np.testing.assert_array_equal(weights["size"][:, 0], 0.5)
    assert np.isfinite(w).all()


def test_a_lane_is_its_arm_alone():
    arms = racing.portfolio("fit", STEPS, shares=(0.1, 1.0))
    lanes, _ = train(racing.one_of(arms), 55, lanes=3)
    for number, (name, weighting) in enumerate(arms.items()):
        found, _, state = racing.alone(arms, racing.lane(lanes, number)[1])
        assert found == name
        (w, own), _ = train(weighting, 55)
        np.testing.assert_allclose(lanes[0][number], w, rtol=1e-5)
        if name != "equal":
            jax.tree.map(
                lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), state, own
            )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be positive"),
        ({"shares": (0.1, 0.0)}, "share must be positive, got 0"),
        ({"shares": (1.0, 1)}, "shares must differ"),
    ],
)
def test_errors_name_what_is_wrong(options, message):
    with pytest.raises(ValueError, match=message):
        racing.portfolio("fit", **{"steps": STEPS, **options})
