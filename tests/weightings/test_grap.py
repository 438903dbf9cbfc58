import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.oracles import grap as oracle
from yoto_jax.weightings._auto_lambda import auto_lambda
from yoto_jax.weightings._grap import grap
from yoto_jax.weightings._grap_closed_form import grap_closed_form, maximise_alignment


def gramian_of(pretraining, downstream):
    """The Gramian of K pretraining losses and, in the last place, the downstream."""
    rows = jnp.concatenate([jnp.asarray(pretraining), jnp.asarray(downstream)[None]])
    return rows @ rows.T


def start(weighting, count, dtype=None):
    return weighting.init([jnp.zeros((), dtype or jnp.result_type(float))] * count)


FORMS = {"grap": grap, "grap_closed_form": grap_closed_form}


@functools.cache
def known(form, count):
    """The same weighting for the same options, for ``feed`` to compile once."""
    return FORMS[form](count)


def learned_weights(state):
    inner = state.inner
    return inner.raw_weights if hasattr(inner, "raw_weights") else inner.solution


@functools.partial(jax.jit, static_argnums=0)
def feed(weighting, state, pretraining, downstream):
    """One update from gradients: the weights as one vector, and the state."""
    gramian = gramian_of(pretraining, downstream)
    losses = [jnp.zeros((), gramian.dtype)] * gramian.shape[0]
    weights, state = weighting.update(losses, state, gramian=gramian)
    return jnp.stack(weights), state


def descend_toy(weighting, gradients, x, steps, tx):
    """Full mode: the weights multiply gradients of x itself. Every step's numbers."""

    def step(carry, _):
        x, state, opt_state = carry
        pretraining, d = gradients(x)
        weights, state = feed(weighting, state, pretraining, d)
        gradient = weights[:-1] @ pretraining + weights[-1] * d
        updates, opt_state = tx.update(gradient, opt_state, x)
        x = optax.apply_updates(x, updates)
        nu = state.inner.statistics.gradient_norms
        seen = {"x": x, "phi": learned_weights(state), "w": weights[:-1] * nu}
        return (x, state, opt_state), seen

    x = jnp.asarray(x, float)
    count = gradients(x)[0].shape[0] + 1
    carry = x, start(weighting, count), tx.init(x)
    _, seen = jax.jit(lambda c: jax.lax.scan(step, c, length=steps))(carry)
    return jax.tree.map(np.asarray, seen)


def quadratic(x):
    pretraining = jnp.array([[2.0, 0.0], [0.0, 2.0], [-1.0, -1.0]])
    return pretraining, 2 * oracle.S @ (x - oracle.CENTER)


def mixture(x):
    s, m = jnp.asarray(oracle.MIXTURE_S), jnp.asarray(oracle.MIXTURE_CENTERS)
    pretraining = jnp.einsum("kij,kj->ki", 2 * s, x[None] - m)
    return pretraining, oracle.MIXTURE_WEIGHTS @ pretraining


# Golden steps: SGD 0.01 for x and for phi, x = 0 unless said otherwise, phi = 1.


def run_golden(gradients, x, steps, rate=0.01, **options):
    count = gradients(jnp.asarray(x, float))[0].shape[0]
    weighting = grap(count, optimizer=optax.sgd(0.01), **options)
    return descend_toy(weighting, gradients, x, steps, optax.sgd(rate))


def assert_golden(actual, expected):
    """Equal in all the digits that are given, eight decimals."""
    np.testing.assert_allclose(actual, expected, rtol=0, atol=6e-9)


def test_the_default_algorithm_takes_the_published_steps():
    with jax.enable_x64(True):
        seen = run_golden(quadratic, [0, 0], 100)
        assert_golden(seen["w"][0], [1.41421356, 1.41421356, 1])
        assert_golden(seen["phi"][0], [1.00110432, 0.99889568, 1])
        assert_golden(seen["x"][0], [-0.00707107, -0.00707107])
        assert_golden(seen["w"][1], [1.41577185, 1.41264838, 0.99999756])
        assert_golden(seen["phi"][1], [1.00222300, 0.99777204, 1.00000248])
        assert_golden(seen["x"][1], [-0.01415774, -0.01412650])
        assert_golden(seen["phi"][2], [1.00335632, 0.99662860, 1.00000754])
        assert_golden(seen["x"][2], [-0.02126021, -0.02116603])
        assert_golden(seen["x"][99], [-0.82438717, -0.54260105])


