"""Choices: weights, gradients, frequencies, hardening, decay; against float64."""

import copy
import dataclasses
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import yoto_jax as yoto
from tests.oracles import choices as oracle

pytestmark = pytest.mark.usefixtures("quick_compilation")

METHODS = ("softmax", "gumbel", "straight_through")
OPTIONS = ("relu", "tanh", "sine", "square")
BRANCHES = {
    "relu": jax.nn.relu,
    "tanh": jnp.tanh,
    "sine": jnp.sin,
    "square": lambda x: x**2,
}
LOGITS = np.array([0.3, -1.1, 0.8, 0.0])
X = np.array([-1.2, 0.4, 2.1])
TARGET = np.array([0.5, -0.3, 1.0])


def choice(logits=LOGITS, options=OPTIONS, dtype=jnp.float32):
    return yoto.ChoiceLogits(jnp.asarray(logits, dtype), options)


def loss_of(output):
    return jnp.sum((output - TARGET) ** 2)


def outputs():
    return np.stack([np.maximum(X, 0), np.tanh(X), np.sin(X), X**2])


# Weights.

# Each length is compiled for itself: one, a short one, a long one.
vectors = st.sampled_from([1, 3, 12]).flatmap(
    lambda size: st.lists(st.floats(-30, 30, width=32), min_size=size, max_size=size)
)


