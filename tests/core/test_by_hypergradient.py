"""A learned factor of updates: hypergradient descent against oracles and limits."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import yoto_jax as yoto
from tests.contract.test_optimizers import FORMS, TREES, gradients, types
from tests.oracles import hypergradient as oracle
from yoto_jax import racing

pytestmark = pytest.mark.usefixtures("quick_compilation")

CURVATURES = np.array([1.0, 0.3, 0.02])
START = np.array([1.0, -2.0, 3.0])
ALPHA, RATE, STEPS = 0.02, 0.1, 40
FORMS_OF_THE_PAPER = {
    "SGD": (oracle.sgd_slope, optax.sgd(ALPHA)),
    "SGDN": (oracle.sgdn_slope, optax.sgd(ALPHA, momentum=0.9, nesterov=True)),
    "Adam": (oracle.adam_slope, optax.adam(ALPHA)),
}
of_the_paper = pytest.mark.parametrize("form", FORMS_OF_THE_PAPER)
MU = yoto.init_loss_logits({"fit": 0.0, "size": 0.0}, "fit")
CHOICE = yoto.init_choice_logits(("conv", "skip"))
NAN, INF = np.nan, np.inf


def gradient_of(theta):
    return CURVATURES * theta


def run(tx, params, slope_of, steps=STEPS):
    """Parameters and states of every step, compiled."""

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(slope_of(params), state, params)
        carry = optax.apply_updates(params, updates), state
        return carry, carry

    scan = jax.jit(lambda carry: jax.lax.scan(step, carry, length=steps)[1])
    return scan((params, tx.init(params)))


def follow(tx, grads, params):
    """Updates and states for given gradients, eagerly."""
    state, seen = tx.init(params), []
    for grad in grads:
        updates, state = tx.update(grad, state, params)
        seen.append((updates, state))
    return seen


# Against the paper.


@of_the_paper
def test_the_oracle_is_the_derivative_by_the_learning_rate(form):
    """h_t is d f(theta_{t-1}) / d alpha_{t-1}, what alpha did before held fixed."""
    make_slope, _ = FORMS_OF_THE_PAPER[form]
    loss = lambda theta: 0.5 * theta @ (CURVATURES * theta)
    rule = oracle.additive(1e-3)
    thetas, alphas, found = oracle.descend(
        gradient_of, START, ALPHA, rule, make_slope, 10
    )
    assert found[0] == 0
    for t in range(1, 10):
        slope = (thetas[t] - thetas[t - 1]) / alphas[t]
        at = lambda alpha, t=t, slope=slope: loss(thetas[t - 1] + alpha * slope)
        numerical = (at(alphas[t] + 1e-5) - at(alphas[t] - 1e-5)) / 2e-5
        np.testing.assert_allclose(found[t], numerical, rtol=1e-6)
        np.testing.assert_allclose(alphas[t + 1], alphas[t] - 1e-3 * found[t])


@of_the_paper
@pytest.mark.parametrize("bound", [1e3, 1.5])
def test_algorithms_4_to_6_with_the_cosine(form, bound):
    make_slope, inner = FORMS_OF_THE_PAPER[form]
    with jax.enable_x64(True):
        tx = yoto.by_hypergradient(inner, RATE, bound=bound)
        theta, state = run(
            tx, jnp.asarray(START), lambda x: jnp.asarray(CURVATURES) * x
        )
        rule = oracle.cosine(RATE, ALPHA, bound)
        thetas, alphas, _ = oracle.descend(
            gradient_of, START, ALPHA, rule, make_slope, STEPS
        )
        np.testing.assert_allclose(theta, thetas[1:], rtol=1e-10)
        np.testing.assert_allclose(
            ALPHA * np.exp(state.log_scale), alphas[1:], rtol=1e-10
        )
        assert alphas.max() / ALPHA > (5 if bound > 2 else 1.5 - 1e-9)


@of_the_paper
def test_a_small_rate_measures_the_hypergradient_as_printed(form):
    """Where alpha hardly moves, both rules see the same: theirs over the lengths."""
    make_slope, inner = FORMS_OF_THE_PAPER[form]
    rate = 1e-10
    with jax.enable_x64(True):
        tx = yoto.by_hypergradient(inner, rate)
        _, state = run(tx, jnp.asarray(START), lambda x: jnp.asarray(CURVATURES) * x)
        thetas, _, found = oracle.descend(
            gradient_of, START, ALPHA, oracle.additive(0.0), make_slope, STEPS
        )
        slopes = np.diff(thetas, axis=0) / ALPHA
        lengths = np.linalg.norm(slopes[:-1], axis=1)
        lengths *= np.linalg.norm(gradient_of(thetas[1:-1]), axis=1)
        moves = np.diff(state.log_scale) / rate
        np.testing.assert_allclose(moves, -found[1:] / lengths, atol=1e-5)


def test_a_rate_two_decades_too_small_is_mended_without_noise():
    slope_of = lambda x: jnp.float32(CURVATURES) * x
    start = jnp.float32(START)
    last = lambda tx: run(tx, start, slope_of, 400)
    constant, _ = last(optax.sgd(0.01))
    learned, state = last(yoto.by_hypergradient(optax.sgd(0.01), 0.1))
    tuned, _ = last(optax.sgd(1.5))
    size = lambda theta: float(jnp.linalg.norm(theta[-1]))
    assert size(constant) > 2.0 > 0.1 > size(learned)
    assert size(learned) < 2 * size(tuned) + 1e-3
    assert jnp.exp(state.log_scale.max()) > 50


def test_noise_lets_the_factor_sink():
    """Short-horizon bias: about a minimum the mean cosine is eta h / 2.

    For SGD on h x^2 / 2 with noise of variance 1, x has the variance
    eta / (h (2 - eta h)), so that E[g g'] = -eta h / (2 - eta h) and
    E[g^2] = 2 / (2 - eta h); in many dimensions their ratio is the cosine.
    """
    eta, h, steps = 0.2, 1.5, 2000
    tx = yoto.by_hypergradient(optax.sgd(eta), 1e-6)

    def step(carry, key):
        x, state = carry
        slope = h * x + jax.random.normal(key, x.shape)
        updates, state = tx.update(slope, state, x)
        return (optax.apply_updates(x, updates), state), state.log_scale

    x = (eta / (h * (2 - eta * h))) ** 0.5 * jax.random.normal(
        jax.random.key(0), (500,)
    )
    keys = jax.random.split(jax.random.key(1), steps)
    seen = jax.jit(lambda: jax.lax.scan(step, (x, tx.init(x)), keys)[1])()
    np.testing.assert_allclose(-seen[-1] / 1e-6 / (steps - 1), eta * h / 2, atol=4e-3)


# Limits.


def test_the_first_step_and_zero_gradients_leave_the_factor_alone():
    params = {"w": jnp.ones(3), "b": jnp.ones((2, 2))}
    zeros, some = jax.tree.map(jnp.zeros_like, params), gradients(params)
    for inner in (optax.sgd(0.1), optax.adam(0.1)):
        tx = yoto.by_hypergradient(inner, RATE)
        seen = follow(tx, [zeros, some, zeros, zeros], params)
        expected = follow(inner, [zeros, some, zeros, zeros], params)
        for (updates, state), (plain, inner_state) in zip(seen, expected, strict=True):
            chex.assert_trees_all_equal(updates, plain)
            chex.assert_trees_all_equal(state.inner, inner_state)
            assert state.log_scale == 0
            assert state.num_skipped == 0


def test_without_a_rate_it_is_the_optimizer_itself():
    slope_of = lambda x: jnp.float32(CURVATURES) * x
    start = jnp.float32(START)
    alone, _ = run(optax.adam(0.1), start, slope_of)
    wrapped, _ = run(yoto.by_hypergradient(optax.adam(0.1), 0.0), start, slope_of)
    np.testing.assert_array_equal(wrapped, alone)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_unit_of_the_loss_does_not_matter(dtype):
    keys = jax.random.split(jax.random.key(0), 6)
    grads = [jax.random.normal(key, (50,)).astype(dtype) + 1 for key in keys]

    def scales(exponent, learning_rate):
        tx = yoto.by_hypergradient(optax.sgd(learning_rate), RATE)
        unit = jnp.asarray(2.0**exponent, dtype)
        seen = follow(tx, [unit * g for g in grads], grads[0])
        return [float(state.log_scale) for _, state in seen]

    usual = scales(0, 1.0)
    assert usual[-1] > RATE
    for exponent, learning_rate in ((100, 1.0), (-100, 1.0), (120, 2.0**-100)):
        assert scales(exponent, learning_rate) == usual


# Logits.


def with_logits(moves):
    """Gradients of a model, of loss logits and of a choice."""
    moved = lambda logits, m: jax.tree.map(lambda x: x + m, logits)
    return [
        {"w": jnp.array([1.0, 0.1 * k]), "mu": moved(MU, m), "a": moved(CHOICE, m)}
        for k, m in enumerate(moves)
    ]


@pytest.mark.parametrize(
    ("inner", "without"),
    [(optax.sgd(0.1), optax.sgd(0.1)), (yoto.adamw(0.1), optax.adamw(0.1))],
    ids=["sgd", "adamw"],
)
def test_logits_neither_count_nor_are_scaled(inner, without):
    grads = with_logits([0.0, 5.0, -9.0, 50.0, 1.0])
    params = {"w": jnp.ones(2), "mu": MU, "a": CHOICE}
    seen = follow(yoto.by_hypergradient(inner, RATE), grads, params)
    plain = follow(inner, grads, params)
    alone = follow(
        yoto.by_hypergradient(without, RATE),
        [{"w": grad["w"]} for grad in grads],
        {"w": params["w"]},
    )
    for (updates, state), (expected, _), (_, own) in zip(
        seen, plain, alone, strict=True
    ):
        for logits in ("mu", "a"):
            chex.assert_trees_all_equal(updates[logits], expected[logits])
        scale = jnp.exp(state.log_scale)
        np.testing.assert_allclose(updates["w"], scale * expected["w"], rtol=1e-6)
        np.testing.assert_allclose(state.log_scale, own.log_scale, rtol=1e-6)
    assert state.log_scale > 2 * RATE


def test_moving_weight_to_a_smaller_loss_is_no_progress():
    """The model cannot learn, the weights can: the composite loss falls."""
    losses = lambda w: {"fit": 2.0 + 0 * w, "size": 1.0 + 0 * w}
    slope_of = jax.grad(lambda p: yoto.composite_loss(losses(p["w"]), p["mu"]))
    params = {"w": jnp.ones(()), "mu": MU}
    inner = optax.sgd(0.01)
    _, state = run(yoto.by_hypergradient(inner, RATE), params, slope_of)
    assert not jnp.any(state.log_scale)
    counted = yoto.by_hypergradient(inner, RATE, scale_logits=True)
    seen, state = run(counted, params, slope_of)
    plain, _ = run(inner, params, slope_of)
    np.testing.assert_allclose(state.log_scale, RATE * np.arange(STEPS), rtol=1e-4)
    assert seen["mu"].learned[-1, 0] > plain["mu"].learned[-1, 0] + 0.1


# Batches that are not finite.


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_gradient_that_is_not_finite_teaches_nothing(bad):
    good = [jnp.array([1.0, 0.5 * k]) for k in range(5)]
    tx = yoto.by_hypergradient(optax.apply_if_finite(optax.adam(0.1), 10), RATE)
    clean = follow(tx, good, good[0])
    worse = jnp.array([1.0, bad])
    seen = follow(tx, [worse, *good[:3], worse, worse, *good[3:]], good[0])
    assert [int(state.num_skipped) for _, state in seen] == [1, 1, 1, 1, 2, 3, 3, 3]
    for k in (0, 4, 5):
        before = seen[k - 1][1] if k else tx.init(good[0])
        assert seen[k][1].log_scale == before.log_scale
        chex.assert_trees_all_equal(seen[k][1].direction, before.direction)
        assert not jnp.any(seen[k][0])
    for k, (updates, state) in zip((1, 2, 3, 6, 7), clean, strict=True):
        chex.assert_trees_all_equal(seen[k][0], updates)
        assert seen[k][1].log_scale == state.log_scale


def test_an_update_that_is_not_finite_is_no_direction():
    """The optimizer hands a NaN on; the factor recovers with the gradients."""
    good = [jnp.array([1.0, 0.5 * k]) for k in range(4)]
    tx = yoto.by_hypergradient(optax.sgd(0.1), RATE)
    seen = follow(tx, [*good[:2], good[2] * NAN, *good[2:]], good[0])
    assert not jnp.any(jnp.isfinite(seen[2][0]))
    assert [int(state.num_skipped) for _, state in seen] == [0, 0, 1, 1, 1]
    clean = follow(tx, good, good[0])
    assert seen[-1][1].log_scale == clean[-1][1].log_scale
    blown_up = optax.stateless(lambda g, _: jax.tree.map(lambda x: x * jnp.inf, g))
    (_, state), *_ = follow(yoto.by_hypergradient(blown_up, RATE), good, good[0])
    assert state.num_skipped == 1
    assert not jnp.any(state.direction)


# Trees, dtypes, programs.


@pytest.mark.parametrize("tree", TREES)
def test_every_tree(tree):
    params = TREES[tree]
    tx = yoto.by_hypergradient(optax.adam(0.1), RATE)
    (updates, state), (_, later) = follow(tx, [gradients(params)] * 2, params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert types(later) == types(state) == types(tx.init(params))
    optax.tree.map_params(tx, lambda x: x, later)


@pytest.mark.parametrize("form", [*FORMS])
def test_every_form(form):
    """One trace over the steps, in any wrapper of Optax."""
    tx = FORMS[form](yoto.by_hypergradient(yoto.adamw(0.02), RATE))
    params = TREES["plain"]
    traces = []

    @jax.jit
    def step(params, state):
        traces.append(form)
        updates, state = tx.update(gradients(params), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(4):
        params, state = step(params, state)
    assert len(traces) == 1
    chex.assert_tree_all_finite(params)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "complex64"])
def test_dtypes(dtype):
    """Sums in float32, so that the factor is that of the rounded numbers."""
    rng = np.random.default_rng(0)
    draw = lambda: rng.normal(0.3, size=4000)
    if dtype == "complex64":
        draw = lambda: rng.normal(0.3, size=4000) + 1j * rng.normal(size=4000)
    first, second = (jnp.asarray(draw()).astype(dtype) for _ in range(2))
    params = {"w": jnp.ones(4000, dtype), "count": jnp.int32(3), "frozen": None}
    no_slope = np.zeros((), jax.dtypes.float0)
    grads = [{"w": g, "count": no_slope, "frozen": None} for g in (first, second)]

    def halve(grads, params):
        return {**grads, "w": (-0.5 * grads["w"]).astype(dtype)}

    tx = yoto.by_hypergradient(optax.stateless(halve), RATE)
    before = types(tx.init(params))
    (_, state), (updates, after) = follow(tx, grads, params)
    assert types(after) == types(state) == before
    assert updates["w"].dtype == first.dtype
    wide = np.complex128 if dtype == "complex64" else np.float64
    x, y = (np.asarray(g).astype(wide) for g in (first, second))
    cosine = np.vdot(y, -x).real / np.linalg.norm(x) / np.linalg.norm(y)
    rounding = 4e-3 if dtype == "bfloat16" else 1e-4
    np.testing.assert_allclose(after.log_scale, -RATE * cosine, rtol=rounding)


def test_vmap_over_scan_is_each_run_alone():
    slope_of = lambda x: jnp.float32(CURVATURES) * x
    starts = jax.random.normal(jax.random.key(1), (3, 3))

    def one(start, rate):
        tx = yoto.by_hypergradient(optax.adam(1e-3), rate)
        theta, state = run(tx, start, slope_of)
        return theta[-1], state.log_scale[-1]

    rates = jnp.array([0.01, 0.1, 0.3])
    together = jax.jit(jax.vmap(one))(starts, rates)
    for k in range(3):
        alone = one(starts[k], rates[k])
        chex.assert_trees_all_close(
            jax.tree.map(lambda x, k=k: x[k], together), alone, rtol=1e-5
        )
    assert len({float(x) for x in together[1]}) == 3


# With others.


def test_groups_of_parameters_learn_factors_of_their_own():
    params = {"body": jnp.array([1.0, 1.0]), "head": jnp.array([4.0])}
    slope_of = lambda p: {"body": 0.01 * p["body"], "head": 1.9 * p["head"]}
    tx = yoto.by_hypergradient(optax.sgd(1.0), RATE)
    labels = {"body": "body", "head": "head"}
    groups = optax.partition({"body": tx, "head": tx}, labels)
    _, state = run(groups, params, slope_of)
    for name in params:
        own = lambda x, name=name: slope_of(params | {name: x})[name]
        _, alone = run(tx, params[name], own)
        found = state.inner_states[name].inner_state.log_scale
        np.testing.assert_allclose(found, alone.log_scale, rtol=1e-6)
    assert alone.log_scale[-1] < 0  # 1.9 oscillates
    assert state.inner_states["body"].inner_state.log_scale[-1] > 1


def test_accumulation_belongs_around_it():
    """Then it sees what one large batch would show."""
    tx = yoto.by_hypergradient(optax.adam(0.1), RATE)
    steps = optax.MultiSteps(tx, 2)
    grads = [jnp.array([1.0, k]) for k in range(6)]
    seen = follow(steps, grads, grads[0])
    means = [(a + b) / 2 for a, b in zip(grads[::2], grads[1::2], strict=True)]
    for (updates, state), (expected, own) in zip(
        seen[1::2], follow(tx, means, grads[0]), strict=True
    ):
        np.testing.assert_allclose(updates, expected, rtol=1e-6)
        np.testing.assert_allclose(state.inner_opt_state.log_scale, own.log_scale)


def losses_of(w, x):
    return {"fit": jnp.mean((x @ w - 1) ** 2), "size": jnp.mean(w**2)}


def test_behind_aggregate_it_sees_the_combined_gradient():
    w, x = jnp.ones(3), jnp.eye(3)
    losses, rows = yoto.value_and_jacobian(losses_of)(w, x)
    upgrad = yoto.aggregate(yoto.weightings.upgrad(), losses)
    tx = yoto.by_hypergradient(optax.sgd(0.1), RATE)
    both = optax.chain(upgrad, tx)
    combined, _ = upgrad.update(rows, upgrad.init(w), w, losses=losses)
    state, alone = both.init(w), tx.init(w)
    for _ in range(3):
        updates, state = both.update(rows, state, w, losses=losses)
        expected, alone = tx.update(combined, alone, w)
        np.testing.assert_allclose(updates, expected, rtol=1e-6)
    assert state[1].log_scale == alone.log_scale > 0


def test_a_race_of_rates():
    """Lanes learn their own factors, and a cut takes the factors of those it keeps."""
    x = jax.random.normal(jax.random.key(0), (16, 3))

    def lane(rate):
        tx = yoto.by_hypergradient(optax.sgd(rate), 0.05)
        loss = lambda w: losses_of(w, x)["fit"]
        w, state = run(tx, jnp.zeros(3), jax.grad(loss), 20)
        last = jax.tree.map(lambda leaf: leaf[-1], (w, state))
        return last, -loss(last[0])

    lanes, scores = jax.jit(jax.vmap(lane))(jnp.array([1e-4, 1e-2, 1e-1]))
    kept = racing.keep(lanes, scores, 1)
    _, state = kept.lanes
    best = int(jnp.argmax(scores))
    assert state.log_scale[0] == lanes[1].log_scale[best]


def test_outliers_are_skipped_around_it():
    tx = yoto.by_hypergradient(optax.sgd(0.1), RATE)
    around = yoto.skip_outliers(tx, losses=1)
    w = jnp.ones(2)
    state, alone = around.init(w), tx.init(w)
    for loss in (1.0, 1.0, 1e9, 1.0):
        grad = jnp.array([loss, 1.0])
        updates, state = around.update(grad, state, w, losses=[jnp.float32(loss)])
        if loss == 1.0:
            expected, alone = tx.update(grad, alone, w)
            np.testing.assert_array_equal(updates, expected)
    chex.assert_trees_all_equal(state.inner, alone)


def test_keywords_reach_the_optimizer():
    mu = yoto.init_loss_logits({"a": 0.0, "b": 0.0, "c": 0.0}, "a")
    present = {"a": True, "b": False, "c": True}
    present = jax.tree.map(jnp.asarray, present)
    tx = yoto.by_hypergradient(yoto.adamw(0.1), RATE)
    slope = jax.tree.map(jnp.ones_like, mu)
    updates, _ = tx.update(slope, tx.init(mu), mu, present=present)
    assert updates.learned[0] == 0 != updates.learned[1]


def test_an_nnx_optimizer():
    nnx = pytest.importorskip("flax.nnx")
    from yoto_jax.nnx import CompositeLoss

    class Model(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(jnp.ones(3))
            self.losses = CompositeLoss({"fit": 0.0, "size": 0.0}, "fit")

        def __call__(self):
            w = self.w[...]
            return self.losses({"fit": jnp.sum((w - 2) ** 2), "size": jnp.sum(w**2)})

    model = Model()
    tx = yoto.by_hypergradient(yoto.adamw(1e-3), RATE)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    for _ in range(3):
        optimizer.update(model, nnx.grad(lambda m: m())(model))
    log_scale = jax.tree.leaves(optimizer.opt_state.log_scale)[0]
    np.testing.assert_allclose(log_scale, 2 * RATE, rtol=1e-2)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"inner": 0.1},
            TypeError,
            "inner must be an Optax transformation, got a float",
        ),
        ({"rate": -0.1}, ValueError, "rate must be non-negative and finite"),
        ({"rate": INF}, ValueError, "rate must be non-negative and finite"),
        ({"rate": lambda t: 0.1}, TypeError, "rate must be a number"),
        ({"bound": 1.0}, ValueError, "bound must be larger than 1"),
        ({"scale_logits": 1}, TypeError, "scale_logits must be True or False"),
    ],
)
def test_misuse(arguments, error, message):
    with pytest.raises(error, match=message):
        yoto.by_hypergradient(**{"inner": optax.sgd(0.1)} | arguments)


def test_numbers_may_be_traced():
    state_of = lambda rate, bound: follow(
        yoto.by_hypergradient(optax.sgd(0.1), rate, bound=bound),
        [jnp.ones(2)] * 9,
        jnp.ones(2),
    )[-1][1]
    state = jax.jit(state_of)(0.5, 2.0)
    np.testing.assert_allclose(jnp.exp(state.log_scale), 2.0, rtol=1e-6)


@pytest.mark.parametrize("scale_logits", [False, True])
def test_optax_maps_over_what_is_like_the_parameters(scale_logits):
    params = {"w": jnp.ones(2), "mu": MU}
    tx = yoto.by_hypergradient(yoto.adamw(1e-2), scale_logits=scale_logits)
    state = tx.init(params)
    mapped = optax.tree.map_params(tx, lambda x, like: x + like, state, params)
    chex.assert_trees_all_equal(mapped.direction, params)
    _, state = tx.update(params, state, params)
    assert bool(jnp.any(state.direction["mu"].learned)) == scale_logits