def test_the_settings_of_the_published_runs_take_the_published_steps():
    with jax.enable_x64(True):
        seen = run_golden(
            quadratic,
            [0, 0],
            10,
            regularization=1.0,
            gramian_decay=0.0,
            norm_decay=0.99,
            warmup=100,
            rate=0.005,  # Half of it: the published factor 0.5 on the weights.
        )
        assert_golden(seen["phi"][0], [0.94640254, 0.94419391, 0.97264911])
        assert_golden(seen["x"][0], [-0.00353553, -0.00353553])
        assert_golden(seen["phi"][9], [0.62470783, 0.58962700, 0.78259608])


def test_the_closed_form_takes_the_published_steps():
    with jax.enable_x64(True):
        weighting = grap_closed_form(3)
        seen = descend_toy(weighting, quadratic, [0, 0], 10, optax.sgd(0.01))
        assert_golden(seen["w"][0], [0.15617376, 0, 1.10431526])
        assert seen["w"][0][1] == 0
        np.testing.assert_array_equal(seen["phi"][0], seen["w"][0])
        assert_golden(seen["x"][0], [0.00624695, 0.00780869])
        _, d = quadratic(jnp.zeros(2))
        direction = -0.01 * d / jnp.linalg.norm(d)
        np.testing.assert_allclose(seen["x"][0], direction, rtol=1e-8)
        assert_golden(seen["w"][9], [0.16076253, 0, 1.10719412])
        assert_golden(seen["x"][9], [0.06234391, 0.07818712])


def test_the_mixture_takes_the_published_steps():
    with jax.enable_x64(True):
        seen = run_golden(mixture, [2, -1], 10)
        assert_golden(seen["w"][0], [0.88432706, 0.19572714])
        assert_golden(seen["phi"][0], [0.99975419, 1.00024581])
        assert_golden(seen["x"][0], [1.99055014, -0.99672889])
        assert_golden(seen["phi"][9], [0.99745210, 1.00254207])


def test_the_statistics_of_the_first_step_are_those_by_hand():
    with jax.enable_x64(True):
        weighting = grap(3)
        _, state = feed(weighting, start(weighting, 4), *quadratic(jnp.zeros(2)))
    learned = state.inner.statistics
    r = -np.sqrt(0.5)
    np.testing.assert_allclose(
        learned.cosines, [[1, 0, r], [0, 1, r], [r, r, 1]], atol=1e-15
    )
    np.testing.assert_allclose(
        learned.alignments, [-0.6247, -0.7809, 0.9939], atol=5e-5
    )
    np.testing.assert_allclose(learned.gradient_norms, [2, 2, 1.4142], atol=5e-5)


# Convergence.


# Where oscillations end depends on rounding.
@pytest.mark.usefixtures("optimised")
def test_raw_weights_of_the_mixture_go_to_their_optimal_ratio():
    steps = 3000
    with jax.enable_x64(True):
        decayed = functools.partial(
            optax.linear_schedule, end_value=0.0, transition_steps=steps
        )
        weighting = grap(2, optimizer=optax.adam(decayed(0.01), b1=0.0, b2=0.99))
        seen = descend_toy(weighting, mixture, [2, -1], steps, optax.sgd(decayed(0.01)))
    optimum = oracle.mixture_optimum()
    np.testing.assert_allclose(optimum, [0.266497, 0.781726], atol=5e-7)
    distance = np.linalg.norm(seen["x"] - optimum, axis=1)
    # A composite gradient of norm 1 oscillates by about the learning rate: which phase
    # of it a step number meets depends on rounding, how far it goes does not.
    assert distance[900:1100].max() < 4e-2
    assert distance[1900:2100].max() < 2e-2
    # 8e-5 up to jaxlib 0.10, 2e-5 from 0.11 on: the same oscillation in its last steps.
    assert distance[-1] < 2e-4
    raw = seen["phi"][-1]
    # Their length is up to that phase too: 0.5 % between two versions of jaxlib.
    np.testing.assert_allclose(raw, [0.629650, 1.469188], rtol=1e-2)
    np.testing.assert_allclose(raw[1] / raw[0], 7 / 3, rtol=3e-4)