@given(vectors, st.floats(0.03, 30))
@settings(deadline=None, max_examples=25)
def test_weights_are_the_softmax_of_logits_over_temperature(logits, temperature):
    names = tuple(map(str, range(len(logits))))
    with jax.enable_x64(True):
        wide = choice(logits, names, jnp.float64)
        got = yoto.choose(None, wide, temperature).weights
        expected = oracle.softmax(np.array(logits), temperature)
        np.testing.assert_allclose(got, expected, rtol=1e-11, atol=1e-300)
    got = yoto.choose(None, choice(logits, names), temperature).weights
    assert got.dtype == jnp.float32
    # The error of a logit over the temperature is the relative one of its weight.
    error = 1e-6 * (1 + np.ptp(logits) / temperature)
    np.testing.assert_allclose(got, expected, rtol=2 * error, atol=1e-37)
    np.testing.assert_allclose(got.sum(), 1.0, rtol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_jit_vmap_and_scan_agree_with_eager(method):
    keys = jax.random.split(jax.random.key(0), 5)
    taus = jnp.linspace(0.2, 2.0, 5)
    one = lambda key, tau: yoto.choose(key, choice(), tau, method=method).weights
    eager = np.stack([one(k, t) for k, t in zip(keys, taus, strict=True)])
    scanned = jax.jit(
        lambda: jax.lax.scan(lambda c, x: (c, one(*x)), None, (keys, taus))[1]
    )()
    for got in (jax.jit(jax.vmap(one))(keys, taus), scanned):
        np.testing.assert_allclose(got, eager, rtol=2e-6, atol=1e-7)
    stacked = choice(np.stack([LOGITS, LOGITS[::-1]]))
    weights = yoto.choose(keys[0], stacked, method=method).weights
    assert weights.shape == (2, 4)
    np.testing.assert_allclose(weights.sum(-1), 1.0, rtol=1e-6)


def test_a_schedule_of_optax_anneals_the_temperature():
    schedule = optax.exponential_decay(2.0, transition_steps=10, decay_rate=0.1)
    weights = jax.jit(lambda step: yoto.choose(None, choice(), schedule(step)).weights)
    for step in (0, 10, 20):
        expected = oracle.softmax(LOGITS, 2.0 * 0.1 ** (step / 10))
        np.testing.assert_allclose(weights(step), expected, rtol=1e-5, atol=1e-37)
    with pytest.raises(TypeError, match=r"got a function.*schedule\(step\)"):
        yoto.choose(None, choice(), schedule)


def test_the_gradient_reaches_logits_and_temperature():
    slopes = np.array([1.0, -2.0, 0.5, 3.0])

    @jax.jit
    def gradients(logits, tau):
        f = lambda a, tau: yoto.choose(None, choice(a), tau).weights @ slopes
        return jax.grad(f, (0, 1))(logits, tau)

    with jax.enable_x64(True):
        f = lambda a, tau: oracle.softmax(a, tau) @ slopes
        got = gradients(jnp.array(LOGITS, jnp.float32), 0.7)
    np.testing.assert_allclose(
        got[0], oracle.mixture_gradient(LOGITS, 0.7, slopes), rtol=1e-5
    )
    step = 1e-6
    slope = (f(LOGITS, 0.7 + step) - f(LOGITS, 0.7 - step)) / (2 * step)
    np.testing.assert_allclose(got[1], slope, rtol=1e-4)


def test_limits_of_logits_and_temperature():
    @jax.jit
    @jax.vmap
    def weights_and_slope(logits, tau):
        f = lambda a, tau: yoto.choose(None, choice(a, tuple("abc")), tau).weights
        slope = jax.grad(lambda a, tau: f(a, tau) @ jnp.arange(3.0), (0, 1))
        return f(logits, tau), slope(logits, tau)

    inf, third = np.inf, 1 / 3
    rows = {
        "tiny temperature": ([0.0, 1.0, 2.0], 2e-38, [0, 0, 1]),
        "a tie at a tiny one": ([2.0, 1.0, 2.0], 1e-30, [0.5, 0, 0.5]),
        "certain": ([0.0, inf, 2.0], 1.0, [0, 1, 0]),
        "impossible": ([0.0, -inf, 0.0], 1.0, [0.5, 0, 0.5]),
        "all impossible": ([-inf, -inf, -inf], 1.0, [third, third, third]),
        "far apart": ([3e38, -3e38, 0.0], 1.0, [1, 0, 0]),
    }
    logits, taus, expected = (
        np.array(x, np.float32) for x in zip(*rows.values(), strict=True)
    )
    weights, slopes = weights_and_slope(logits, taus)
    np.testing.assert_allclose(weights, expected, rtol=1e-6)
    finite = [name for name in rows if not name.startswith("a tie")]
    for name, slope, tau in zip(rows, *slopes, strict=True):
        if name in finite:
            assert np.isfinite(slope).all(), name
            assert np.isfinite(tau), name


@pytest.mark.parametrize("method", METHODS)
def test_what_cannot_raise_is_nan(method):
    @jax.jit
    @jax.vmap
    def weights(tau, logit):
        a = choice(jnp.array([0.0, logit]), ("a", "b"))
        return yoto.choose(jax.random.key(0), a, tau, method=method).weights

    bad = weights(
        jnp.array([0.0, -1.0, np.nan, 1.0]), jnp.array([0.0, 0.0, 0.0, np.nan])
    )
    assert np.isnan(bad).all()
    assert np.isfinite(weights(jnp.ones(1), jnp.ones(1))).all()


# Noise.


@pytest.mark.parametrize("method", ["gumbel", "straight_through"])
def test_frequencies_are_the_probabilities_of_the_softmax(method):
    draws, chance = 20_000, 1e-9
    p = oracle.softmax(LOGITS)

    @jax.jit
    def first(tau):
        keys = jax.random.split(jax.random.key(3), draws)
        one = lambda key: yoto.choose(key, choice(), tau, method=method).weights
        return jnp.argmax(jax.vmap(one)(keys), axis=-1)

    for tau in (0.1, 1.0, 5.0):
        counts = np.bincount(first(tau), minlength=4)
        low, high = stats.binom.ppf([chance / 2, 1 - chance / 2], draws, p[:, None]).T
        assert ((low <= counts) & (counts <= high)).all(), (counts, low, high)
        # The test can tell: logits divided by the temperature would not pass it.
        if tau != 1.0:
            other = draws * oracle.softmax(LOGITS, tau)
            assert ((other < low) | (other > high)).any()


def test_gumbel_weights_are_the_softmax_of_perturbed_logits():
    key = jax.random.key(7)
    got = yoto.choose(key, choice(), 0.5, method="gumbel").weights
    noise = np.asarray(jax.random.gumbel(jax.random.fold_in(key, 0), (4,)), np.float64)
    np.testing.assert_allclose(got, oracle.softmax(LOGITS + noise, 0.5), rtol=1e-5)
    hard = yoto.choose(key, choice(), 0.5, method="straight_through").weights
    np.testing.assert_array_equal(hard, np.eye(4)[np.argmax(LOGITS + noise)])


def test_each_choice_of_a_tree_has_noise_of_its_own():
    tree = {"a": choice(), "w": jnp.ones(2), "b": {"c": choice()}}
    key = jax.random.key(1)
    got = yoto.choose(key, tree, method="gumbel")
    assert got["w"] is tree["w"]
    first, second = got["a"].weights, got["b"]["c"].weights
    assert np.abs(first - second).max() > 0.1
    del tree["w"]  # Other parameters do not change the noise.
    np.testing.assert_array_equal(
        yoto.choose(key, tree, method="gumbel")["a"].weights, first
    )
    again = yoto.choose(None, got)  # Decided: it stays.
    assert again["a"] is got["a"]


# Mixtures and the straight-through gradient.


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tau", [0.5, 2.0])
def test_gradients_are_those_of_the_softmax_mixture_at_the_output(method, tau):
    key = jax.random.key(5)

    @jax.jit
    def run(logits, x):
        def loss(logits, x):
            weights = yoto.choose(key, choice(logits), tau, method=method)
            y = yoto.apply_choice(weights, BRANCHES, x)
            return loss_of(y), (y, weights.weights)

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(logits, x)

    logits, x = jnp.asarray(LOGITS, jnp.float32), jnp.asarray(X, jnp.float32)
    (value, (y, weights)), (slope, slope_x) = run(logits, x)
    drawn = jax.random.gumbel(jax.random.fold_in(key, 0), (4,))
    noise = 0 if method == "softmax" else np.asarray(drawn, np.float64)
    perturbed = LOGITS + noise
    soft = oracle.softmax(perturbed, tau)
    forward = np.eye(4)[perturbed.argmax()] if method == "straight_through" else soft
    np.testing.assert_allclose(weights, forward, rtol=1e-5)
    out = forward @ outputs()
    np.testing.assert_allclose(y, out, rtol=1e-5)
    np.testing.assert_allclose(value, np.sum((out - TARGET) ** 2), rtol=1e-5)
    residual = 2 * (out - TARGET)
    expected = oracle.mixture_gradient(perturbed, tau, outputs() @ residual)
    np.testing.assert_allclose(slope, expected, rtol=2e-4, atol=1e-6)
    # Inputs, and so parameters, see the branches with the weights of the output.
    slopes = np.stack([X > 0, 1 - np.tanh(X) ** 2, np.cos(X), 2 * X])
    np.testing.assert_allclose(slope_x, residual * (forward @ slopes), rtol=1e-4)


def test_straight_through_without_a_key_takes_the_likeliest():
    weights = yoto.choose(None, choice(), method="straight_through")
    np.testing.assert_array_equal(weights.weights, [0, 0, 1, 0])
    branch = BRANCHES["sine"](X)
    np.testing.assert_array_equal(yoto.apply_choice(weights, BRANCHES, X), branch)


def test_branches_in_any_order_and_outputs_in_any_container():
    weights = yoto.choose(None, choice())
    backwards = dict(reversed(BRANCHES.items()))
    by_name = yoto.apply_choice(weights, backwards, X)
    in_order = yoto.apply_choice(weights, [BRANCHES[name] for name in OPTIONS], X)
    np.testing.assert_array_equal(by_name, in_order)
    trees = {name: {"y": (f(X), 1.0)} for name, f in BRANCHES.items()}
    mixed = yoto.apply_choice(weights, trees)
    np.testing.assert_array_equal(mixed["y"][0], by_name)
    np.testing.assert_allclose(mixed["y"][1], 1.0, rtol=1e-6)
    hard = yoto.harden(choice())
    assert yoto.apply_choice(hard, trees) is trees["sine"]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.complex64])
