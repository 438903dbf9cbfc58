"""Weightings that look at losses, gradient norms or the tangent kernel."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import yoto_jax as yoto
from tests.oracles import losses as oracles
from yoto_jax.weightings._causal import causal
from yoto_jax.weightings._cov import cov
from yoto_jax.weightings._dwa import dwa
from yoto_jax.weightings._encodec_balancer import encodec_balancer
from yoto_jax.weightings._famo import famo
from yoto_jax.weightings._geometric import geometric
from yoto_jax.weightings._grad_norm_balance import calibrated, grad_norm_balance
from yoto_jax.weightings._gradnorm import gradnorm
from yoto_jax.weightings._imtl_l import imtl_l
from yoto_jax.weightings._inverse_dirichlet import inverse_dirichlet
from yoto_jax.weightings._lr_annealing import lr_annealing
from yoto_jax.weightings._metabalance import metabalance
from yoto_jax.weightings._ntk import ntk, ntk_diagonal, ntk_surrogate
from yoto_jax.weightings._random import random
from yoto_jax.weightings._relobralo import relobralo
from yoto_jax.weightings._scale_invariant import scale_invariant
from yoto_jax.weightings._slaw import slaw
from yoto_jax.weightings._softadapt import softadapt
from yoto_jax.weightings._stch import stch
from yoto_jax.weightings._uncertainty import uncertainty
from yoto_jax.weightings._uw_so import uw_so

pytestmark = pytest.mark.usefixtures("quick_compilation")


def example_run(updates=30, count=4, seed=0):
    """Falling positive losses of many sizes, and positive gradient statistics."""
    rng = np.random.default_rng(seed)
    sizes = 10.0 ** np.linspace(-2, 2, count)
    walk = np.cumsum(rng.normal(-0.03, 0.2, (updates, count)), axis=0)
    norms = sizes[::-1] ** 0.5
    statistics = norms * np.exp(rng.normal(0, 0.5, (2, updates, count)))
    return sizes * np.exp(walk), np.max(statistics, 0), np.min(statistics, 0)


LOSSES, LARGE, SMALL = example_run()  # (T, K) each
T, K = LOSSES.shape


def run(weighting, losses, **statistics):
    """Weights (T, K) of a compiled run and its last state."""
    losses = jnp.asarray(losses, jnp.result_type(float))
    statistics = {k: jnp.asarray(v, losses.dtype) for k, v in statistics.items()}

    @jax.jit
    def scanned(losses, statistics):
        def body(state, inputs):
            values, given = inputs
            weights, state = weighting.update(list(values), state, **given)
            return state, jnp.stack(weights)

        state = weighting.init(list(losses[0]))
        return jax.lax.scan(body, state, (losses, statistics))

    state, weights = scanned(losses, statistics)
    return np.asarray(weights), state


def keeps(seed, beta, updates, dtype):
    key, drawn = jax.random.fold_in(jax.random.key(seed), 0), []
    for _ in range(updates):
        key, draw = jax.random.split(key)
        drawn.append(bool(jax.random.bernoulli(draw, jnp.asarray(beta, dtype))))
    return drawn


KINDS = ["regression", "classification", "classification", "regression"]
BOUNDS = [-1.0, 0.005, -30.0, 0.0]
SURROGATE = LARGE / (2 * np.sqrt(LOSSES))
SQUARES = SMALL**2
PARTS = np.array([3.0, 1.0, 2.0, 4.0])

CASES = {
    "scale_invariant": (scale_invariant, lambda: 1 / LOSSES, {}),
    "geometric": (
        geometric,
        lambda: np.prod(LOSSES, 1, keepdims=True) ** (1 / K) / (K * LOSSES),
        {},
    ),
    "uncertainty": (uncertainty, lambda: oracles.uncertainty(LOSSES), {}),
    "uncertainty of both kinds": (
        lambda: uncertainty(kind=KINDS, initial=-0.5),
        lambda: oracles.uncertainty(LOSSES, np.array([0.5, 1, 1, 0.5]), -0.5),
        {},
    ),
    "imtl_l": (imtl_l, lambda: oracles.imtl_l(LOSSES), {}),
    "dwa": (dwa, lambda: oracles.dwa(LOSSES), {}),
    "dwa by windows": (
        lambda: dwa(temperature=0.5, window=7),
        lambda: oracles.dwa(LOSSES, 0.5, 7),
        {},
    ),
    "softadapt": (softadapt, lambda: oracles.softadapt(LOSSES), {}),
    "softadapt, paper": (
        lambda: softadapt(beta=0.1, form="difference", loss_weighted=True),
        lambda: oracles.softadapt(LOSSES, 0.1, "difference", True),
        {},
    ),
    "softadapt, differences": (
        lambda: softadapt(beta=-0.1, form="difference"),
        lambda: oracles.softadapt(LOSSES, -0.1, "difference"),
        {},
    ),
    "relobralo": (
        lambda: relobralo(alpha=0.8, beta=0.6, temperature=0.3, key=3),
        lambda: oracles.relobralo(
            LOSSES, keeps(3, 0.6, T, jnp.result_type(float)), 0.8, 0.3
        ),
        {},
    ),
    "uw_so": (
        lambda: uw_so(temperature=20.0),
        lambda: oracles.uw_so(LOSSES, 20.0),
        {},
    ),
    "cov": (cov, lambda: oracles.cov(LOSSES), {}),
    "cov that forgets": (
        lambda: cov(decay=0.7),
        lambda: oracles.cov(LOSSES, 0.7),
        {},
    ),
    "slaw": (slaw, lambda: oracles.slaw(LOSSES), {}),
    "slaw that forgets": (
        lambda: slaw(decay=0.8),
        lambda: oracles.slaw(LOSSES, 0.8),
        {},
    ),
    "slaw with a large bound": (
        lambda: slaw(decay=0.8, eps=0.1),
        lambda: oracles.slaw(LOSSES, 0.8, 0.1),
        {},
    ),
    "famo": (famo, lambda: oracles.famo(LOSSES), {}),
    "famo with bounds": (
        lambda: famo(gamma=0.1, lower_bounds=BOUNDS),
        lambda: oracles.famo(LOSSES, 0.1, np.array(BOUNDS)),
        {},
    ),
    "stch": (
        lambda: stch(
            smoothing=5.0, preference=[0.1, 0.2, 0.3, 0.4], ideal=[0, 0, 1, 2]
        ),
        lambda: np.array(
            [
                p * oracles.softmax(p * (loss - np.array([0, 0, 1, 2])) / 5)
                for p in [np.array([0.1, 0.2, 0.3, 0.4])]
                for loss in LOSSES
            ]
        ),
        {},
    ),
    "stch, logarithms": (
        lambda: stch(smoothing=0.7, form="log"),
        lambda: oracles.stch_log(LOSSES, 0.7, 0),
        {},
    ),
    "stch, logarithms and nadir": (
        lambda: stch(smoothing=0.7, form="log", warmup=5),
        lambda: oracles.stch_log(LOSSES, 0.7, 5),
        {},
    ),
    "causal": (
        lambda: causal(tolerance=0.5),
        lambda: np.array(
            [
                [np.exp(-0.5 * loss[:k].sum()) / len(loss) for k in range(len(loss))]
                for loss in LOSSES
            ]
        ),
        {},
    ),
    "gradnorm": (gradnorm, lambda: oracles.gradnorm(LOSSES, LARGE), {"norms": LARGE}),
    "gradnorm with a small alpha": (
        lambda: gradnorm(alpha=0.12),
        lambda: oracles.gradnorm(LOSSES, LARGE, 0.12),
        {"norms": LARGE},
    ),
    "grad_norm_balance": (
        grad_norm_balance,
        lambda: oracles.grad_norm_balance(LARGE),
        {"norms": LARGE},
    ),
    "grad_norm_balance of average norms": (
        lambda: grad_norm_balance(1, 0.3, average="norms"),
        lambda: oracles.norm_ratios(LARGE, 1, 0.3),
        {"norms": LARGE},
    ),
    "encodec_balancer": (
        lambda: encodec_balancer(preference=list(PARTS), total_norm=5.0, decay=0.9),
        lambda: oracles.encodec_balancer(LARGE, PARTS, 5.0, 0.9),
        {"norms": LARGE},
    ),
    "metabalance": (
        lambda: metabalance(1),
        lambda: oracles.metabalance(LARGE, 1),
        {"norms": LARGE},
    ),
    "metabalance that goes all the way": (
        lambda: metabalance(2, relax=1.0, decay=0.5),
        lambda: oracles.metabalance(LARGE, 2, 1.0, 0.5),
        {"norms": LARGE},
    ),
    "inverse_dirichlet": (
        inverse_dirichlet,
        lambda: oracles.inverse_dirichlet(SMALL),
        {"std": SMALL},
    ),
    "lr_annealing": (
        lambda: lr_annealing(2, decay=0.8),
        lambda: oracles.lr_annealing(2, LARGE, SMALL, 0.8),
        {"max_abs": LARGE, "mean_abs": SMALL},
    ),
    "lr_annealing by means": (
        lambda: lr_annealing(2, statistic="mean"),
        lambda: oracles.lr_annealing(2, SMALL, SMALL),
        {"mean_abs": SMALL},
    ),
    "ntk": (
        lambda: ntk(eps=1e-9),
        lambda: oracles.averages(SQUARES.mean(1, keepdims=True) / SQUARES),
        {"ntk_diagonal": SQUARES},
    ),
    "ntk by traces": (
        lambda: ntk(eps=1e-9, reduction="sum", decay=0.5),
        lambda: oracles.averages(SQUARES.sum(1, keepdims=True) / SQUARES, 0.5),
        {"ntk_diagonal": SQUARES},
    ),
    "ntk_surrogate": (
        ntk_surrogate,
        lambda: oracles.averages(SURROGATE.sum(1, keepdims=True) / SURROGATE),
        {"norms": LARGE},
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("x64", [True, False])
def test_weights_equal_an_independent_oracle_at_every_update(name, x64):
    make, oracle, statistics = CASES[name]
    with jax.enable_x64(x64):
        weights, state = run(make(), LOSSES, **statistics)
        expected = oracle()
        assert weights.dtype == (np.float64 if x64 else np.float32)
    # Rounding of thirty updates adds up: 3e-15 at most in float64, in float32 5e-6, and
    # 3e-5 in gradnorm, whose weights are renormalised at every update.
    np.testing.assert_allclose(weights, expected, rtol=1e-12 if x64 else 1e-4)
    assert state.num_updates == T
    assert state.num_skipped == 0


# Closed forms, golden values, identities.


def test_golden_value_of_dwa():
    weighting = dwa(temperature=2.0)
    with jax.enable_x64(True):
        weights, _ = run(weighting, [[1.0, 2.0], [0.5, 4.0], [3.0, 3.0]])
        expected = 2 * jax.nn.softmax(jnp.array([0.25, 1.0]))
    np.testing.assert_allclose(weights, [[1, 1], [1, 1], expected], rtol=1e-15)


def geometric_mean(losses):
    return jnp.exp(jnp.mean(jnp.log(losses)))


def smooth_maximum(losses):
    return 0.3 * jax.nn.logsumexp((losses - 1.0) / 4 / 0.3)


def smooth_maximum_of_logarithms(losses):
    return 4 * 0.3 * jax.nn.logsumexp(jnp.log(losses) / 0.3)


@pytest.mark.parametrize(
    ("weighting", "objective"),
    [
        (scale_invariant(), lambda losses: jnp.sum(jnp.log(losses))),
        (geometric(), geometric_mean),
        (stch(smoothing=0.3, ideal=1.0), smooth_maximum),
        (stch(smoothing=0.3, form="log"), smooth_maximum_of_logarithms),
        (
            stch(smoothing=0.3, form="log", warmup=1),
            lambda losses: jnp.sum(jnp.log(losses)),
        ),
    ],
)
def test_weights_are_the_gradient_of_the_scalarization(weighting, objective):
    with jax.enable_x64(True):
        weights, _ = run(weighting, LOSSES[:1])
        slopes = jax.grad(objective)(jnp.array(LOSSES[0]))
    np.testing.assert_allclose(weights[0], slopes, rtol=1e-12)


def test_a_small_smoothing_leaves_the_largest_loss_alone():
    weights, _ = run(stch(smoothing=1e-3), [[1.0, 3.0, 2.0]])
    np.testing.assert_allclose(weights, [[0, 1 / 3, 0]], atol=1e-7)


def test_causal_weights_fall_with_time_until_all_is_solved():
    weights, _ = run(
        causal(tolerance=1.0), [[0.5, 1.0, 2.0, 4.0], [0.0, 0.0, 0.0, 9.0]]
    )
    assert np.all(np.diff(weights[0]) < 0)
    np.testing.assert_allclose(weights[1], 0.25, rtol=1e-7)


def test_random_weights_are_softmax_normals_and_change_at_every_update():
    weights, _ = run(random(key=1), np.ones((500, 3)))
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-6)
    assert len(np.unique(weights[:, 0])) == 500
    # Differences of log-weights are differences of normals: mean 0, variance 2. The
    # bounds are four standard errors of 500 draws.
    differences = np.log(weights[:, 0] / weights[:, 1])
    assert abs(differences.mean()) < 4 * np.sqrt(2 / 500)
    assert abs(differences.var() - 2) < 4 * 2 * np.sqrt(2 / 500)


@pytest.mark.parametrize("make", [random, lambda key: relobralo(beta=0.5, key=key)])
def test_the_key_decides_the_weights(make):
    runs = [run(make(key=key), LOSSES)[0] for key in (0, 0, jax.random.key(0), 1)]
    np.testing.assert_array_equal(runs[0], runs[1])
    np.testing.assert_array_equal(runs[0], runs[2])
    assert np.any(runs[0] != runs[3])


@pytest.mark.parametrize(
    "make", [lambda key: random(key=key), lambda key: relobralo(key=key)]
)
def test_the_key_given_survives_a_donated_state(make):
    key = jax.random.key(0)
    weighting = make(key)
    consume = jax.jit(lambda learned: learned, donate_argnums=0)
    first = consume(weighting.init([1.0, 2.0]).inner)
    again = consume(weighting.init([1.0, 2.0]).inner)
    assert not key.is_deleted()
    assert first.key == again.key


@pytest.mark.parametrize(
    "make", [lambda key: random(key=key), lambda key: relobralo(key=key)]
)
def test_a_key_that_is_no_key_is_refused(make):
    with pytest.raises(TypeError, match="key"):
        make("seed").init([1.0])


def test_uncertainty_steps_on_the_gradient_of_the_joint_objective():
    def objective(s, losses):
        regression = 0.5 * jnp.exp(-s[0]) * losses[0] + 0.5 * s[0]
        return regression + jnp.exp(-s[1]) * losses[1] + 0.5 * s[1]

    with jax.enable_x64(True):
        losses, s = jnp.array([0.7, 3.0]), jnp.array([0.3, -0.2])
        weighting = uncertainty(
            kind=["regression", "classification"],
            optimizer=optax.sgd(0.1),
            initial=list(s),
        )
        weights, state = weighting.update(list(losses), weighting.init(list(losses)))
        slope, factors = jax.grad(objective, argnums=(0, 1))(s, losses)
        expected = s - 0.1 * slope
    np.testing.assert_allclose(weights, factors, rtol=1e-14)
    np.testing.assert_allclose(state.inner.log_variances, expected, rtol=1e-14)


def test_imtl_l_is_twice_uncertainty_with_the_sign_changed():
    # I(s) = 2 U(-s), so dI/ds = -2 U'(-s): half the learning rate gives the same path.
    rng = np.random.default_rng(1)
    losses = rng.uniform(0.2, 3.0, (T, K))
    with jax.enable_x64(True):
        for rate in (0.02, 0.2):
            imtl, imtl_state = run(imtl_l(optimizer=optax.sgd(rate)), losses)
            kendall, state = run(uncertainty(optimizer=optax.sgd(2 * rate)), losses)
            np.testing.assert_allclose(imtl, 2 * kendall, rtol=1e-12)
            np.testing.assert_allclose(
                imtl_state.inner.log_scales,
                -state.inner.log_variances,
                rtol=1e-12,
            )
        # Adam does not see the factor 2, but for its epsilon.
        adam = optax.adam(0.025, eps=0.0)
        imtl, _ = run(imtl_l(optimizer=adam), losses)
        kendall, _ = run(uncertainty(optimizer=adam), losses)
    np.testing.assert_allclose(imtl, 2 * kendall, rtol=1e-12)


@pytest.mark.parametrize(
    ("make", "product"),
    [
        (lambda tx: uncertainty(optimizer=tx), 0.5),
        (lambda tx: uncertainty(kind="classification", optimizer=tx), 0.5),
        (lambda tx: imtl_l(optimizer=tx), 1.0),
    ],
)
def test_learned_scales_settle_at_one_over_the_loss(make, product):
    losses = np.broadcast_to([0.1, 1.0, 30.0], (2000, 3))
    weights, _ = run(make(optax.sgd(0.05)), losses)
    np.testing.assert_allclose(weights[-1] * losses[-1], product, rtol=1e-4)


@pytest.mark.parametrize("make", [uncertainty, imtl_l])
@pytest.mark.parametrize("size", [1e-30, 1e15])
def test_learned_scales_stay_bounded(make, size):
    weights, state = run(make(optimizer=optax.sgd(0.5)), np.full((100, 1), size))
    limit = np.exp(20.0 if size < 1 else -20.0)
    np.testing.assert_allclose(
        weights[-1], limit * (0.5 if make is uncertainty else 1), rtol=1e-5
    )
    assert state.num_skipped == 0


@pytest.mark.parametrize(
    "kind",
    [
        ["regression", "classification"],
        ("regression", "classification"),
        {"heads/label": "classification", "depth": "regression"},
        {"heads": {"label": "classification"}, "depth": "regression"},
    ],
)
def test_the_kind_of_each_loss_is_found_by_order_name_or_tree(kind):
    losses = {"heads": {"label": 1.0}, "depth": 2.0}  # Order: depth, heads/label.
    weights = uncertainty(kind=kind).init(losses).loss_weights
    assert weights == {"heads": {"label": 1.0}, "depth": 0.5}


@pytest.mark.parametrize(
    "kind", ["poisson", ["regression"], {"depth": "regression"}, None, [["x"], "y"]]
)
def test_a_kind_that_does_not_fit_is_refused(kind):
    with pytest.raises(ValueError, match="kind must be.*'depth', 'label'"):
        uncertainty(kind=kind).init({"depth": 1.0, "label": 2.0})


def test_softadapt_by_ratios_ignores_the_units_of_the_losses():
    weights, _ = run(softadapt(beta=2.0), LOSSES)
    rescaled, _ = run(softadapt(beta=2.0), LOSSES * [1e-3, 1e3, 10, 1])
    np.testing.assert_allclose(weights, rescaled, rtol=2e-5)


def test_relobralo_follows_the_first_losses_at_its_second_update():
    ratio = np.array([0.5, 2.0]) / [1.0, 4.0]
    weights, _ = run(relobralo(temperature=0.1), [[1.0, 4.0], [0.5, 2.0], [0.5, 1.0]])
    np.testing.assert_allclose(weights[0], 1)
    np.testing.assert_allclose(weights[1], 2 * oracles.softmax(ratio / 0.1), rtol=1e-6)
    # From then on a step of 1 - alpha away from it.
    assert 0 < np.abs(weights[2] - weights[1]).max() < 2e-3


def test_dwa_counts_windows_by_the_updates_it_accepted():
    bad = [[np.nan, 1.0]]
    good = [[1.0, 2.0], [3.0, 2.0], [1.0, 1.0], [2.0, 3.0], [1.0, 1.0]]
    weights, state = run(dwa(window=2), good[:1] + bad + good[1:])
    expected = oracles.dwa(np.array(good), window=2)
    np.testing.assert_allclose(np.delete(weights, 1, 0), expected, rtol=1e-6)
    assert (state.num_updates, state.num_skipped) == (5, 1)


# Weights by inverse losses, and by how much the losses vary.


def test_golden_value_of_uw_so():
    weights, _ = run(uw_so(temperature=2.0), [[0.5, 4.0], [1.0, 1.0]])
    odds = np.exp(1.0 - 0.125)
    np.testing.assert_allclose(weights[0], [odds / (1 + odds), 1 / (1 + odds)], 1e-6)
    np.testing.assert_allclose(weights[1], 0.5)


def test_the_temperature_of_uw_so_has_the_unit_of_one_over_a_loss():
    with jax.enable_x64(True):
        weights, _ = run(uw_so(temperature=30.0), LOSSES)
        converted, _ = run(uw_so(temperature=30.0 / 7.0), 7.0 * LOSSES)
        other, _ = run(uw_so(temperature=30.0), 7.0 * LOSSES)
    np.testing.assert_allclose(converted, weights, rtol=1e-12)
    assert np.abs(other - weights).max() > 0.1


def test_uw_so_goes_from_the_smallest_loss_to_equal_weights():
    losses = [[0.5, 4.0, 0.6]]
    cold, _ = run(uw_so(temperature=1e-3), losses)
    np.testing.assert_allclose(cold, [[1, 0, 0]], atol=1e-7)
    hot, _ = run(uw_so(temperature=1e6), losses)
    np.testing.assert_allclose(hot, 1 / 3, rtol=1e-5)
    # Exponents that overflow are held back, so that no weight is NaN.
    tiny, state = run(uw_so(temperature=1e-9), [[1e-30, 1e-30, 1.0]])
    np.testing.assert_allclose(tiny, [[0.5, 0.5, 0]])
    assert state.num_skipped == 0


def test_golden_value_of_cov():
    # Ratios 1, 1.5, and 1, 1.1: the means are 1.25 and 1.05, deviations 0.25 and 0.05.
    losses = [[1.0, 2.0], [1.5, 2.2], [7.0, 0.1]]
    with jax.enable_x64(True):
        weights, state = run(cov(), losses)
    np.testing.assert_allclose(weights[:2], 0.5)
    varies = np.sqrt([0.25**2 + 1e-8, 0.05**2 + 1e-8]) / [1.25, 1.05]
    np.testing.assert_allclose(weights[2], varies / varies.sum(), rtol=1e-13)
    np.testing.assert_allclose(state.inner.loss_means, [9.5 / 3, 4.3 / 3], rtol=1e-13)


def test_golden_value_of_slaw():
    # After two updates the deviation is half of the difference: 0.05, 0.15.
    losses = [[1.0, 20.0], [0.9, 20.3], [1.1, 19.7]]
    with jax.enable_x64(True):
        weights, state = run(slaw(decay=0.5), losses)
    np.testing.assert_allclose(weights[:2], [[1, 1], [1.5, 0.5]], rtol=1e-12)
    # Means 0.95, 20.15 moved half way; variance (s^2 + d^2 / 2) / 2.
    s = np.sqrt([(0.05**2 + 0.15**2 / 2) / 2, (0.15**2 + 0.45**2 / 2) / 2])
    np.testing.assert_allclose(state.inner.loss_deviations, s, rtol=1e-12)
    np.testing.assert_allclose(weights[2], [1.5, 0.5], rtol=1e-12)


def test_cov_does_not_see_units_and_slaw_makes_up_for_them():
    units = np.array([1e-6, 1e3, 10.0, 1.0])
    plain, _ = run(cov(), LOSSES)
    rescaled, _ = run(cov(), LOSSES * units)
    np.testing.assert_allclose(rescaled, plain, rtol=1e-4)
    shares = [
        weights / weights.sum(1, keepdims=True)
        for weights in (run(slaw(), LOSSES)[0], run(slaw(), LOSSES * units)[0] * units)
    ]
    # All weights are 1 at the first update, whatever the units.
    np.testing.assert_allclose(shares[0][1:], shares[1][1:], rtol=1e-4)


def test_the_weight_of_slaw_is_the_gradient_norm_where_parameters_jitter():
    slopes = np.array([[3.0, 4.0], [0.6, 0.8], [0.0, 0.1]])
    jitter = np.random.default_rng(0).normal(size=(4000, 2))
    weights, _ = run(slaw(decay=0.9995), 10.0 + jitter @ slopes.T)
    np.testing.assert_allclose(weights[-1] / weights[-1, 0], [1, 5, 50], rtol=0.05)


def test_slaw_finds_a_small_spread_around_a_large_loss_in_float32():
    rng = np.random.default_rng(0)
    losses = 1000.0 + 0.02 * rng.normal(size=(300, 2)) * [1.0, 3.0]
    losses = losses.astype(np.float32)
    weights, state = run(slaw(decay=0.9), losses)
    expected = oracles.slaw(losses.astype(float), 0.9)
    np.testing.assert_allclose(weights[20:], expected[20:], rtol=0.02)
    assert state.num_skipped == 0


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_slaw_takes_no_squares_of_losses(size):
    plain, _ = run(slaw(), LOSSES)
    weights, state = run(slaw(), LOSSES * size)
    np.testing.assert_allclose(weights, plain, rtol=1e-4)
    assert state.num_skipped == 0


def test_losses_that_do_not_vary():
    losses = np.broadcast_to([2.0, 0.1, 30.0], (5, 3)).copy()
    weights, _ = run(cov(), losses)
    np.testing.assert_allclose(weights, 1 / 3, rtol=1e-5)
    weights, _ = run(slaw(eps=0.01), losses)
    inverse = 3 / losses[0] / np.sum(1 / losses[0])
    np.testing.assert_allclose(weights[1:], [inverse] * 4, rtol=1e-5)
    # Of a loss that always was 0 nothing is known, not its unit either.
    losses[:, 1] = 0.0
    losses[1:, 0] += [0.1, 0.2, 0.1, 0.2]
    weights, state = run(slaw(), losses)
    np.testing.assert_allclose(weights[:, 1], 1.0)
    np.testing.assert_allclose(weights.sum(1), 3.0, rtol=1e-6)
    assert state.num_skipped == 0


@pytest.mark.parametrize(
    ("make", "neutral"), [(cov, 1 / 3), (lambda: cov(decay=0.5), 1 / 3), (slaw, 1.0)]
)
def test_losses_that_come_now_and_then_have_statistics_of_their_own(make, neutral):
    weighting = make()
    names = ("a", "b", "c")
    there = np.array([[1, 1, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1], [1, 0, 1], [1, 1, 1]])
    state = weighting.init(dict.fromkeys(names, 1.0))
    update = jax.jit(lambda x, s, p: weighting.update(x, s, present=p))
    history = []
    for losses, row in zip(LOSSES, there, strict=False):
        losses = np.where(row, losses[:3], np.nan).astype(np.float32)
        present = dict(zip(names, row == 1, strict=True))
        weights, state = update(dict(zip(names, losses, strict=True)), state, present)
        history.append([float(weights[name]) for name in names])
    # "c" has come once: it weighs as if all weighed the same.
    np.testing.assert_allclose(history[3][2], neutral, rtol=1e-6)
    np.testing.assert_allclose(np.sum(history[3]), 3 * neutral, rtol=1e-6)
    assert np.all(np.array(history)[there == 0] == 0)
    for k in range(3):
        own = LOSSES[:6][there[:, k] == 1][:, k : k + 1].astype(np.float32)
        _, alone = run(weighting, own)
        for x, y in zip(state.inner, alone.inner, strict=True):
            np.testing.assert_allclose(x[k], y[0], rtol=1e-5)


@pytest.mark.parametrize("name", ["uw_so", "cov", "slaw that forgets"])
def test_forty_losses_in_any_order(name):
    losses = example_run(count=40, seed=3)[0]
    order = np.random.default_rng(0).permutation(40)
    make = CASES[name][0]
    oracle = {
        "uw_so": lambda x: oracles.uw_so(x, 20.0),
        "cov": oracles.cov,
        "slaw that forgets": lambda x: oracles.slaw(x, 0.8),
    }[name]
    weights, _ = run(make(), losses)
    np.testing.assert_allclose(weights, oracle(losses), rtol=1e-3, atol=1e-9)
    moved, _ = run(make(), losses[:, order])
    np.testing.assert_allclose(moved, weights[:, order], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("make", [uw_so, cov, slaw])
def test_a_bad_batch_between_others_leaves_no_trace(make):
    spoilt = np.insert(LOSSES, 3, [1.0, np.nan, 1.0, 1.0], axis=0)
    weights, state = run(make(), spoilt)
    expected, _ = run(make(), LOSSES)
    np.testing.assert_allclose(np.delete(weights, 3, 0), expected, rtol=1e-6)
    np.testing.assert_array_equal(weights[3], weights[2])
    assert (state.num_updates, state.num_skipped) == (T, 1)


@pytest.mark.parametrize("make", [uw_so, cov, slaw])
def test_losses_in_bfloat16_are_weighed_in_float32(make):
    narrow = jnp.asarray(LOSSES, jnp.bfloat16)
    weighting = make()
    state = weighting.init(list(narrow[0]))
    update = jax.jit(lambda x, state: weighting.update(list(x), state))
    for losses in narrow[:5]:
        weights, state = update(losses, state)
    assert all(w.dtype == jnp.float32 for w in weights)
    expected, _ = run(make(), narrow[:5].astype(jnp.float32))
    np.testing.assert_allclose(weights, expected[-1], rtol=1e-6)


# FAMO.


compiled_famo = jax.jit(famo().update)


@given(
    st.lists(
        st.lists(st.floats(0, 2.0**50, width=32), min_size=3, max_size=3),
        min_size=1,
        max_size=4,
    )
)
@settings(deadline=None, max_examples=50)
def test_famo_weights_sum_to_one(losses):
    state = famo().init([0.0] * 3)
    for values in losses:
        weights, state = compiled_famo(values, state)
        np.testing.assert_allclose(sum(weights), 1, rtol=1e-6)
        assert all(weight >= 0 for weight in weights)
    assert state.num_skipped == 0


def quadratic(x):
    centres = jnp.asarray([[1.0, 0.0], [-1.0, 2.0], [0.0, -3.0]], x.dtype)
    return list(jnp.sum((x[None] - centres) ** 2, axis=-1) + 0.1)


def train(weighting, observe, steps=25):
    @jax.jit
    def step(state, x):
        losses, pullback = jax.vjp(quadratic, x)
        weights, state = weighting.update(losses, state)
        x = x - 0.05 * pullback(weights)[0]
        if observe:
            state = weighting.observe_step(quadratic(x), state)
        return state, x, weights

    state, x, history = weighting.init([0.0] * 3), jnp.zeros(2), []
    for _ in range(steps):
        state, x, weights = step(state, x)
        history.append(weights)
    return np.array(history)


def test_both_forms_of_famo_coincide_if_the_batch_never_changes():
    with jax.enable_x64(True):
        free = train(famo(gamma=0.1), observe=False)
        exact = train(famo(gamma=0.1, exact=True), observe=True)
        unobserved = train(famo(gamma=0.1, exact=True), observe=False)
    np.testing.assert_allclose(free, exact, rtol=1e-13)
    assert np.abs(free - unobserved)[5:].max() > 1e-3
    assert famo().observe_step is None


def test_exact_famo_learns_once_per_update_and_never_from_a_bad_batch():
    weighting = famo(exact=True)
    observe = weighting.observe_step
    assert observe is not None
    before = weighting.init([1.0, 1.0])
    assert not np.any(observe([0.5, 1.0], before).inner.task_logits)

    _, state = weighting.update([1.0, 1.0], before)
    bad = observe([jnp.nan, 1.0], state)
    np.testing.assert_array_equal(bad.inner.task_logits, 0)
    state = observe([0.5, 1.0], state)
    np.testing.assert_allclose(state.inner.task_logits, [-0.025, 0.025], rtol=1e-4)
    again = observe([0.1, 1.0], state)
    np.testing.assert_array_equal(again.inner.task_logits, state.inner.task_logits)

    # The losses after a step belong to those of the same batch, or to none.
    _, held = weighting.update([jnp.nan, 1.0], state)
    held = observe([0.1, 1.0], held)
    np.testing.assert_array_equal(held.inner.task_logits, state.inner.task_logits)


def test_famo_holds_what_is_below_a_bound():
    weighting = famo(lower_bounds={"depth": -2.0, "camera": 0.0})
    weights, state = weighting.update(
        {"depth": -1.0, "camera": 0.0}, weighting.init({"depth": 0.0, "camera": 0.0})
    )
    np.testing.assert_allclose(weights["depth"] + weights["camera"], 1, rtol=1e-6)
    # Inside jit, that is: outside, it is an error.
    held, after = jax.jit(weighting.update)({"depth": -2.1, "camera": 0.5}, state)
    assert held == weights
    assert (after.num_updates, after.num_skipped) == (1, 1)
    np.testing.assert_array_equal(after.inner.log_gaps, state.inner.log_gaps)


def test_famo_accepts_a_schedule():
    schedule, _ = run(famo(learning_rate=optax.constant_schedule(0.1)), LOSSES)
    rate, _ = run(famo(learning_rate=0.1), LOSSES)
    np.testing.assert_array_equal(schedule, rate)


# Gradient statistics.


def test_gradnorm_steps_on_the_gradient_of_its_objective():
    def objective(w, losses, first, norms):
        weighted = jnp.abs(w) * norms
        rates = losses / first / jnp.mean(losses / first)
        target = jax.lax.stop_gradient(jnp.mean(weighted) * rates**1.5)
        return jnp.sum(jnp.abs(weighted - target))

    with jax.enable_x64(True):
        weighting = gradnorm(optimizer=optax.sgd(0.01))
        losses, norms = jnp.array(LOSSES), jnp.array([0.5, 2.0, 3.0, 1.0])
        state = weighting.init(list(losses[0]))
        w = jnp.ones(K)
        for t in range(25):
            weights, state = weighting.update(list(losses[t]), state, norms=norms)
            np.testing.assert_allclose(weights, w, rtol=1e-12)
            w = w - 0.01 * jax.grad(objective)(w, losses[t], losses[0], norms)
            w = K * w / jnp.sum(jnp.abs(w))
            np.testing.assert_allclose(state.inner.task_weights, w, rtol=1e-12)


def test_gradnorm_weights_sum_to_k_and_are_never_negative():
    weights, _ = run(gradnorm(optimizer=optax.sgd(0.3)), LOSSES, norms=LARGE)
    np.testing.assert_allclose(weights.sum(1), K, rtol=1e-6)
    assert np.all(weights >= 0)


@pytest.mark.parametrize("size", [1.0, 1e-12])
def test_the_size_of_all_gradients_makes_no_difference_to_gradnorm(size):
    norms = size * np.broadcast_to([3.0, 1.0], (300, 2))
    weights, _ = run(gradnorm(), np.ones((300, 2)), norms=norms)
    np.testing.assert_allclose(weights[-1], [0.5, 1.5], atol=1e-3)


def test_gradnorm_with_alpha_zero_makes_the_norms_equal():
    norms = np.broadcast_to([1.0, 2.0, 4.0], (2000, 3))
    tx = optax.sgd(optax.linear_schedule(0.01, 0.0, 2000))
    weights, _ = run(gradnorm(alpha=0.0, optimizer=tx), np.ones((2000, 3)), norms=norms)
    np.testing.assert_allclose(weights[-1], 3 * np.array([4, 2, 1]) / 7, atol=1e-3)


def test_balance_by_the_primary_gradient():
    norms = jnp.array([2.0, 0.01, 300.0])
    weighting = grad_norm_balance(0, share=0.1, decay=0.0, eps=1e-12)
    losses = [1.0, 1.0, 1.0]
    weights, state = weighting.update(losses, weighting.init(losses), norms=norms)
    np.testing.assert_allclose(jnp.stack(weights) * norms, [2.0, 0.2, 0.2], rtol=1e-5)
    # Without a gradient of the primary loss nothing is learned, nor without the loss.
    flat = norms.at[0].set(0.0)
    _, held = weighting.update(losses, state, norms=flat)
    np.testing.assert_array_equal(
        held.inner.average_weights, state.inner.average_weights
    )
    absent = [False, True, True]
    _, held = weighting.update(losses, state, norms=5 * norms, present=absent)
    np.testing.assert_array_equal(
        held.inner.average_weights, state.inner.average_weights
    )


def test_balance_with_a_share_of_each_loss():
    norms = {"p": 2.0, "a": 0.01, "b": 300.0}
    losses = dict.fromkeys(norms, 1.0)
    share = {"p": 7.0, "a": 0.1, "b": 3.0}  # That of the primary loss is not looked at.
    weighting = grad_norm_balance("p", share, decay=0.0, eps=1e-12)
    vector = jnp.stack(jax.tree.leaves(norms))
    weights, _ = weighting.update(losses, weighting.init(losses), norms=vector)
    lengths = {name: float(weights[name]) * norm for name, norm in norms.items()}
    assert lengths == pytest.approx({"p": 2.0, "a": 0.2, "b": 6.0}, rel=1e-5)


def test_balance_by_average_norms():
    weighting = grad_norm_balance("p", 0.5, decay=0.99, average="norms")
    losses = {"a": 1.0, "b": 1.0, "p": 1.0}
    state = weighting.init(losses)
    with_b = {"present": {"a": True, "b": True, "p": True}}
    without_b = {"present": {"a": True, "b": False, "p": True}}
    # A gradient of almost 0 at the start makes no large weight, b is seen but twice.
    for norms, present in [
        ([1e-6, 0.0, 2.0], without_b),
        ([3.0, 1.0, 4.0], with_b),
        ([6.0, 3.0, 6.0], with_b),
    ]:
        norms = jnp.array(norms)
        weights, state = weighting.update(losses, state, norms=norms, **present)
    np.testing.assert_allclose(weights["a"], 0.5 * 4 / 3, rtol=1e-4)
    np.testing.assert_allclose(weights["b"], 0.5 * 4 / 2, rtol=1e-4)
    assert weights["p"] == 1.0
    np.testing.assert_array_equal(state.inner.num_seen, [3, 2, 3])


def test_a_loss_whose_gradient_was_never_seen_weighs_one():
    weighting = grad_norm_balance("p", 7.0, average="norms")
    losses = {"a": 1.0, "p": 1.0}
    state = weighting.init(losses)
    for norms in ([0.0, 2.0], [0.0, 3.0]):
        weights, state = weighting.update(losses, state, norms=jnp.array(norms))
    assert weights == {"a": 1.0, "p": 1.0}
    weights, _ = weighting.update(losses, state, norms=jnp.array([0.0, 0.0]))
    assert weights == {"a": 1.0, "p": 1.0}


def test_calibrated_weights_are_ratios_of_mean_norms_of_the_first_steps():
    steps, warmup = 1000, 20
    norms = np.abs(np.random.default_rng(0).normal(1.0, 0.5, (50, 3))) * [1, 100, 0.01]
    shares = {"p": 5.0, "a": 0.1, "b": 2.0}  # In the order of the tree: a, b, p.
    losses = dict.fromkeys(shares, 1.0)
    weighting = calibrated("p", steps, share=shares)
    state = weighting.init(losses)
    for row in norms:
        weights, state = weighting.update(losses, state, norms=jnp.array(row))
    mean = norms[:warmup].mean(0)
    expected = [0.1 * mean[2] / mean[0], 2.0 * mean[2] / mean[1], 1.0]
    np.testing.assert_allclose(jax.tree.leaves(weights), expected, rtol=1e-4)


@pytest.mark.parametrize(("steps", "warmup"), [(1, 10), (549, 10), (550, 11)])
def test_calibration_takes_two_per_cent_of_the_steps_and_ten_at_least(steps, warmup):
    weighting = calibrated("p", steps)
    state = weighting.init({"a": 1.0, "p": 1.0})
    due = [weighting.due(state._replace(step=step)) for step in (warmup - 1, warmup)]
    assert due == [True, False]


@pytest.mark.parametrize(
    ("steps", "share", "error", "message"),
    [
        (0, 1.0, ValueError, "steps must be positive, got 0"),
        (10.5, 1.0, TypeError, "steps must be an integer"),
        (10, 0.0, ValueError, "share must be positive"),
    ],
)
def test_calibrated_says_what_is_wrong(steps, share, error, message):
    with pytest.raises(error, match=message):
        calibrated("p", steps, share=share)


def test_grad_norm_balance_makes_all_gradients_equally_long():
    weights, _ = run(grad_norm_balance(decay=0.0, eps=1e-12), LOSSES, norms=LARGE)
    np.testing.assert_allclose(
        weights * LARGE, np.broadcast_to(LARGE.mean(1)[:, None], LARGE.shape), rtol=1e-5
    )


@pytest.mark.parametrize("average", ["weights", "norms"])
def test_norms_are_in_the_ratios_of_the_preference(average):
    ratios = np.array([10.0, 1.0, 4.0, 2.0])
    weighting = grad_norm_balance(
        preference=list(ratios), decay=0.0, average=average, eps=1e-12
    )
    weights, _ = run(weighting, LOSSES, norms=LARGE)
    lengths = LARGE.mean(1, keepdims=True) * ratios / ratios.mean()
    np.testing.assert_allclose(weights * LARGE, lengths, rtol=1e-5)


def test_gradnorm_at_equal_rates_keeps_the_ratios_of_the_preference():
    norms = np.broadcast_to([1.0, 2.0, 4.0], (2000, 3))
    tx = optax.sgd(optax.linear_schedule(0.01, 0.0, 2000))
    weighting = gradnorm(preference=[4.0, 2.0, 1.0], optimizer=tx)
    weights, _ = run(weighting, np.ones((2000, 3)), norms=norms)
    lengths = (weights * norms)[-1]
    np.testing.assert_allclose(lengths / lengths[2], [4, 2, 1], rtol=3e-3)


@pytest.mark.parametrize(
    "make",
    [
        gradnorm,
        grad_norm_balance,
        lambda **p: grad_norm_balance(average="norms", **p),
        encodec_balancer,
    ],
)
def test_equal_preferences_change_no_bit(make):
    plain, _ = run(make(), LOSSES, norms=LARGE)
    for equal in (0.1, [7.0] * K):
        found, _ = run(make(preference=equal), LOSSES, norms=LARGE)
        np.testing.assert_array_equal(found, plain)


def test_the_adaptive_weight_of_vqgan_is_a_share_without_memory():
    """Up to its 1e-4, which is absolute there, and relative to the first norm here."""
    rng = np.random.default_rng(0)
    norms = np.exp(rng.normal(0, 3, size=(40, 2)))
    for factor in (1.0, 0.3):
        expected = oracles.vqgan(norms[:, 0], norms[:, 1], factor)
        weighting = grad_norm_balance(0, factor, decay=0.0, eps=1e-4)
        weights, _ = run(weighting, np.ones((40, 2)), norms=norms)
        gap = 1e-4 * np.abs(1 - factor * norms[:, 0]) / norms[:, 1]
        assert (np.abs(weights[:, 1] / expected - 1) <= 1.01 * gap + 1e-6).all()
        assert np.median(gap) < 1e-3
        np.testing.assert_array_equal(weights[:, 0], 1)
    # Of an adversarial loss without a gradient both have the same largest weight.
    weights, _ = run(
        grad_norm_balance(0, decay=0.0, eps=1e-4), np.ones((1, 2)), norms=[[2.0, 0.0]]
    )
    np.testing.assert_allclose(weights[0, 1], oracles.vqgan(2.0, 0.0), rtol=1e-5)


def test_norms_of_a_batch_are_those_of_its_examples_where_these_are_equal():
    """The balancer of EnCodec takes the mean of the norms of the examples."""
    rng = np.random.default_rng(1)
    unit = rng.normal(size=(16, 5, 2))  # examples, entries, losses
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    gradients = unit * [0.01, 3.0]
    batch = np.sqrt((gradients**2).sum((0, 1)))
    mean = np.linalg.norm(gradients, axis=1).mean(0)
    expected = oracles.encodec_balancer(mean[None], np.ones(2))[0]
    found, _ = run(encodec_balancer(total_norm=4.0), np.ones((1, 2)), norms=batch[None])
    np.testing.assert_allclose(found[0], expected, rtol=1e-6)


def test_encodec_balancer_at_the_output_is_the_backward_pass_of_its_authors():
    parts = {"l1": 1.0, "l2": 3.0}
    balancer = encodec_balancer(preference=parts, total_norm=2.0, decay=0.9)
    decoder = lambda params, z, target: jnp.tanh(z @ params)

    def losses_of(params, x, z, target):
        gap = x - target
        return {"l1": jnp.mean(jnp.abs(gap)), "l2": 100 * jnp.mean(gap**2)}

    with jax.enable_x64(True):
        at_output = yoto.of_representation(decoder)
        step = jax.jit(yoto.value_and_grad(losses_of, balancer, gradients=at_output))
        rng = np.random.default_rng(0)
        params, norms = jnp.asarray(rng.normal(size=(3, 4))), []
        state = balancer.init(dict.fromkeys(parts, jnp.asarray(1.0)))
        for _ in range(3):
            z, target = rng.normal(size=(8, 3)), rng.normal(size=(8, 4))
            _, grads, state = step(params, state, z, target)
            x, backward = jax.vjp(lambda params, z=z: decoder(params, z, None), params)
            rows = jax.jacrev(lambda x, *z: losses_of(params, x, *z))(x, z, target)
            norms.append([np.linalg.norm(rows[name]) for name in parts])
            scales = oracles.encodec_balancer(np.array(norms), np.array([1, 3]), 2, 0.9)
            out_grad = scales[-1] @ np.stack([rows[n].ravel() for n in parts])
            expected = backward(jnp.asarray(out_grad.reshape(8, 4)))[0]
            np.testing.assert_allclose(grads, expected, rtol=1e-12)


def test_encodec_balancer_averages_over_the_batches_with_a_loss():
    weighting = encodec_balancer(preference={"a": 1.0, "b": 3.0}, decay=0.5)
    losses = {"a": 1.0, "b": 1.0}
    state = weighting.init(losses)
    for norms, there in (([1.0, 2.0], True), ([4.0, 9.0], False), ([1.0, 5.0], True)):
        present = {"a": True, "b": there}
        norms = jnp.array(norms)
        weights, state = weighting.update(losses, state, norms=norms, present=present)
        if not there:
            np.testing.assert_allclose(weights["a"], 1 / 3)  # all of the total norm
    np.testing.assert_allclose(weights["a"], 0.25 / (0.25 + 2 + 1) * 1.75, rtol=1e-6)
    np.testing.assert_allclose(weights["b"], 0.75 / 4, rtol=1e-6)
    np.testing.assert_array_equal(state.inner.num_seen, [3, 2])


def test_rates_of_losses_do_not_see_their_units():
    """So that a factor in front of a loss is a preference."""
    for make in (dwa, softadapt, relobralo):
        weights, _ = run(make(), LOSSES)
        scaled, _ = run(make(), LOSSES * np.array([8.0, 1.0, 0.5, 3.0]))
        np.testing.assert_allclose(scaled, weights, rtol=1e-5)


def test_the_reference_of_lr_annealing_keeps_its_weight():
    weighting = lr_annealing("residual")
    losses = {"boundary": 1.0, "residual": 2.0}
    state = weighting.init(losses)
    for size in (1.0, 5.0, 0.0):
        weights, state = weighting.update(
            losses,
            state,
            max_abs={"boundary": 1.0, "residual": size},
            mean_abs=jnp.array([0.5, 0.1]),
        )
        assert weights["residual"] == pytest.approx(1.0)
    # 1 after 0.9 + 0.1 * 2, then 0.1 * 10, then 0: no pull from the reference.
    assert weights["boundary"] == pytest.approx(((0.9 + 0.2) * 0.9 + 1.0) * 0.9)
    with pytest.raises(ValueError, match="reference 'wall' is unknown"):
        lr_annealing("wall").init(losses)
    with pytest.raises(TypeError, match="reference must name exactly one loss"):
        lr_annealing(None).init(losses)


def test_metabalance_between_plain_gradients_and_equal_ones():
    plain, _ = run(metabalance(1, relax=0.0), LOSSES, norms=LARGE)
    np.testing.assert_array_equal(plain, 1)
    equal, _ = run(metabalance(1, relax=1.0, decay=0.0), LOSSES, norms=LARGE)
    lengths = np.broadcast_to(LARGE[:, [1]], LARGE.shape)
    np.testing.assert_allclose(equal * LARGE, lengths, rtol=1e-6)
    half, _ = run(metabalance(1, relax=0.5, decay=0.0), LOSSES, norms=LARGE)
    np.testing.assert_allclose(half, (equal + 1) / 2, rtol=1e-6)


def test_metabalance_balances_nothing_before_the_primary_loss_has_been_there():
    weighting = metabalance("a", relax=1.0)
    losses = {"a": 1.0, "b": 1.0}
    state = weighting.init(losses)
    expected = [(False, 0.0, 1.0), (False, 0.0, 1.0), (True, 1.0, 2.0)]
    for there, a, b in expected:
        weights, state = weighting.update(
            losses,
            state,
            norms=jnp.array([4.0, 2.0]),
            present={"a": there, "b": True},
        )
        np.testing.assert_allclose([weights["a"], weights["b"]], [a, b], rtol=1e-6)


def test_metabalance_without_the_primary_loss_holds_its_means():
    weighting = metabalance("a", relax=0.5, decay=0.5)
    losses = {"a": 1.0, "b": 1.0, "c": 1.0}
    state = weighting.init(losses)
    for norms, there in (([4.0, 2.0, 0.0], True), ([9.0, 1.0, 0.0], False)):
        weights, state = weighting.update(
            losses,
            state,
            norms=jnp.array(norms),
            present=losses | {"a": there, "b": True, "c": True},
        )
    mean = (0.25 * 2 + 0.5 * 1) / 0.75  # of b, in the second batch
    np.testing.assert_allclose(weights["b"], 0.5 * 4 / mean + 0.5, rtol=1e-6)
    assert (weights["a"], weights["c"]) == (0, 1)  # c has no gradient to balance
    np.testing.assert_array_equal(state.inner.num_seen, [1, 2, 2])


def test_metabalance_of_every_tensor_is_the_authors_step():
    """A weighting, and its means, for each array: ``optax.partition``."""
    rng = np.random.default_rng(0)
    params = {"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros(2)}
    rows = {k: rng.normal(size=(5, 3, *x.shape)) for k, x in params.items()}
    rows = {k: x * np.exp(rng.normal(size=(5, 3) + (1,) * (x.ndim - 2)))
            for k, x in rows.items()}  # fmt: skip
    losses = {"a": 0.0, "b": 0.0, "main": 0.0}
    each = {name: yoto.aggregate(metabalance("main"), losses) for name in params}
    tx = optax.partition(each, {name: name for name in params})
    state, update = tx.init(params), jax.jit(tx.update)
    for step in range(5):
        found, state = update({k: jnp.float32(x[step]) for k, x in rows.items()}, state)
    for name, x in rows.items():
        norms = np.sqrt((x.reshape(5, 3, -1) ** 2).sum(2))
        weights = oracles.metabalance(norms, 2)[-1]
        np.testing.assert_allclose(
            found[name], np.tensordot(weights, x[-1], 1), rtol=1e-5
        )


GRADIENT_METHODS = {
    "gradnorm": (gradnorm, ["norms"], np.inf),
    "grad_norm_balance": (lambda: grad_norm_balance(eps=1e-4), ["norms"], 1e4),
    "lr_annealing": (
        lambda: lr_annealing(0, eps=1e-4),
        ["max_abs", "mean_abs"],
        1e4,
    ),
    "metabalance": (lambda: metabalance(0), ["norms"], np.inf),
    "inverse_dirichlet": (lambda: inverse_dirichlet(eps=1e-4), ["std"], 1e4),
    "ntk": (lambda: ntk(eps=1e-4), ["ntk_diagonal"], 1e4),
    "ntk_surrogate": (lambda: ntk_surrogate(eps=1e-4), ["norms"], 1e4),
}


@pytest.mark.parametrize("name", GRADIENT_METHODS)
@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e15])
@pytest.mark.parametrize("sizes", [[0, 1, 2], [0, 0, 0], [2, 0, 1], [5]])
def test_zero_gradients_give_finite_weights(name, scale, sizes):
    make, needs, limit = GRADIENT_METHODS[name]
    values = np.broadcast_to(scale * np.array(sizes, float), (30, len(sizes)))
    weights, state = run(make(), np.ones(values.shape), **dict.fromkeys(needs, values))
    assert np.all(np.isfinite(weights))
    assert np.all(weights >= 0)
    assert weights.max() <= limit * (1 + 1e-5)
    assert state.num_skipped == 0
    if not any(sizes):
        np.testing.assert_allclose(weights, 1, rtol=1e-6)


def test_the_statistics_are_asked_for_by_name():
    for name, (make, needs, _) in GRADIENT_METHODS.items():
        weighting = make()
        with pytest.raises(ValueError, match=f"needs {needs[0]}="):
            weighting.update([1.0, 1.0], weighting.init([1.0, 1.0]))
        assert set(needs) <= set(weighting.needs), name


# The diagonal of the tangent kernel.


def network(params, point):
    x, t = point["x"], point["t"]
    hidden = jnp.tanh(params["w"] @ jnp.stack([x, t]) + params["b"])
    return jnp.dot(params["v"], hidden) ** 2


def network_inputs(dtype):
    keys = jax.random.split(jax.random.key(0), 5)
    params = {
        "w": jax.random.normal(keys[0], (6, 2), dtype),
        "b": jax.random.normal(keys[1], (6,), dtype),
        "v": jax.random.normal(keys[2], (6,), dtype),
    }
    points = {
        k: jax.random.normal(keys[3 + i], (11,), dtype) for i, k in enumerate("xt")
    }
    return params, points


@pytest.mark.parametrize("batch_size", [None, 1, 4, 11, 100])
def test_ntk_diagonal_is_the_trace_of_the_kernel_over_the_points(batch_size):
    with jax.enable_x64(True):
        params, points = network_inputs(jnp.float64)
        flat, unravel = jax.flatten_util.ravel_pytree(params)
        jacobian = jax.jacfwd(
            lambda p: jax.vmap(lambda point: network(unravel(p), point))(points)
        )(flat)
        kernel = jacobian @ jacobian.T
        measured = jax.jit(
            lambda params, points: ntk_diagonal(
                network, params, points, batch_size=batch_size
            )
        )(params, points)
    assert measured.dtype == jnp.float64
    np.testing.assert_allclose(measured, np.trace(kernel) / 11, rtol=1e-13)


def test_ntk_diagonal_accumulates_in_float32():
    # 3000 squares of 0.1 in bfloat16 would stop growing at 2.
    params = jnp.full((3000,), 1.0, jnp.bfloat16)
    points = jnp.full((2,), 0.1, jnp.bfloat16)
    measured = ntk_diagonal(lambda p, x: jnp.sum(p * x), params, points)
    assert measured.dtype == jnp.float32
    np.testing.assert_allclose(measured, 3000 * float(points[0]) ** 2, rtol=1e-6)


def test_ntk_diagonal_refuses_points_without_one_leading_axis():
    for points in ({"x": jnp.ones(3), "t": jnp.ones(4)}, jnp.ones(0), jnp.ones(()), {}):
        with pytest.raises(ValueError, match="points must have one leading axis"):
            ntk_diagonal(lambda p, x: p, jnp.float32(1.0), points)


def test_ntk_weights_from_the_kernel_balance_the_terms():
    params, points = network_inputs(jnp.float32)
    diagonal = {
        "value": ntk_diagonal(network, params, points),
        "tenfold": ntk_diagonal(lambda p, x: 10 * network(p, x), params, points),
    }
    weighting = ntk(decay=0.0)
    losses = {"value": 1.0, "tenfold": 1.0}
    weights, _ = weighting.update(losses, weighting.init(losses), ntk_diagonal=diagonal)
    np.testing.assert_allclose(weights["value"] / weights["tenfold"], 100, rtol=1e-5)


# Losses that are not positive, edges, errors.

POSITIVE = {
    "scale_invariant": scale_invariant,
    "geometric": geometric,
    "uncertainty": uncertainty,
    "imtl_l": imtl_l,
    "uw_so": uw_so,
    "cov": cov,
    "dwa": dwa,
    "softadapt": softadapt,
    "softadapt, loss-weighted": lambda: softadapt(
        form="difference", loss_weighted=True
    ),
    "relobralo": relobralo,
    "stch": lambda: stch(form="log"),
    "gradnorm": gradnorm,
    "ntk_surrogate": ntk_surrogate,
}
ANY_SIGN = {
    "random": random,
    "softadapt": lambda: softadapt(form="difference"),
    "slaw": slaw,
    "stch": stch,
    "famo": lambda: famo(lower_bounds=-100.0),
    "grad_norm_balance": grad_norm_balance,
    "lr_annealing": lambda: lr_annealing("depth"),
    "metabalance": lambda: metabalance("depth"),
    "inverse_dirichlet": inverse_dirichlet,
    "ntk": ntk,
}


def ones_for(weighting, count):
    return {name: jnp.ones(count) for name in weighting.needs if name != "losses"}


@pytest.mark.parametrize("name", POSITIVE)
@pytest.mark.parametrize("value", [0.0, -1.0])
def test_a_loss_that_is_not_positive_is_an_error_or_held(name, value):
    weighting = POSITIVE[name]()
    good, bad = {"depth": 1.0, "camera": 2.0}, {"depth": 1.0, "camera": value}
    statistics = ones_for(weighting, 2)
    weights, state = weighting.update(good, weighting.init(good), **statistics)
    with pytest.raises(ValueError, match="loss 'camera' is"):
        weighting.update(bad, state, **statistics)

    held, after = jax.jit(weighting.update)(bad, state, **statistics)
    assert held == weights
    assert after.num_skipped == 1
    for new, old in zip(
        jax.tree.leaves(after.inner), jax.tree.leaves(state.inner), strict=True
    ):
        assert jnp.all(new == old)

    # An effect would keep compiled calls from their fast path, and from jax.export.
    assert not jax.make_jaxpr(weighting.update)(bad, state, **statistics).effects


def test_causal_weights_need_losses_that_are_not_negative():
    weighting = causal()
    state = weighting.init([0.0] * 3)
    with pytest.raises(ValueError, match="not negative, loss '2' is -1"):
        weighting.update([0.0, 1.0, -1.0], state)
    for bad in ([0.0, 1.0, -1.0], [-1.0, 1.0, 1.0]):
        weights, after = jax.jit(weighting.update)(bad, state)
        assert int(after.num_skipped) == 1
        np.testing.assert_allclose(weights, 1 / 3, rtol=1e-6)
    with pytest.raises(ValueError, match="positive"):
        yoto.weightings.log(weighting)


@pytest.mark.parametrize(("count", "size"), [(3, 1e7), (3, 1e12), (5, 1e12)])
def test_stch_of_losses_far_above_the_smoothing(count, size):
    weighting = stch(smoothing=1e-3)
    losses = size * np.random.default_rng(0).uniform(0.1, 2, (50, count))
    state = weighting.init([0.0] * count)
    states, weights = jax.lax.scan(
        lambda state, x: weighting.update(list(x), state)[::-1],
        state,
        jnp.asarray(losses, jnp.float32),
    )
    assert int(states.num_skipped) == 0
    expected = (losses == losses.max(1, keepdims=True)) / count
    np.testing.assert_allclose(np.stack(weights, 1), expected, rtol=1e-6)


def test_what_has_no_memory_forgets_a_norm_a_billion_times_as_large():
    for weighting, expected in [
        (encodec_balancer(decay=0.0), [0.5, 0.5]),
        (metabalance(0, decay=0.0), [1.0, 1.0]),
    ]:
        state = weighting.init([0.0, 0.0])
        for norms in ([1.0, 1e9], [1e9, 1.0], [1.0, 1.0]):
            seen = {"norms": jnp.array(norms)}
            weights, state = jax.jit(weighting.update)([0.0, 0.0], state, **seen)
        np.testing.assert_allclose(weights, expected, rtol=1e-6)


def test_an_injected_learning_rate_is_set_for_all_losses():
    optimizer = optax.inject_hyperparams(yoto.adamw)(learning_rate=0.1)
    weighting = yoto.weightings.yoto("a", optimizer=optimizer)
    losses = {"a": 1.0, "b": 2.0, "c": 3.0}
    state = weighting.init(losses)
    hyperparams = state.inner.opt_state.hyperparams
    for rate in (jnp.float32(0), jnp.zeros_like(hyperparams["learning_rate"])):
        hyperparams["learning_rate"] = rate
        weights, after = jax.jit(weighting.update)(losses, state)
        moved, after = jax.jit(weighting.update)(losses, after)
        assert int(after.num_updates) == 2
        np.testing.assert_array_equal(*map(jax.tree.leaves, (weights, moved)))


def test_cov_without_memory_skips_nothing():
    weighting = cov(decay=0.0)
    losses = np.exp(0.3 * np.random.default_rng(1).standard_normal((200, 3)))
    state, _ = jax.lax.scan(
        lambda state, x: weighting.update(list(x), state)[::-1],
        weighting.init([0.0] * 3),
        jnp.asarray(losses, jnp.float32),
    )
    assert int(state.num_skipped) == 0


def test_cov_of_millions_of_updates_follows_the_losses():
    state = cov().init([0.0, 0.0])
    late = state.inner._replace(
        loss_means=jnp.ones(2),
        num_seen=jnp.full(2, 10**8, jnp.int32),
        ratio_variances=jnp.full(2, 1e-4),
    )
    _, after = jax.lax.fori_loop(
        0,
        100_000,
        lambda _, both: cov().update([2.0, 1.0], both[1]),
        cov().update([2.0, 1.0], state._replace(inner=late)),
    )
    means = after.inner.loss_means
    np.testing.assert_allclose(means, [2 - np.exp(-1), 1], rtol=0.01)


@pytest.mark.parametrize("average", ["weights", "norms"])
def test_a_batch_without_a_primary_gradient_teaches_nothing(average):
    weighting = grad_norm_balance(0, average=average)
    state = weighting.init([0.0, 0.0])
    look = lambda state, norms: weighting.update(
        [0.0, 0.0], state, norms=jnp.array(norms)
    )
    _, state = look(state, [0.0, 1.0])
    weights, state = look(state, [2.0, 1.0])
    kept, after = look(state, [0.0, 5.0])
    np.testing.assert_array_equal(kept, weights)
    np.testing.assert_array_equal(*map(jax.tree.leaves, (after.inner, state.inner)))
    if average == "norms":
        np.testing.assert_allclose(weights, [1, 2], rtol=1e-4)


@pytest.mark.parametrize("name", ANY_SIGN)
def test_losses_of_any_sign_where_the_method_allows_them(name):
    weighting = ANY_SIGN[name]()
    losses = {"depth": -1.0, "camera": 0.0}
    weights, state = weighting.update(
        losses, weighting.init(losses), **ones_for(weighting, 2)
    )
    assert all(jnp.isfinite(w) and w >= 0 for w in weights.values())
    assert state.num_skipped == 0


@pytest.mark.parametrize("name", POSITIVE)
def test_jumps_over_thirty_orders_of_magnitude_are_survived(name):
    weighting = POSITIVE[name]()
    losses = np.array([[1e-15, 1e15], [1e15, 1e-15], [1e15, 1e15]] * 10)
    statistics = {k: np.ones((30, 2)) for k in weighting.needs if k != "losses"}
    weights, state = run(weighting, losses, **statistics)
    assert np.all(np.isfinite(weights))
    assert state.num_skipped == 0


@pytest.mark.parametrize(
    ("make", "weight"),
    [
        (random, 1.0),
        (scale_invariant, 0.5),
        (geometric, 1.0),
        (dwa, 1.0),
        (softadapt, 1.0),
        (relobralo, 1.0),
        (uw_so, 1.0),
        (cov, 1.0),
        (slaw, 1.0),
        (famo, 1.0),
        (stch, 1.0),
        (lambda: stch(form="log"), 0.5),
        (causal, 1.0),
        (gradnorm, 1.0),
        (lambda: grad_norm_balance(eps=1e-30), 1.0),
        (lambda: lr_annealing(0), 1.0),
        (lambda: metabalance(0), 1.0),
        (inverse_dirichlet, 1.0),
        (ntk, 1.0),
        (ntk_surrogate, 1.0),
    ],
)
def test_a_single_loss_has_the_weight_that_the_convention_gives(make, weight):
    weighting = make()
    statistics = {k: np.full((5, 1), 3.0) for k in weighting.needs if k != "losses"}
    weights, state = run(weighting, np.full((5, 1), 2.0), **statistics)
    np.testing.assert_allclose(weights, weight, rtol=1e-6)
    assert state.num_skipped == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dwa(temperature=0.0), "temperature must be positive, got 0.0"),
        (lambda: dwa(window=0), "window must be positive, got 0"),
        (lambda: gradnorm(alpha=-1.0), "alpha must not be negative, got -1.0"),
        (lambda: softadapt(form="log"), "form must be.*'log'"),
        (lambda: relobralo(alpha=1.1), "alpha must be in .*, got 1.1"),
        (lambda: relobralo(beta=-0.1), "beta must be in .*, got -0.1"),
        (lambda: relobralo(temperature=-1), "temperature must be positive, got -1"),
        (lambda: uw_so(temperature=0), "temperature must be positive, got 0"),
        (lambda: cov(decay=1.0), r"decay must be in \[0, 1\), got 1.0"),
        (lambda: slaw(decay=1.0), r"decay must be in \[0, 1\), got 1.0"),
        (lambda: slaw(eps=0.0), "eps must be positive, got 0.0"),
        (lambda: famo(gamma=-1e-3), "gamma must not be negative, got -0.001"),
        (lambda: stch(smoothing=0), "smoothing must be positive, got 0"),
        (lambda: stch(form="square"), "form must be.*'square'"),
        (lambda: stch(form="log", warmup=-1), "warmup must not be negative, got -1"),
        (lambda: stch(warmup=3), "warmup is for form='log' alone, got 3"),
        (lambda: stch(form="log", preference=[1.0]), "preference is for form='linear'"),
        (lambda: stch(form="log", ideal=[1.0]), "ideal is for form='linear' alone"),
        (lambda: causal(tolerance=-1.0), "tolerance must not be negative, got -1"),
        (lambda: grad_norm_balance(decay=1.0), "decay must be in .*, got 1.0"),
        (lambda: grad_norm_balance(eps=0.0), "eps must be positive, got 0.0"),
        (
            lambda: grad_norm_balance(average="both"),
            "average must be 'weights' or 'norms', got 'both'",
        ),
        (lambda: grad_norm_balance(share=0.1), "name primary"),
        (lambda: grad_norm_balance(share={"a": 1.0}), "name primary"),
        (lambda: grad_norm_balance("a", preference=[1.0, 2.0]), "share is the ratio"),
        (lambda: encodec_balancer(total_norm=0), "total_norm must be positive"),
        (
            lambda: encodec_balancer(preference={"a": -1.0}),
            "preference must be positive",
        ),
        (lambda: gradnorm(preference=[1.0, 0.0]), "preference must be positive"),
        (lambda: grad_norm_balance(preference=0.0), "preference must be positive"),
        (
            lambda: grad_norm_balance("a", {"a": 1.0, "b": 0.0}),
            "share must be positive",
        ),
        (
            lambda: grad_norm_balance(0, jnp.array([1.0, -1.0])),
            "share must be positive",
        ),
        (
            lambda: grad_norm_balance("a", {"b": 1.0}).init({"a": 0.0, "b": 0.0}),
            "share must be one number, or one for each loss",
        ),
        (lambda: lr_annealing(0, statistic="min"), "statistic must be.*'min'"),
        (lambda: metabalance("a", relax=1.5), r"relax must be in \[0, 1\], got 1.5"),
        (lambda: metabalance("a", decay=1.0), "decay must be in .*, got 1.0"),
        (lambda: metabalance("a").init({"b": 1.0}), "primary 'a' is unknown"),
        (lambda: inverse_dirichlet(decay=-0.5), "decay must be in .*, got -0.5"),
        (lambda: inverse_dirichlet(eps=0.0), "eps must be positive, got 0.0"),
        (lambda: ntk(reduction="max"), "reduction must be.*'max'"),
        (lambda: ntk_surrogate(eps=-1), "eps must be positive, got -1"),
    ],
)
def test_arguments_out_of_range_are_refused_with_their_value(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "make",
    [
        lambda values: famo(lower_bounds=values),
        lambda values: stch(preference=values),
        lambda values: gradnorm(preference=values),
        lambda values: grad_norm_balance(preference=values),
        lambda values: grad_norm_balance(preference=values, average="norms"),
        lambda values: encodec_balancer(preference=values),
        lambda values: stch(ideal=values),
        lambda values: uncertainty(initial=values),
    ],
)
def test_a_vector_of_settings_must_fit_the_losses(make):
    weighting = make([1.0, 2.0, 3.0])
    losses = {"depth": 1.0, "label": 1.0}
    with pytest.raises(ValueError, match="one for each loss .'depth', 'label'."):
        weighting.init(losses)