@pytest.mark.usefixtures("optimised")
def test_the_quadratic_is_solved_with_the_settings_of_the_published_runs():
    steps = 3000
    with jax.enable_x64(True):
        decayed = functools.partial(
            optax.linear_schedule, end_value=0.0, transition_steps=steps
        )
        weighting = grap(
            3,
            optimizer=optax.adam(decayed(0.1), b1=0.0, b2=0.99),
            regularization=1.0,
            gramian_decay=0.0,
            norm_decay=0.99,
            warmup=100,
        )
        seen = descend_toy(
            weighting, quadratic, [0, 0], steps, optax.sgd(decayed(0.01))
        )
    # No fixed weights are optimal here, so raw weights of this size keep oscillating.
    assert np.linalg.norm(seen["x"][-1] - oracle.CENTER) < 0.03


@pytest.mark.parametrize("x64", [False, True])
def test_the_closed_form_comes_within_a_tenth_of_the_optimum(x64):
    with jax.enable_x64(x64):
        weighting = grap_closed_form(3)
        seen = descend_toy(weighting, quadratic, [0, 0], 2000, optax.adam(0.01))
    assert np.linalg.norm(seen["x"][-1] - oracle.CENTER) <= 0.1


# The closed form by itself.


def spd(count, seed):
    a = np.random.default_rng(seed).normal(size=(count, count))
    return a @ a.T + 0.5 * np.eye(count)


solve = jax.jit(maximise_alignment)


def best(cosines, alignments):
    return np.asarray(
        solve(jnp.asarray(cosines, float), jnp.asarray(alignments, float))
    )


def cosine(a, b):
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def test_the_best_weight_of_one_loss_is_known():
    with jax.enable_x64(True):
        assert best([[9]], [5]) == pytest.approx(1 / 3)
        assert best([[4]], [2]) == pytest.approx(0.5)
        assert best([[4]], [-2]) == 0


@given(st.integers(1, 6), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=60)
def test_the_non_negative_solution_is_the_best_of_all_supports(count, seed):
    rng = np.random.default_rng(seed)
    rank = int(rng.integers(1, count + 2))
    gradients, d = rng.normal(size=(count, rank)), rng.normal(size=rank)
    gradients /= np.linalg.norm(gradients, axis=1, keepdims=True)
    c, p = gradients @ gradients.T, gradients @ d / np.linalg.norm(d)
    with jax.enable_x64(True):
        w = best(c, p)
    expected = oracle.best_on_ellipsoid(c, p)
    assert np.all(w >= 0)
    # The weights may not be unique for a singular C, what they come to is. At
    # p^T w = 1 the composite gradient is d itself.
    assert p @ w == pytest.approx(p @ expected, abs=1e-7)
    if np.any(w):
        assert w @ c @ w == pytest.approx(1, abs=1e-7)
    if rank >= count:
        np.testing.assert_allclose(w, expected, atol=1e-6 * np.linalg.cond(c))
        np.testing.assert_array_equal(w == 0, expected == 0)


def test_no_alignment_gives_exact_zeros():
    with jax.enable_x64(True):
        assert not np.any(best(spd(3, 0), np.zeros(3)))
        assert not np.any(best(np.zeros((3, 3)), np.ones(3)))
        assert not np.any(best(np.zeros((3, 3)), np.zeros(3)))
        assert not np.any(best(spd(3, 0), -np.ones(3)))


@pytest.mark.parametrize(
    ("alpha", "beta"),
    [
        *((size, 1) for size in (1e-4, 1e-8, 1e-12)),
        *((1, size) for size in (1e-4, 1e-8, 1e-12)),
        *((size, size) for size in (1e-6, 1e-10)),
    ],
)
def test_tiny_problems_keep_their_direction_or_give_zeros(alpha, beta):
    c, b = spd(4, 1), np.array([1.0, -0.3, 0.5, 0.8])
    with jax.enable_x64(True):
        expected = best(c, b)
        w = best(alpha * c, beta * b)
    assert not np.any(w) or cosine(w, expected) > 1 - 1e-9