def test_outputs_keep_their_dtype_and_sums_are_float32(dtype):
    weights = yoto.ChoiceWeights(jnp.full(4, 0.25, jnp.float32), OPTIONS)
    values = jnp.array([256.0, 1.0, 1.0, 2.0], dtype)  # 256 + 1 is 256 in bfloat16
    got = yoto.apply_choice(weights, list(values))
    assert got.dtype == dtype
    assert got == jnp.asarray(65.0, dtype)
    low = choice(dtype=jnp.bfloat16)
    assert yoto.choose(None, low).weights.dtype == jnp.float32


def test_strict_promotion_and_double():
    with jax.numpy_dtype_promotion("strict"), jax.enable_x64(True):
        wide = yoto.choose(jax.random.key(0), choice(dtype=jnp.float64))
        assert wide.weights.dtype == jnp.float64
        y = yoto.apply_choice(wide, [jnp.ones(2, jnp.float32)] * 4)
        assert y.dtype == jnp.float32


@pytest.mark.parametrize("method", METHODS)
def test_one_option_is_no_choice(method):
    @jax.jit
    def run(a):
        def loss(a):
            weights = yoto.choose(
                jax.random.key(0), choice(a, ("only",)), 0.3, method=method
            )
            return jnp.sum(yoto.apply_choice(weights, {"only": jnp.sin}, X))

        return jax.value_and_grad(loss)(a)

    value, slope = run(jnp.array([0.7]))
    np.testing.assert_allclose(value, np.sin(X).sum(), rtol=1e-6)
    assert slope == 0
    only = choice([0.7], ("only",))
    assert yoto.choice_regularizer(only) == 0
    assert yoto.harden(only).option == "only"


# Hardening.


def test_a_one_hot_mixture_is_the_hardened_model_bit_for_bit():
    for n, name in enumerate(OPTIONS):
        logits = choice(np.eye(4)[n])
        mixed = yoto.choose(None, logits, method="straight_through")
        hard = yoto.harden(logits)
        assert hard.option == name
        x = jnp.asarray(X)
        got = yoto.apply_choice(mixed, BRANCHES, x)
        np.testing.assert_array_equal(got, yoto.apply_choice(hard, BRANCHES, x))


def heavy(x):
    for _ in range(8):
        x = jnp.sin(x @ x)
    return x


def test_branches_that_are_not_taken_cost_nothing():
    branches = {"heavy": heavy, "light": lambda x: 2.0 * x}
    x = jnp.ones((32, 32))

    def flops(f, *arguments):
        return jax.jit(f).lower(*arguments).compile().cost_analysis().get("flops", 0)

    prefer = {
        name: choice([float(name == "heavy"), float(name == "light")], tuple(branches))
        for name in branches
    }
    alone = {name: flops(f, x) for name, f in branches.items()}
    assert alone["heavy"] > 100 * alone["light"]
    for name, logits in prefer.items():
        hard = yoto.harden({"kind": logits})  # an argument without leaves: static
        f = lambda p, x: yoto.apply_choice(p["kind"], branches, x)
        assert flops(f, hard, x) == alone[name]
    mixed = flops(
        lambda a, x: yoto.apply_choice(yoto.choose(None, a), branches, x), logits, x
    )
    assert mixed >= sum(alone.values())


def test_an_index_that_is_traced_runs_one_branch():
    ran = []

    def counted(name):
        def branch(x):
            jax.debug.callback(lambda: ran.append(name))
            return 2 * x

        return branch

    branches = {name: counted(name) for name in OPTIONS}

    @jax.jit
    def run(logits, x):
        return yoto.apply_choice(yoto.harden(logits), branches, x)

    text = run.lower(choice(), X).as_text()
    assert "stablehlo.case" in text
    for n in (2, 0, 3):
        run(choice(np.eye(4)[n]), X)
        jax.effects_barrier()
        assert ran.pop() == OPTIONS[n]
        assert not ran


def test_hardening_under_jit_and_vmap():
    rows = np.array([LOGITS, LOGITS[::-1], [0, 0, 0, 1.0], [np.nan, 0, 5.0, 1]])
    expected = [2, 1, 3, 2]  # NaN is the least likely where nothing can be raised.

    @jax.jit
    @jax.vmap
    def run(a):
        hard = yoto.harden(choice(a))
        return hard.index, yoto.apply_choice(hard, BRANCHES, X)

    index, y = run(rows)
    assert index.tolist() == expected
    np.testing.assert_allclose(y, outputs()[expected], rtol=1e-6)
    stacked = yoto.harden(choice(rows[:3]))
    assert stacked.index.tolist() == expected[:3]
    with pytest.raises(TypeError, match="known only when the program runs"):
        print(stacked.option)
    ys = jax.vmap(lambda c: yoto.apply_choice(c, BRANCHES, X))(stacked)
    np.testing.assert_allclose(ys, outputs()[expected[:3]], rtol=1e-6)
    by_index = yoto.HardChoice(jnp.int32(1), OPTIONS)
    np.testing.assert_array_equal(
        yoto.apply_choice(by_index, [*map(jnp.float32, range(4))]), 1
    )


def test_a_hardened_tree_trains_on_and_is_one_program_for_each_option():
    params = {"kind": choice(), "w": jnp.ones(3)}
    hard = yoto.harden(params)
    assert yoto.harden(hard)["kind"] is hard["kind"]
    tx = yoto.adamw(0.1, hyperparameter_decay=0.0)
    state, traces = tx.init(hard), []

    @jax.jit
    def step(params, state):
        def loss(params):
            traces.append(params["kind"].option)
            params = yoto.choose(None, params)
            return loss_of(yoto.apply_choice(params["kind"], BRANCHES, params["w"]))

        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(3):
        hard, state = step(hard, state)
    assert traces == ["sine"]
    assert hard["kind"].option == "sine"
    assert not np.allclose(hard["w"], 1)