@pytest.mark.parametrize("alpha", [1e-6, 1e-3, 1e3, 1e6])
def test_the_solution_scales_as_its_constraint_does(alpha):
    c, b = spd(4, 2), np.array([1.0, -0.3, 0.5, 0.8])
    with jax.enable_x64(True):
        expected = best(c, b)
        np.testing.assert_allclose(
            best(alpha * c, b), expected / np.sqrt(alpha), rtol=1e-9
        )
        small = max(alpha, 1e-5)
        np.testing.assert_allclose(best(c, small * b), expected, rtol=1e-9)


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("ridge", [0, 1e-6, 1e-8, 1e-10])
def test_singular_problems_have_finite_solutions(ridge, x64):
    g = np.random.default_rng(3).normal(size=(4, 2))
    b = np.array([1.0, -0.3, 0.5, 0.8])  # not in the range of the matrix
    with jax.enable_x64(x64):
        for c in (g @ g.T, np.ones((4, 4)), np.diag([1.0, 0, 0, 1])):
            w = best(c + ridge * np.eye(4), b)
            assert np.all(np.isfinite(w))


# Identities.


def random_gradients(count, size, seed, scale=1.0):
    rng = np.random.default_rng(seed)
    spread = 10.0 ** rng.uniform(-1, 1, size=(count, 1)) * scale
    return rng.normal(size=(count, size)) * spread, rng.normal(size=size)


@pytest.mark.parametrize("form", FORMS)
def test_the_first_composite_gradient_has_norm_1(form):
    s, d = random_gradients(4, 9, 0)
    with jax.enable_x64(True):
        weighting = known(form, 4)
        weights, state = feed(weighting, start(weighting, 5), s, d)
        assert weights[4] == 0
        assert jnp.linalg.norm(weights[:4] @ s) == pytest.approx(1, rel=1e-9)
        w = weights[:4] * state.inner.statistics.gradient_norms
        assert w @ state.inner.statistics.cosines @ w == pytest.approx(1, rel=1e-9)


def hypergradient(s, d, phi, **options):
    """dH/dphi, from the step of an SGD with learning rate 1."""
    weighting = grap(len(s), optimizer=optax.sgd(1.0), initial=[*phi, 0.0], **options)
    _, state = feed(weighting, start(weighting, len(s) + 1), s, d)
    return np.asarray(phi) - np.asarray(state.inner.raw_weights)


def test_the_objective_does_not_depend_on_the_size_of_raw_weights():
    s, d = random_gradients(4, 9, 1)
    phi = np.array([0.3, -1.2, 0.7, 2.0])
    with jax.enable_x64(True):
        slope = hypergradient(s, d, phi)
    assert np.linalg.norm(slope) > 1e-3
    assert abs(phi @ slope) < 1e-14


def test_the_objective_is_the_negative_cosine_of_composite_and_downstream_gradient():
    s, d = random_gradients(4, 9, 2)
    phi = np.array([0.3, 1.2, 0.7, 2.0])
    negative_cosine = lambda phi: -cosine(np.abs(phi) @ s, d)
    with jax.enable_x64(True):
        slope = hypergradient(s, d, phi)
    basis = 1e-6 * np.eye(4)
    numerical = [
        (negative_cosine(phi + e) - negative_cosine(phi - e)) / 2e-6 for e in basis
    ]
    np.testing.assert_allclose(slope, numerical, atol=1e-9)


def test_losses_may_be_scaled_if_raw_weights_are_scaled_back():
    s, d = random_gradients(3, 6, 3)
    alpha = np.array([1e-3, 20.0, 4e5])
    phi = np.array([1.0, 0.5, 2.0])
    with jax.enable_x64(True):
        plain = grap(3, initial=[*phi, 1.0])
        scaled = grap(3, initial=[*(phi / alpha), 1.0])
        weights, _ = feed(plain, start(plain, 4), s, d)
        other, _ = feed(scaled, start(scaled, 4), alpha[:, None] * s, d)
        np.testing.assert_allclose(
            other[:3] @ (alpha[:, None] * s), weights[:3] @ s, rtol=1e-10
        )
        slope = hypergradient(s, d, phi)
        # A raw weight of 1000 moves by 2e-5: its eight last digits are left.
        np.testing.assert_allclose(
            hypergradient(alpha[:, None] * s, d, phi / alpha), slope * alpha, rtol=1e-7
        )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("unit", [1e-15, 1e-6, 1e6, 1e15])