# The decay.


@given(vectors)
@settings(deadline=None, max_examples=25)
def test_value_and_gradient_of_the_decay(logits):
    a = np.array(logits, np.float64)
    names = tuple(map(str, range(len(a))))
    with jax.enable_x64(True):
        f = lambda a: yoto.choice_regularizer(yoto.ChoiceLogits(a, names))
        value, slope = jax.value_and_grad(f)(jnp.asarray(a))
        np.testing.assert_allclose(value, oracle.regularizer(a), atol=1e-12)
        np.testing.assert_allclose(slope, oracle.regularizer_gradient(a), atol=1e-12)
        numerical = oracle.numerical_gradient(oracle.regularizer, a)
        np.testing.assert_allclose(slope, numerical, atol=1e-7)
        assert -1e-12 <= value <= np.log(len(a)) + 1e-12


@pytest.mark.parametrize("options", [4, 12])  # Few are written out, many are not.
def test_minima_of_the_decay(options):
    zeros = np.zeros(options - 4)
    names = tuple(map(str, range(options)))
    of = lambda first: choice([*first, *zeros], names)
    uniform, certain = choice(np.full(options, 0.7), names), of([0, np.inf, 0, 0])
    slope = jax.grad(yoto.choice_regularizer)
    np.testing.assert_allclose(yoto.choice_regularizer(uniform), 0, atol=1e-6)
    np.testing.assert_allclose(
        yoto.choice_regularizer(certain), np.log(options), rtol=1e-6
    )
    for extreme in (uniform, certain, of([1e30, 0, 0, -np.inf])):
        np.testing.assert_allclose(slope(extreme).logits, 0, atol=1e-6)
    assert np.isnan(slope(of([0, np.nan, 0, 0])).logits).all()


@pytest.mark.parametrize("strength", [1.0, -1.0])
def test_the_link_descends_to_uniform_or_to_the_likeliest(strength):
    rate, steps = 0.5, 200
    tx = optax.chain(yoto.add_choice_decay(strength), optax.sgd(rate))
    params = {"kind": choice(), "w": jnp.ones(2)}

    @jax.jit
    def descend(params):
        def step(carry, _):
            params, state = carry
            zeros = jax.tree.map(jnp.zeros_like, params)
            updates, state = tx.update(zeros, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), length=steps)[0][0]

    after = descend(params)
    expected = oracle.descend(LOGITS, strength, rate, steps)
    np.testing.assert_allclose(after["kind"].logits, expected, atol=1e-4)
    np.testing.assert_array_equal(after["w"], 1)
    likeliest = oracle.softmax(expected)[LOGITS.argmax()]
    assert likeliest > 0.99 if strength < 0 else abs(likeliest - 0.25) < 1e-6


def test_a_scheduled_decay_turns_from_uniform_to_one_hot():
    schedule = optax.linear_schedule(1.0, -1.0, 2)
    tx = yoto.add_choice_decay(schedule)
    state = tx.init(choice())
    zeros = jax.tree.map(jnp.zeros_like, choice())
    for strength in (1.0, 0.0, -1.0):
        updates, state = tx.update(zeros, state, choice())
        expected = strength * oracle.regularizer_gradient(LOGITS)
        np.testing.assert_allclose(updates.logits, expected, atol=1e-6)


# Optimizers.


@pytest.mark.parametrize("optimizer", [yoto.adamw, yoto.sgdw])
def test_optimizers_give_choices_their_own_decay_and_no_weight_decay(optimizer):
    params = {"kind": choice(), "w": jnp.ones(2)}
    zeros = jax.tree.map(jnp.zeros_like, params)
    rate, strength = 0.1, 2.0
    options = {"weight_decay": 0.5, "choice_decay": strength}
    tx = optimizer(rate, **options)
    updates, _ = tx.update(zeros, tx.init(params), params)
    expected = -rate * strength * oracle.regularizer_gradient(LOGITS)
    np.testing.assert_allclose(updates["kind"].logits, expected, atol=1e-7)
    np.testing.assert_allclose(updates["w"], -rate * 0.5, rtol=1e-6)
    plain = optimizer(rate, weight_decay=0.5)
    updates, _ = plain.update(zeros, plain.init(params), params)
    np.testing.assert_array_equal(updates["kind"].logits, 0)
    assert yoto.label_loss_logits(params) == {"kind": "choice_logits", "w": "model"}