def test_the_unit_of_the_losses_does_not_matter(form, unit):
    """In float32, where the Gramian goes from 1e-32 to 1e32."""
    s, d = random_gradients(3, 6, 4)
    s, d = jnp.asarray(s, jnp.float32), jnp.asarray(d, jnp.float32)
    weighting = known(form, 3)
    state = other = start(weighting, 4)
    for _ in range(3):
        weights, state = feed(weighting, state, s, d)
        scaled, other = feed(weighting, other, unit * s, unit * d)
        np.testing.assert_allclose(scaled * unit, weights, rtol=2e-4)


def test_weights_come_from_raw_weights_before_their_update():
    s, d = random_gradients(3, 6, 5)
    with jax.enable_x64(True):
        slow, fast = (grap(3, optimizer=optax.sgd(rate)) for rate in (0.0, 10.0))
        a, state = feed(slow, start(slow, 4), s, d)
        b, moved = feed(fast, start(fast, 4), s, d)
        np.testing.assert_array_equal(a, b)
        assert not np.allclose(
            state.inner.raw_weights, moved.inner.raw_weights, atol=1e-3
        )


def test_one_pretraining_loss_has_its_gradient_normalised():
    weighting = grap("label")
    losses = {"fit": jnp.float32(1.0), "label": jnp.float32(2.0)}
    gramian = jnp.array([[16.0, 3.0], [3.0, 9.0]])
    update = jax.jit(weighting.update)
    weights, state = update(losses, weighting.init(losses), gramian=gramian)
    assert float(weights["fit"]) == 0.25
    assert float(weights["label"]) == 0.0
    assert state.inner.raw_weights == 1.0


def test_the_place_of_the_downstream_loss_does_not_matter():
    s, d = random_gradients(3, 6, 6)
    rows = jnp.asarray(np.concatenate([s, d[None]]))
    losses = dict.fromkeys("abcd", jnp.float32(0))
    expected = None
    for place in range(4):
        order = [*range(place), 3, *range(place, 3)]
        arranged = rows[np.array(order)]
        weighting = grap("abcd"[place], initial=2.0)
        state = weighting.init(losses)
        assert state.loss_weights["abcd"[place]] == 0
        update = jax.jit(weighting.update)
        for _ in range(2):
            weights, state = update(losses, state, gramian=arranged @ arranged.T)
        weights = np.asarray(list(weights.values()))
        weights = np.append(np.delete(weights, place), weights[place])
        expected = weights if expected is None else expected
        np.testing.assert_allclose(weights, expected, rtol=1e-5)


# The whole state, for 25 steps, against the transcription.

CONFIGURATIONS = [
    {},
    {"regularization": 1.0, "gramian_decay": 0.0, "norm_decay": 0.99},
    {"regularization": 0.3, "warmup": 0},
    {"gramian_decay": 0.0, "norm_decay": 0.0, "warmup": 0},
    {"gramian_decay": 0.99, "warmup": 100},
    {"closed_form": True},
    {"closed_form": True, "gramian_decay": 0.0, "warmup": 0},
    {"closed_form": True, "gramian_decay": 0.99, "norm_decay": 0.99, "warmup": 100},
]


def label(options):
    return ",".join(f"{k}={v}" for k, v in options.items()) or "default"