def test_optimizers_say_what_is_wrong():
    with pytest.warns(UserWarning, match="the choice logits are bfloat16"):
        yoto.adamw(0.1).init(choice(dtype=jnp.bfloat16))
    tx = yoto.add_choice_decay(0.1)
    with pytest.raises(ValueError, match="needs the current choice logits"):
        tx.update(choice(), tx.init(choice()))
    kinds = dict.fromkeys(("1", True, None, 1j), TypeError) | {np.nan: ValueError}
    for bad, error in kinds.items():
        with pytest.raises(error, match="choice_decay must be"):
            yoto.adamw(0.1, choice_decay=bad)
    with pytest.raises(TypeError, match="choice_decay must be"):
        yoto.add_choice_decay(np.ones(3))
    with pytest.raises(ValueError, match="where the parameters hold a dict"):
        tx.update({"kind": choice()}, tx.init({}), {"kind": {}})


def test_steered_choices_descend_the_held_out_loss():
    params = {"kind": choice(), "w": jnp.asarray(X, jnp.float32)}

    def loss(params, target):
        chosen = yoto.choose(None, params)["kind"]
        return jnp.sum((yoto.apply_choice(chosen, BRANCHES, params["w"]) - target) ** 2)

    train, held_out = (jax.grad(loss)(params, t) for t in (TARGET, -TARGET))
    steered = yoto.steer_choices(train, held_out)
    np.testing.assert_array_equal(steered["w"], train["w"])
    np.testing.assert_array_equal(steered["kind"].logits, held_out["kind"].logits)
    assert not np.allclose(train["kind"].logits, held_out["kind"].logits)
    with pytest.raises(ValueError, match="no ChoiceLogits"):
        yoto.steer_choices({"w": 1.0}, {"w": 2.0})
    with pytest.raises(ValueError, match="held_out must be a tree like grads"):
        yoto.steer_choices(train, {"kind": choice()})


def rich_get_richer(params, x, y, rate):
    """Two equally good branches: one is a step ahead at the start."""
    tx = optax.sgd(rate)

    def loss(params):
        kind = yoto.choose(None, params["kind"])
        outputs = [w * x for w in params["w"]]
        return jnp.mean((yoto.apply_choice(kind, outputs) - y) ** 2)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, tx.init(params)), length=400)[0][0]


def test_the_rich_get_richer():
    """Branches that could do the same: who is ahead gets more gradient, and stays."""
    x = jnp.linspace(-1, 1, 16)
    params = {"kind": choice([0.0, 0.0], ("a", "b")), "w": jnp.array([0.5, 0.0])}
    after = jax.jit(rich_get_richer)(params, x, 3 * x, 0.5)
    weights = yoto.choose(None, after["kind"]).weights
    assert weights[0] > 0.8
    even = params | {"w": jnp.array([0.25, 0.25])}
    after = jax.jit(rich_get_richer)(even, x, 3 * x, 0.5)
    np.testing.assert_allclose(yoto.choose(None, after["kind"]).weights, 0.5)


# Composition, files, containers.


def test_choices_beside_loss_logits_in_aggregate_and_partition():
    losses = {"fit": 0.0, "size": 0.0}
    params = {"w": jnp.asarray(X, jnp.float32), "kind": choice()}

    def loss_fn(params):
        kind = yoto.choose(None, params["kind"])
        y = yoto.apply_choice(kind, BRANCHES, params["w"])
        return {"fit": loss_of(y), "size": jnp.sum(params["w"] ** 2)}

    values, jacobian = yoto.value_and_jacobian(loss_fn)(params)
    assert jacobian["kind"].logits.shape == (2, 4)
    tx = optax.chain(yoto.aggregate(yoto.weightings.equal(), losses), optax.sgd(1.0))
    updates, _ = tx.update(jacobian, tx.init(params), losses=values)
    both = jax.grad(lambda p: sum(loss_fn(p).values()) / 2)(params)
    for got, expected in zip(*map(jax.tree.leaves, (updates, both)), strict=True):
        np.testing.assert_allclose(got, -expected, rtol=1e-5, atol=1e-6)
    learned = params | {"mu": yoto.init_loss_logits(losses, "fit")}
    separate = optax.partition(
        {
            "model": optax.sgd(1.0),
            "loss_logits": optax.sgd(0.0),
            "choice_logits": optax.sgd(3.0),
        },
        yoto.label_loss_logits,
    )
    ones = jax.tree.map(jnp.ones_like, learned)
    updates, _ = separate.update(ones, separate.init(learned), learned)
    np.testing.assert_array_equal(updates["kind"].logits, -3)
    np.testing.assert_array_equal(updates["mu"].learned, 0)