@pytest.mark.parametrize(
    ("adam", "encoded"), [(False, False), (True, True)], ids=["full", "encoder"]
)
@pytest.mark.parametrize("options", CONFIGURATIONS, ids=label)
def test_25_steps_equal_the_transcription(options, adam, encoded):
    steps, count, size = 25, 4, 7
    rng = np.random.default_rng(len(label(options)))
    common = rng.normal(size=size)
    spread = 10.0 ** rng.uniform(-1, 1, size=(count, 1))
    s = spread * (common + 1.5 * rng.normal(size=(steps, count, size)))
    d = common + 0.5 * rng.normal(size=(steps, size))
    d[7] = 0.0  # a batch without labels
    observed = 10.0 ** rng.uniform(-1, 1, size=(steps, 2))
    observed[3, 0] = 0.0  # a step without weights

    options = dict(options)
    solved = options.pop("closed_form", False)
    reference = oracle.Grap(
        count,
        closed_form=solved,
        optimizer=None if adam else oracle.Sgd(0.05),
        **options,
    )
    expected = []
    for i in range(steps):
        expected.append(np.append(reference.step(s[i], d[i]), 0))
        if encoded:
            reference.observe(*observed[i])

    with jax.enable_x64(True):
        if solved:
            weighting = grap_closed_form(count, **options)
        else:
            tx = None if adam else optax.sgd(0.05)
            weighting = grap(count, optimizer=tx, **options)
        assert weighting.observe is not None
        observe = weighting.observe

        def step(state, batch):
            pretraining, downstream, (cotangent_norm, gradient_norm) = batch
            weights, state = feed(weighting, state, pretraining, downstream)
            if encoded:
                state = observe(
                    state, cotangent_norm=cotangent_norm, gradient_norm=gradient_norm
                )
            return state, weights

        state = start(weighting, count + 1)
        state, actual = jax.jit(lambda *a: jax.lax.scan(step, *a))(
            state, (jnp.asarray(s), jnp.asarray(d), jnp.asarray(observed))
        )
    assert np.abs(expected).max() > 1e-3
    # The closed form adds 1e-10 to the diagonal, to choose among equal solutions.
    atol = 3e-9 * np.abs(expected).max() if solved else 1e-12
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=atol)
    np.testing.assert_allclose(
        learned_weights(state), reference.phi, rtol=1e-9, atol=3e-9 if solved else 0
    )
    learned = state.inner.statistics
    np.testing.assert_allclose(learned.gradient_norms, reference.nu, rtol=1e-12)
    np.testing.assert_allclose(learned.cosines, reference.C, atol=1e-12)
    np.testing.assert_allclose(learned.alignments, reference.p, atol=1e-12)
    tau = 1.0 if reference.tau is None else reference.tau
    np.testing.assert_allclose(learned.encoder_gain, tau, rtol=1e-12)
    assert (learned.num_batches == steps).all()
    assert (learned.num_compared == steps - 1).all()
    assert int(learned.num_observed) == (steps - 1 if encoded else 0)
    if solved:
        assert int(state.inner.num_zero_steps) == reference.skipped
    assert int(state.num_skipped) == 0


# Where the published implementation loses its state.


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("x64", [False, True])
def test_opposite_equal_gradients_do_not_destroy_the_raw_weights(form, x64):
    s = np.array([[0.3, 0.1, -0.7], [-0.3, -0.1, 0.7]])
    d = np.array([1.0, 2.0, -1.0])
    with jax.enable_x64(x64):
        weighting = known(form, 2)
        state = start(weighting, 3)
        for _ in range(12):
            weights, state = feed(weighting, state, s, d)
            assert np.all(np.isfinite(weights))
        assert np.all(np.isfinite(learned_weights(state)))
        assert int(state.num_skipped) == 0
        # The loss that pulls along d has won.
        assert weights[0] > weights[1]
        assert cosine(np.asarray(weights[:2] @ s), d) > 0.99 * cosine(s[0], d)


@pytest.mark.parametrize("form", FORMS)
def test_a_loss_without_gradient_has_the_weight_zero(form):
    s, d = random_gradients(3, 6, 8)
    s[1] = 0.0
    weighting = known(form, 3)
    state = start(weighting, 4)
    for _ in range(12):
        weights, state = feed(weighting, state, jnp.float32(s), jnp.float32(d))
        assert weights[1] == 0
        assert np.all(np.isfinite(weights))
    assert np.all(np.isfinite(learned_weights(state)))
    assert not np.any(state.inner.statistics.cosines[1])


@pytest.mark.parametrize(
    "weighting",
    [grap(2), grap(2, regularization=1.0), grap_closed_form(2)],
    ids=["plain", "regularised", "closed form"],
)
def test_zero_gradients_everywhere_give_finite_weights(weighting):
    state = start(weighting, 3)
    for _ in range(3):
        weights, state = feed(weighting, state, jnp.zeros((2, 4)), jnp.zeros(4))
        assert not np.any(weights)
    assert int(state.num_skipped) == 0
    np.testing.assert_array_equal(learned_weights(state), [1, 1])