def test_lanes_of_a_race_choose_for_themselves():
    from yoto_jax import racing

    lanes = racing.start({"kind": choice(), "w": jnp.ones(3)}, 3)
    rows = jnp.stack([jnp.roll(jnp.asarray(LOGITS, jnp.float32), n) for n in range(3)])
    lanes = lanes | {"kind": dataclasses.replace(lanes["kind"], logits=rows)}
    kept = racing.keep(lanes, jnp.array([0.0, 2.0, 1.0]), 1).lanes
    assert yoto.harden(racing.lane(kept, 0))["kind"].option == "square"


def test_copies_pickles_and_text():
    a = choice()
    assert repr(a) == "ChoiceLogits(relu=0.3, tanh=-1.1, sine=0.8, square=0)"
    hard, weights = yoto.harden(a), yoto.choose(None, a)
    assert repr(hard) == "HardChoice('sine')"
    assert repr(jax.eval_shape(lambda: a)).count("float32[]") == 4
    assert "one of 'relu', 'tanh'" in repr(jax.jit(yoto.harden)(a))
    for x in (a, hard, weights):
        same = pickle.loads(pickle.dumps(x))
        assert jax.tree.structure(same) == jax.tree.structure(copy.deepcopy(x))
        assert jax.tree.structure(same) == jax.tree.structure(x)
        assert repr(same) == repr(x)
    other = yoto.harden(choice(-LOGITS))
    assert jax.tree.structure(other) != jax.tree.structure(hard)
    ((path, _),) = jax.tree.leaves_with_path(a)
    assert jax.tree_util.keystr(path) == ".logits"


def test_programs_with_choices_go_into_a_file():
    pytest.importorskip("flatbuffers")
    f = lambda tree, x: (tree, yoto.apply_choice(tree["kind"], BRANCHES, x))
    traced = jax.jit(lambda a: yoto.harden(a))(choice())
    for kind in (yoto.choose(None, choice()), yoto.harden(choice()), traced):
        tree = {"kind": kind, "logits": choice()}
        written = jax.export.export(jax.jit(f))(tree, X).serialize()
        again, y = jax.export.deserialize(written).call(tree, X)
        assert jax.tree.structure(again) == jax.tree.structure(tree)
        np.testing.assert_allclose(y, yoto.apply_choice(kind, BRANCHES, X), rtol=1e-6)


def test_state_dicts_of_flax():
    serialization = pytest.importorskip("flax.serialization")
    blank = {"kind": choice(np.zeros(4))}
    state = serialization.to_state_dict({"kind": choice()})
    assert state["kind"].keys() == {"logits"}
    restored = serialization.from_state_dict(blank, state)
    np.testing.assert_array_equal(restored["kind"].logits, choice().logits)
    with pytest.raises(ValueError, match="must hold 4 logits for the options 'relu'"):
        serialization.from_state_dict(blank, {"kind": {"logits": np.zeros(3, "f")}})


# What is wrong, by name.