@pytest.mark.parametrize("form", FORMS)
def test_a_batch_without_labels_updates_norms_and_cosines_alone(form):
    with jax.enable_x64(True):
        weighting = FORMS[form](3, gramian_decay=0.0, warmup=2)
        state = start(weighting, 4)
        for seed in range(3):
            _, state = feed(weighting, state, *random_gradients(3, 6, seed))
        s, _ = random_gradients(3, 6, 10)
        weights, after = feed(weighting, state, s, np.zeros(6))
        before, now = state.inner.statistics, after.inner.statistics
        kept = ("alignments", "num_compared", "encoder_gain", "num_observed")
        expected = now._replace(**{name: getattr(before, name) for name in kept})
        expected = state.inner._replace(statistics=expected)
        jax.tree.map(np.testing.assert_array_equal, after.inner, expected)
        assert (now.num_compared == 3).all()
        assert (now.num_batches == 4).all()
        assert np.any(now.cosines != before.cosines)
        # The composite gradient has norm 1 for the running means of the norms.
        w = weights[:3] * now.gradient_norms
        assert w @ now.cosines @ w == pytest.approx(1, rel=1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_a_first_batch_without_labels_has_equal_raw_weights(form):
    s, _ = random_gradients(3, 6, 11)
    with jax.enable_x64(True):
        weighting = known(form, 3)
        weights, state = feed(weighting, start(weighting, 4), s, np.zeros(6))
        assert jnp.linalg.norm(weights[:3] @ s) == pytest.approx(1)
        np.testing.assert_array_equal(learned_weights(state), np.ones(3))


def test_a_batch_that_is_not_finite_changes_nothing():
    weighting = grap(3)
    state = start(weighting, 4)
    _, state = feed(weighting, state, *map(jnp.float32, random_gradients(3, 6, 0)))
    bad, d = map(jnp.float32, random_gradients(3, 6, 1))
    weights, after = feed(weighting, state, bad.at[0, 0].set(jnp.nan), d)
    np.testing.assert_array_equal(weights, jnp.stack(state.loss_weights))
    jax.tree.map(np.testing.assert_array_equal, state.inner, after.inner)
    assert int(after.num_skipped) == 1


# Weights of zero.


def against(count):
    """Gradients that all point away from the downstream gradient."""
    return -np.eye(count, 6) - 0.1, np.ones(6)


def test_the_sixth_step_without_a_helpful_loss_weighs_all_alike():
    weighting = grap_closed_form(3, gramian_decay=0.0, warmup=0)
    state = start(weighting, 4)
    s, d = map(jnp.float32, against(3))
    for number in range(1, 9):
        weights, state = feed(weighting, state, s, d)
        norms = state.inner.statistics.gradient_norms
        expected = np.zeros(3) if number <= 5 else np.ones(3)
        np.testing.assert_allclose(weights[:3] * norms, expected, rtol=1e-6)
        assert int(state.inner.num_zero_steps) == number
        assert (state.inner.statistics.num_compared == number).all()
    np.testing.assert_array_equal(state.inner.solution, np.ones(3))
    weights, state = feed(weighting, state, -s, d)
    assert np.all(np.asarray(weights[:3]) > 0)
    assert int(state.inner.num_zero_steps) == 0
    weights, state = feed(weighting, state, s, d)
    assert not np.any(weights)
    assert int(state.inner.num_zero_steps) == 1


def test_the_gain_of_the_encoder_is_a_running_mean_without_skipped_steps():
    weighting = grap(1, norm_decay=0.75)
    state = start(weighting, 2)
    assert weighting.observe is not None
    observe = jax.jit(weighting.observe)
    gains = []
    for norms in [(0.0, 0.0), (6.0, 3.0), (0.0, 1.0), (1.0, 0.0), (4.0, 4.0)]:
        state = observe(state, cotangent_norm=norms[0], gradient_norm=norms[1])
        gains.append(float(state.inner.statistics.encoder_gain))
    assert gains == [1.0, 2.0, 2.0, 2.0, 1.75]
    assert int(state.inner.statistics.num_observed) == 2


def test_the_gain_holds_the_norm_of_the_encoders_gradient():
    """A linear encoder z = A x that makes gradients 50 times as long, or 1/50."""
    s, d = random_gradients(3, 6, 12)
    for size in (50.0, 0.02):
        jacobian = size * np.linalg.qr(np.random.default_rng(0).normal(size=(6, 6)))[0]
        weighting = grap(3)
        assert weighting.observe is not None
        state = start(weighting, 4)
        for _ in range(2):
            weights, state = feed(weighting, state, jnp.float32(s), jnp.float32(d))
            cotangent = np.asarray(weights[:3] @ jnp.float32(s))
            norm = np.linalg.norm(jacobian.T @ cotangent)
            state = weighting.observe(
                state, cotangent_norm=np.linalg.norm(cotangent), gradient_norm=norm
            )
        assert norm == pytest.approx(1, rel=1e-3)


# What is refused.


def test_the_downstream_loss_alone_is_refused():
    for weighting in (grap("label"), grap_closed_form("label"), auto_lambda("label")):
        with pytest.raises(ValueError, match="besides the downstream one.*label"):
            weighting.init({"label": 0.0})


def test_an_unknown_downstream_loss_is_refused():
    for weighting in (grap("lable"), auto_lambda("lable")):
        with pytest.raises(ValueError, match="lable"):
            weighting.init({"fit": 0.0, "label": 0.0})


@pytest.mark.parametrize("make", [grap, grap_closed_form])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gramian_decay": 1.0}, "gramian_decay must be in .* got 1.0"),
        ({"norm_decay": -0.1}, "norm_decay must be in .* got -0.1"),
        ({"warmup": -1}, "warmup must not be negative, got -1"),
    ],
)
def test_options_out_of_range_are_refused(make, options, message):
    with pytest.raises(ValueError, match=message):
        make("label", **options)


# Auto-Lambda.


def test_auto_lambda_follows_the_downstream_loss_one_step_ahead():
    """Its gradient is that of the loss after one SGD step, by finite differences."""
    rng = np.random.default_rng(0)
    centers, x = rng.normal(size=(3, 5)), rng.normal(size=5)
    held_out = rng.normal(size=5)
    gradients = lambda x: np.concatenate(
        [4 * np.sum((x - c) ** 2) * (x - c)[None] for c in centers]
    )
    downstream = lambda x: np.sum((x - held_out) ** 4)
    slope = lambda x: 4 * (x - held_out) ** 3
    weights, alpha = np.array([0.3, 0.8, 0.1]), 1e-2

    ahead = lambda w: downstream(x - alpha * w @ gradients(x))
    basis = 1e-5 * np.eye(3)
    expected = [(ahead(weights + e) - ahead(weights - e)) / 2e-5 for e in basis]

    v = slope(x - alpha * weights @ gradients(x))
    with jax.enable_x64(True):
        weighting = auto_lambda(
            3, optimizer=optax.sgd(1.0), step_size=alpha, initial=[*weights, 9.0]
        )
        state = weighting.init([jnp.zeros(())] * 4)
        np.testing.assert_allclose(state.loss_weights, [*weights, 0.0])
        alignment = np.append(gradients(x) @ v, 5.0)
        new, state = weighting.update(
            [jnp.zeros(())] * 4, state, alignment=jnp.asarray(alignment)
        )
        new = [float(weight) for weight in new]
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(weights - new[:3], expected, rtol=1e-6)
    assert new[3] == 0


def test_auto_lambda_may_learn_the_weight_of_the_downstream_loss_too():
    losses = {"fit": jnp.float32(0), "label": jnp.float32(0)}
    alignment = jnp.array([-2.0, 3.0])
    learned = auto_lambda("label", optimizer=optax.sgd(0.1), downstream_weight=None)
    weights, _ = learned.update(losses, learned.init(losses), alignment=alignment)
    np.testing.assert_allclose(list(weights.values()), [-0.1, 0.4], rtol=1e-6)
    fixed = auto_lambda("label", optimizer=optax.sgd(0.1), downstream_weight=2.0)
    weights, _ = fixed.update(losses, fixed.init(losses), alignment=alignment)
    np.testing.assert_allclose(list(weights.values()), [-0.1, 2.0], rtol=1e-6)


@pytest.mark.parametrize("size", [1.0, 1e-6, 1e-12])
def test_auto_lambdas_first_step_has_the_length_of_its_learning_rate(size):
    losses = [jnp.float32(0)] * 3
    weighting = auto_lambda(2, step_size=0.1)
    alignment = size * jnp.array([5.0, -0.2, 1.0])
    weights, _ = weighting.update(losses, weighting.init(losses), alignment=alignment)
    np.testing.assert_allclose(np.asarray(weights)[:2], [0.1001, 0.0999], rtol=1e-5)