@pytest.mark.parametrize(
    ("options", "probabilities", "error", "message"),
    [
        ((), None, ValueError, "options is empty"),
        ({}, None, ValueError, "options is empty"),
        ("relu", None, TypeError, "options must be names.*'relu'"),
        (3, None, TypeError, "options must be names.*got 3"),
        (("a", 1), None, TypeError, "must be a string, got 1"),
        (("a", "b", "a"), None, ValueError, "differ in name, got 'a' twice"),
        (("a", "b"), (1,), ValueError, "each of the 2 options 'a', 'b', got 1"),
        (("a", "b"), {"a": 1, "c": 1}, ValueError, "options 'a', 'b', got 'a', 'c'"),
        (("a", "b"), (1, 0), ValueError, "'b' must be positive and finite, got 0"),
        (("a", "b"), (1, np.nan), ValueError, "'b' must be positive and finite"),
        (("a", "b"), (1, "x"), TypeError, "'b' must be a number, got 'x'"),
        (("a", "b"), 5, ValueError, "each of the 2 options 'a', 'b', got 1"),
        (("a", "b"), np.ones((2, 2)), TypeError, "'a' must be a number, got array"),
    ],
)
def test_errors_of_init(options, probabilities, error, message):
    with pytest.raises(error, match=message):
        yoto.init_choice_logits(options, probabilities=probabilities)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda a: yoto.choose(None, a, 0.0), ValueError, "positive and finite, got 0"),
        (lambda a: yoto.choose(None, a, -1), ValueError, "positive and finite, got -1"),
        (lambda a: yoto.choose(None, a, np.nan), ValueError, "finite, got nan"),
        (lambda a: yoto.choose(None, a, None), TypeError, "must be a number, got None"),
        (lambda a: yoto.choose(None, a, 1j), TypeError, "must be a number, got 1j"),
        (lambda a: yoto.choose(None, a, np.ones(2)), ValueError, r"got shape \(2,\)"),
        (lambda a: yoto.choose(None, a, method="hard"), ValueError, "got 'hard'"),
        (lambda a: yoto.choose(None, a, method="gumbel"), TypeError, "a random key"),
        (lambda a: yoto.choose("x", a, method="gumbel"), TypeError, "key must be"),
        (lambda a: yoto.choose(None, {"w": 1.0}), ValueError, "hold no choice"),
        (lambda a: yoto.harden({"w": 1.0}), ValueError, "hold no choice to harden"),
        (
            lambda a: yoto.harden({"k": choice([0, np.nan, 0, 0])}),
            ValueError,
            r"choice at \['k'\] has a NaN",
        ),
        (lambda a: yoto.harden(choice(np.zeros(3))), ValueError, r"4 logits.*\(3,\)"),
        (lambda a: yoto.choose(None, choice(np.zeros(5))), ValueError, "4 logits"),
        (
            lambda a: yoto.choose(None, choice(np.zeros(4), dtype=int)),
            TypeError,
            "floating-point logits, got int",
        ),
        (lambda a: yoto.choice_regularizer(1.0), TypeError, "ChoiceLogits.*float"),
        (lambda a: yoto.apply_choice(a, BRANCHES, X), TypeError, "choose or harden"),
        (lambda a: yoto.apply_choice(1.0, BRANCHES, X), TypeError, "got float"),
    ],
)
def test_errors_of_choices(call, error, message):
    with pytest.raises(error, match=message):
        call(choice())


@pytest.mark.parametrize("kind", ["mixed", "static", "traced"])
def test_errors_of_branches(kind):
    decided = {
        "mixed": yoto.choose(None, choice()),
        "static": yoto.harden(choice()),
        "traced": yoto.HardChoice(jnp.int32(2), OPTIONS),
    }[kind]
    apply = lambda branches, *operands: yoto.apply_choice(decided, branches, *operands)
    other = BRANCHES | {"sine": lambda x: x[:2]}
    deep = BRANCHES | {"tanh": lambda x: {"y": x}}
    rough = BRANCHES | {"tanh": lambda x: x.astype(jnp.bfloat16)}
    wrong = [
        ([jnp.sin] * 3, (X,), ValueError, "each of the 4 options.*got 3"),
        (
            {"relu": jnp.sin, "cosine": jnp.cos},
            (X,),
            ValueError,
            "missing: 'tanh', 'sine', 'square'; unexpected: 'cosine'",
        ),
        (jnp.ones(4), (), TypeError, "a dict by option, or a sequence"),
        (BRANCHES | {"tanh": X}, (X,), TypeError, "'tanh' cannot be called"),
        ([X] * 4, (X,), TypeError, "they take no operands"),
    ]
    if kind != "static":  # Other branches are not looked at, and cost nothing.
        wrong += [
            (other, (X,), ValueError, r"'relu' and 'sine'.*shapes: \(3,\) and \(2,\)"),
            (deep, (X,), ValueError, "'relu' and 'tanh' have different outputs"),
            (
                rough,
                (jnp.ones(3),),
                TypeError,
                "'relu' and 'tanh'.*dtypes: float32 and bfloat16",
            ),
        ]
    for branches, operands, error, message in wrong:
        with pytest.raises(error, match=message):
            apply(branches, *operands)
    if kind == "mixed":
        with pytest.raises(TypeError, match="'relu' is int32, which weights"):
            apply([jnp.int32(1)] * 4)
        stacked = yoto.choose(None, choice(np.stack([LOGITS] * 3)))
        with pytest.raises(ValueError, match=r"leading axes, of shape \(3, 4\)"):
            yoto.apply_choice(stacked, BRANCHES, X)
