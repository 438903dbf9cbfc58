import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.oracles import gramian as oracles
from yoto_jax import weightings
from yoto_jax.testing import check_gramian_properties, gramian_properties
from yoto_jax.testing._gramian import sample, weights_on
from yoto_jax.weightings._aligned_mtl import aligned_mtl
from yoto_jax.weightings._cagrad import cagrad
from yoto_jax.weightings._config import config
from yoto_jax.weightings._dual_proj import dual_proj
from yoto_jax.weightings._fair_grad import fair_grad
from yoto_jax.weightings._gradvac import gradvac
from yoto_jax.weightings._imtl_g import imtl_g
from yoto_jax.weightings._mgda import mgda
from yoto_jax.weightings._nash_mtl import nash_mtl
from yoto_jax.weightings._pcd import pcd
from yoto_jax.weightings._upgrad import upgrad

pytestmark = pytest.mark.usefixtures("quick_compilation")

PAIR = np.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
METHODS = {
    name: method.example()
    for name, method in weightings.methods().items()
    if method.needs == ("gramian",) and method.requires is None
}
# TorchJD's constants for the same matrix, and their own derivation for Nash.
GOLDEN = {
    "aligned_mtl": ([0.5591, 0.4083], [0.2133, 0.9673, 0.9673]),
    "config": (None, [0.1588, 2.0706, 2.0706]),
    "dual_proj": ([0.6109, 0.5000], [0.5563, 1.1109, 1.1109]),
    "imtl_g": ([0.5923, 0.4077], [0.0767, 1.0, 1.0]),
    "mgda": ([0.6, 0.4], [0.0, 1.0, 1.0]),
    "pcgrad": ([2.2222, 1.5789], [0.5848, 3.8012, 3.8012]),
    "gradvac": ([2.2222, 1.5789], [0.5848, 3.8012, 3.8012]),
    "upgrad": ([1.1109, 0.7894], [0.2929, 1.9004, 1.9004]),
    "cagrad": ([0.7041, 0.5], [0.1835, 1.2041, 1.2041]),
    "nash_mtl": ([0.4182, 0.2878], [0.0542, 0.7061, 0.7061]),
}


def weights(weighting, jacobian, dtype="float64"):
    return weights_on(weighting, np.repeat(jacobian[None], 8, 0), dtype)[0]


def jacobians(losses, count=6, parameters=12):
    for seed in range(count):
        rng = np.random.default_rng(seed)
        jacobian = rng.normal(size=(losses, parameters)) - 0.3
        yield jacobian * np.exp(rng.normal(size=(losses, 1)))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", GOLDEN)
def test_golden_values(name, dtype):
    expected, direction = GOLDEN[name]
    found = weights(METHODS[name], PAIR, dtype)
    if expected is not None:
        np.testing.assert_allclose(found, expected, atol=6e-5)
    np.testing.assert_allclose(found @ PAIR, direction, atol=6e-5)


def test_closed_forms_for_two_losses():
    nash = nash_mtl(max_norm=None, regularization=0.0)
    for jacobian in jacobians(2):
        g = jacobian @ jacobian.T
        norms = np.sqrt(np.diag(g))
        first = (g[1, 1] - g[0, 1]) / (g[0, 0] + g[1, 1] - 2 * g[0, 1])
        first = np.clip(first, 0, 1)
        np.testing.assert_allclose(
            weights(METHODS["mgda"], jacobian), [first, 1 - first], atol=1e-10
        )
        np.testing.assert_allclose(
            weights(METHODS["pcgrad"], jacobian),
            1 - np.minimum(0, g[0, 1]) / np.diag(g),
        )
        rho = g[0, 1] / norms.prod()
        np.testing.assert_allclose(
            weights(nash, jacobian),
            1 / (norms * np.sqrt(1 + rho)),
            rtol=1e-9,
        )


def test_upgrad_of_two_losses_is_half_of_pcgrad():
    weighting = upgrad(regularization=1e-12)
    for jacobian in jacobians(2):
        np.testing.assert_allclose(
            2 * weights(weighting, jacobian),
            weights(METHODS["pcgrad"], jacobian),
            rtol=1e-8,
        )


def test_fair_grad_with_alpha_1_is_nash_and_the_squared_norm_is_the_count():
    fair, nash = (
        fair_grad(alpha=1.0, regularization=0.0),
        nash_mtl(max_norm=None, regularization=0.0),
    )
    for jacobian in jacobians(4):
        found = weights(nash, jacobian)
        np.testing.assert_allclose(weights(fair, jacobian), found, rtol=1e-9)
        np.testing.assert_allclose(jacobian @ jacobian.T @ found * found, 1, rtol=1e-9)
        np.testing.assert_allclose(((found @ jacobian) ** 2).sum(), 4, rtol=1e-9)


@pytest.mark.parametrize("alpha", [0.5, 2.0])
def test_fair_grad_solves_its_equation(alpha):
    weighting = fair_grad(alpha=alpha, regularization=0.0)
    for jacobian in jacobians(4):
        found = weights(weighting, jacobian)
        gain = jacobian @ jacobian.T @ found
        np.testing.assert_allclose(gain, found ** (-1 / alpha), rtol=1e-8)


def test_cagrad_with_c_0_is_the_mean_and_otherwise_minimises_its_objective():
    mean = cagrad(c=0.0)
    weighting = cagrad(c=0.7)
    for jacobian in jacobians(4):
        np.testing.assert_allclose(weights(mean, jacobian), 0.25)
        found = weights(weighting, jacobian) - 0.25
        value = oracles.cagrad_objective(jacobian, found / found.sum(), 0.7)
        least = oracles.cagrad_minimum(jacobian, 0.7)
        assert value <= least + 1e-6 * (jacobian**2).sum()
        pull = np.linalg.norm(found @ jacobian) / np.linalg.norm(jacobian.mean(0))
        np.testing.assert_allclose(pull, 0.7, rtol=1e-6)


def test_oracles_that_see_the_whole_jacobian():
    half = np.full(4, 0.25)
    for jacobian in jacobians(4):
        check = lambda w, d: np.testing.assert_allclose(w @ jacobian, d, rtol=1e-7)
        check(
            weights(METHODS["aligned_mtl"], jacobian),
            oracles.aligned_mtl(jacobian, half),
        )
        check(weights(METHODS["config"], jacobian), oracles.config(jacobian))
        check(weights(METHODS["imtl_g"], jacobian), oracles.imtl_g(jacobian) @ jacobian)
        check(
            weights(METHODS["upgrad"], jacobian),
            oracles.upgrad(jacobian, half) @ jacobian,
        )
        check(
            weights(METHODS["dual_proj"], jacobian),
            oracles.dual_proj(jacobian, half) @ jacobian,
        )


@pytest.mark.parametrize("make", [upgrad, dual_proj])
def test_preferences_that_differ_are_those_of_the_paper(make):
    preference = np.array([0.1, 0.4, 0.2, 0.3])
    weighting = make(preference=list(preference))
    for jacobian in jacobians(4):
        expected = getattr(oracles, make.__name__)(jacobian, preference)
        found = weights(weighting, jacobian)
        np.testing.assert_allclose(found @ jacobian, expected @ jacobian, rtol=1e-7)
        assert (found >= preference - 1e-12).all()


RATIOS = np.array([10.0, 1.0, 3.0, 0.5])
KEEPING = {  # what is in the ratios of the preference
    "nash_mtl": (
        lambda p: nash_mtl(preference=p, regularization=0.0),
        lambda jacobian, w: w * (jacobian @ (w @ jacobian)),
    ),
    "fair_grad": (
        lambda p: fair_grad(preference=p, regularization=0.0),
        lambda jacobian, w: w * (jacobian @ (w @ jacobian)) ** 2,
    ),
    "imtl_g": (
        lambda p: imtl_g(preference=p),
        lambda jacobian, w: oracles.units(jacobian) @ (w @ jacobian),
    ),
    "config": (
        lambda p: config(preference=p),
        lambda jacobian, w: oracles.units(jacobian) @ (w @ jacobian),
    ),
}


@pytest.mark.parametrize("name", KEEPING)
def test_what_is_equalised_is_in_the_ratios_of_the_preference(name):
    make, kept = KEEPING[name]
    for ratios in (RATIOS, np.geomspace(1, 1000, 4)):
        weighting = make(list(ratios))
        for jacobian in jacobians(4):
            found = kept(jacobian, weights(weighting, jacobian)) / ratios
            np.testing.assert_allclose(found, found[0], rtol=1e-7)


def test_gains_of_mgda_are_in_the_ratios_of_the_preference():
    for normalize in (False, True):
        weighting = mgda(preference=list(RATIOS), normalize=normalize)
        several = 0
        for jacobian in jacobians(4):
            w = weights(weighting, jacobian)
            np.testing.assert_allclose(w.sum(), 1)
            rows = oracles.units(jacobian) if normalize else jacobian
            expected = oracles.mgda(rows / RATIOS[:, None]) / RATIOS
            expected /= np.linalg.norm(jacobian, axis=1) ** normalize
            np.testing.assert_allclose(w, expected / expected.sum(), atol=1e-9)
            gains = rows @ (w @ jacobian) / RATIOS
            np.testing.assert_allclose(gains[w > 0], gains.min(), rtol=1e-6)
            several += (w > 0).sum() > 1
        assert several > 2


def test_preferences_are_those_of_the_authors_code():
    """Direction weights of ConFIG, and the equation of FairGrad with parts of PIVRG."""
    for jacobian in jacobians(4):
        found = weights(config(preference=list(RATIOS)), jacobian) @ jacobian
        np.testing.assert_allclose(found, oracles.config(jacobian, RATIOS), rtol=1e-7)
        scores = np.array([3.0, -12.0, 40.0, 0.0])
        parts = np.exp(scores / max(np.ptp(scores) / np.log(2), 10))
        weighting = fair_grad(preference=list(parts), alpha=2.0, regularization=0.0)
        expected = oracles.pivrg(jacobian, scores)
        np.testing.assert_allclose(weights(weighting, jacobian), expected, rtol=1e-5)


@pytest.mark.parametrize("name", [*KEEPING, "mgda"])
def test_equal_preferences_change_no_bit(name):
    make = weightings.methods()[name].factory
    for dtype in ("float32", "float64"):
        jacobian = next(jacobians(3))
        plain = weights(make(), jacobian, dtype)
        for equal in (0.1, [7.0] * 3):
            found = weights(make(preference=equal), jacobian, dtype)
            np.testing.assert_array_equal(found, plain)


@pytest.mark.parametrize("name", [*KEEPING, "mgda", "upgrad", "dual_proj"])
def test_preferences_that_do_not_fit_are_refused(name):
    make = weightings.methods()[name].factory
    losses = {"energy": 1.0, "stress": 2.0}
    with pytest.raises(ValueError, match="one for each loss .'energy', 'stress'."):
        make(preference=[1.0, 2.0, 3.0]).init(losses)
    for bad in (0.0, [1.0, -1.0], {"energy": 1.0, "stress": float("nan")}):
        with pytest.raises(ValueError, match="preference must be positive"):
            make(preference=bad)


def test_a_preference_counts_among_the_losses_that_are_there():
    jacobian = next(jacobians(3))
    gramian = jnp.asarray(jacobian @ jacobian.T, jnp.float32)
    for name in [*KEEPING, "mgda"]:
        make = weightings.methods()[name].factory
        three = make(preference=[10.0, 5.0, 1.0])
        two = make(preference=[2.0, 0.2])
        seen, _ = three.update(
            [1.0] * 3,
            three.init([1.0] * 3),
            gramian=gramian,
            present=[True, False, True],
        )
        found, _ = two.update([1.0] * 2, two.init([1.0] * 2), gramian=gramian[::2, ::2])
        np.testing.assert_allclose(seen[::2], found, rtol=1e-4)
        assert seen[1] == 0


@pytest.mark.parametrize("count", [1, 2, 3, 10, 40])
def test_pcd_is_the_closest_direction_that_meets_its_demands(count):
    tau = np.linspace(0, 0.5, count)
    weighting = pcd(count - 1, list(tau), decay=0.0)
    for jacobian in jacobians(count, parameters=count + 3):
        squares = (jacobian**2).sum(1)
        expected = oracles.pcd(jacobian, squares, count - 1, tau)
        for dtype, rtol in (("float64", 1e-9), ("float32", 1e-4)):
            found = weights(weighting, jacobian, dtype) @ jacobian
            error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
            assert error < rtol


@pytest.mark.parametrize("count", range(3, 11))
def test_pcd_satisfies_the_conditions_of_karush_kuhn_and_tucker(count):
    weighting = pcd(0, 0.2, decay=0.0, eps=0.0)
    helped = 0
    for jacobian in jacobians(count, parameters=count + 3):
        w = weights(weighting, jacobian)
        norms, unit = np.linalg.norm(jacobian, axis=1), oracles.units(jacobian)
        mu = w * norms / (w[0] * norms[0])
        surplus = unit @ (mu @ unit) - 0.2
        assert mu.min() >= 0
        assert surplus[1:].min() > -1e-9
        np.testing.assert_allclose(mu[1:] * surplus[1:], 0, atol=1e-8)
        np.testing.assert_allclose(np.linalg.norm(w @ jacobian), norms[0])
        helped += (mu[1:] > 0).any()
    assert helped


def test_pcd_of_two_losses_has_a_closed_form():
    for tau in (0.0, 0.3, 1.0):
        weighting = pcd(0, tau, decay=0.0, eps=0.0)
        for jacobian in jacobians(2):
            norms, unit = np.linalg.norm(jacobian, axis=1), oracles.units(jacobian)
            mu = max(0, tau - unit[0] @ unit[1])
            expected = np.array([1, mu]) / np.linalg.norm(unit[0] + mu * unit[1])
            expected *= norms[0] / norms
            np.testing.assert_allclose(
                weights(weighting, jacobian), expected, rtol=1e-9, atol=1e-12
            )


def test_pcd_remembers_norms_of_each_loss():
    weighting = pcd("q", 0.4, decay=0.9)
    with jax.enable_x64(True):
        losses = dict.fromkeys("abq", jnp.asarray(1.0))
        state, update = weighting.init(losses), jax.jit(weighting.update)
        total, fix = np.zeros(3), np.zeros(3)
        for step, jacobian in enumerate(jacobians(3)):
            there = np.array([True, step != 2, True])
            present = dict(zip("abq", there.tolist(), strict=True))
            found, state = update(
                losses, state, gramian=jacobian @ jacobian.T, present=present
            )
            squares = (jacobian**2).sum(1)
            total = np.where(there, 0.9 * total + squares, total)
            fix = np.where(there, 0.9 * fix + 1, fix)
            rows = jacobian[there]
            expected = oracles.pcd(rows, (total / fix)[there], len(rows) - 1, 0.4)
            found = np.array([found[name] for name in "abq"])
            np.testing.assert_allclose(found @ jacobian, expected, rtol=1e-9)
        np.testing.assert_array_equal(state.inner.num_seen, [6, 5, 6])


def test_pcd_drops_demands_that_contradict_each_other():
    weighting = pcd(0, 0.1, decay=0.0)
    for count in (3, 10, 40):
        for seed, jacobian in enumerate(jacobians(count)):
            rng = np.random.default_rng(seed)
            jacobian[-1] = -rng.uniform(0.1, 1, count - 2) @ jacobian[1:-1]
            for dtype in ("float32", "float64"):
                found = weights(weighting, jacobian, dtype)
                np.testing.assert_allclose(found, np.eye(count)[0], rtol=1e-6)


def test_pcd_without_a_primary_gradient_or_a_direction_is_zero():
    weighting = pcd(0, 0.5, decay=0.0)
    opposed = np.array([[1.0, 0.0], [-1.0, 0.0]])
    np.testing.assert_array_equal(weights(pcd(0, 0.0, decay=0.0), opposed), 0)
    np.testing.assert_array_equal(weights(weighting, opposed * [[0], [1]]), 0)
    np.testing.assert_array_equal(weights(weighting, opposed * [[1], [0]]), [1, 0])


def test_pcd_refuses_what_does_not_fit():
    for bad in (-0.1, 1.5, [0.0, 2.0]):
        with pytest.raises(ValueError, match=r"tau must be in \[0, 1\]"):
            pcd(0, bad)
    with pytest.raises(ValueError, match="tau must be one number, or one for each"):
        pcd("a", [0.1, 0.2, 0.3]).init({"a": 1.0, "b": 1.0})
    with pytest.raises(ValueError, match="primary"):
        pcd("c").init({"a": 1.0, "b": 1.0})


@pytest.mark.parametrize(("scale", "of"), [("mean", np.mean), ("median", np.median)])
def test_scale_of_aligned_mtl(scale, of):
    weighting = aligned_mtl(preference=[1.0, 2.0, 3.0, 4.0], scale=scale)
    for jacobian in jacobians(4, count=2, parameters=3):  # one eigenvalue is rounding
        expected = oracles.aligned_mtl(jacobian, np.arange(1.0, 5.0), of)
        found = weights(weighting, jacobian) @ jacobian
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)


def test_equal_cosines_and_equal_projections():
    for jacobian, name in itertools.product(jacobians(4), ("config", "imtl_g")):
        direction = weights(METHODS[name], jacobian) @ jacobian
        projections = oracles.units(jacobian) @ direction
        np.testing.assert_allclose(projections, projections[0], rtol=1e-8)


def test_pcgrad_is_one_of_its_orders_and_every_loss_draws_its_own():
    jacobian = sample("strong", (3, 5, 3), 3)
    possible = np.array(oracles.all_pcgrads(jacobian))
    weighting = METHODS["pcgrad"]
    update = jax.jit(weighting.update)
    with jax.enable_x64(True):
        values = [jnp.asarray(1.0)] * 3
        state, seen = weighting.init(values), set()
        for _ in range(40):
            found, state = update(values, state, gramian=jacobian @ jacobian.T)
            errors = np.abs(possible - np.array(found) @ jacobian).max(1)
            assert errors.min() < 1e-9
            seen.add(int(errors.argmin()))
    assert len(seen) > 3


def test_gradvac_follows_the_paper_over_several_updates():
    weighting = gradvac(decay=0.5)
    update = jax.jit(weighting.update)
    with jax.enable_x64(True):
        values = [jnp.asarray(1.0)] * 2
        state, targets = weighting.init(values), np.zeros((2, 2))
        for jacobian in jacobians(2):
            found, state = update(values, state, gramian=jacobian @ jacobian.T)
            direction, targets = oracles.gradvac_pair(jacobian, targets, 0.5)
            np.testing.assert_allclose(np.array(found) @ jacobian, direction, rtol=1e-7)
            np.testing.assert_allclose(state.inner.cosine_targets, targets, rtol=1e-9)


def test_normalised_mgda_is_mgda_of_normalised_gradients():
    weighting = mgda(normalize=True)
    for jacobian in jacobians(3):
        norms = np.linalg.norm(jacobian, axis=1)
        expected = oracles.mgda(oracles.units(jacobian)) / norms
        np.testing.assert_allclose(
            weights(weighting, jacobian), expected / expected.sum(), atol=1e-9
        )


@pytest.mark.parametrize("name", METHODS)
def test_weights_are_finite_at_all_scales_and_ranks(name):
    for shape in ((1, 1, 1), (9, 11, 5)):
        kinds = ("normal",) if shape[0] == 1 else ("normal", "strong", "weak", "off")
        batch = [sample(kind, shape, seed) for kind in kinds for seed in range(2)]
        batch = [scale * x for x in batch for scale in 10.0 ** np.arange(-15, 16, 5)]
        mixed = 10.0 ** np.linspace(-15, 15, shape[0])[:, None]
        batch += [np.zeros(shape[:2]), mixed * batch[3]]
        found = weights_on(METHODS[name], np.array(batch), "float32")
        assert np.isfinite(found).all()


CLAIMS = {name: m for name, m in weightings.methods().items() if m.properties}


@pytest.mark.parametrize("name", CLAIMS)
def test_properties_hold_where_claimed_and_fail_where_not(name):
    """What is not claimed does not hold, which the samples show."""
    method = CLAIMS[name]
    weighting = method.example(**(method.exact or {}))
    found = gramian_properties(weighting)
    assert {p for p, held in found.items() if held} == {*method.properties}
    assert all(type(held) is bool for held in found.values())


def test_a_claim_that_does_not_hold_is_named():
    weighting, claimed = weightings.equal(), weightings.methods()["equal"].properties
    check_gramian_properties(weighting, claimed)
    with pytest.raises(AssertionError, match="samples contradict 'non-conflicting'"):
        check_gramian_properties(weighting, [*claimed, "non-conflicting"])


def test_unknown_properties_are_an_error():
    with pytest.raises(TypeError, match="must be a sequence of names, got 'non-conf"):
        check_gramian_properties(weightings.mgda(), "non-conflicting")
    with pytest.raises(ValueError, match="unknown properties 'brave'; there are"):
        check_gramian_properties(weightings.equal(), ["brave"])


@pytest.mark.parametrize("ratio", [1e-3, 1e-5, 1e-6, 1e-7])
def test_mgda_of_short_gradients_in_conflict(ratio):
    """Beside a long one, which is orthogonal and gets nearly nothing."""
    short = np.array([[1.0, 0.0], [-0.9, 0.1]])
    best = np.linalg.solve(short @ short.T, np.ones(2))
    expected = best / best.sum()
    jacobian = np.zeros((3, 3))
    jacobian[0, 0], jacobian[1:, 1:] = 1.0, ratio * short
    gramian = jnp.asarray(jacobian @ jacobian.T, jnp.float32)
    weighting = mgda()
    state = weighting.init([0.0] * 3)
    weights, _ = jax.jit(weighting.update)([0.0] * 3, state, gramian=gramian)
    weights = np.asarray(weights)
    np.testing.assert_allclose(weights[1:], expected, rtol=1e-4)
    assert (jacobian @ (weights @ jacobian))[1:].min() > 0


@pytest.mark.parametrize("make", [imtl_g, config])
@pytest.mark.parametrize(("count", "ratio"), [(2, 1e-6), (40, 1e-4), (200, 1e-3)])
def test_a_small_preference_is_kept(make, count, ratio):
    preference = [1.0] * (count - 1) + [ratio]
    losses = [0.0] * count
    weighting = make(preference=preference)
    state = weighting.init(losses)
    weights, _ = weighting.update(losses, state, gramian=jnp.eye(count))
    np.testing.assert_allclose(weights[-1] / weights[0], ratio, rtol=1e-4)


@pytest.mark.parametrize("ratio", [1e-2, 1e-3, 1e-5, 1e-7])
def test_cagrad_of_a_short_gradient_is_no_stationary_point(ratio):
    """Two orthogonal gradients; with the shorter one alone, closed in the limit."""
    weighting = cagrad(c=0.5)
    gramian = jnp.diag(jnp.array([1.0, ratio**2]))
    state = weighting.init([0.0, 0.0])
    weights, _ = jax.jit(weighting.update)([0.0, 0.0], state, gramian=gramian)
    direction = np.array([weights[0], weights[1] * ratio])
    mean = np.array([0.5, 0.5 * ratio])
    np.testing.assert_allclose(np.linalg.norm(direction - mean), 0.25, rtol=1e-3)
    np.testing.assert_allclose(weights[1], 0.5 + 0.25 / ratio, rtol=2e-2)


@pytest.mark.parametrize("count", [100, 110, 160])
def test_cagrad_of_many_orthogonal_gradients(count):
    weighting = cagrad(c=0.5)
    losses = [0.0] * count
    weights, _ = weighting.update(
        losses, weighting.init(losses), gramian=jnp.eye(count)
    )
    np.testing.assert_allclose(sum(map(float, weights)), 1.5, rtol=1e-4)


@pytest.mark.parametrize("c", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("count", [2, 3, 10, 40])
def test_cagrad_at_pareto_stationary_gradients_is_the_mean(c, count):
    """And elsewhere as far from it as it may be, without conflict from c = 1 on."""
    rng = np.random.default_rng(count)
    weighting = cagrad(c=c)
    losses = [0.0] * count
    state, update = weighting.init(losses), jax.jit(weighting.update)
    for scale in (1e-4, 1.0, 1e4):
        typical = scale * rng.normal(size=(count, 50))
        positive = rng.uniform(0.1, 1, count)
        # A positive combination of these is zero.
        low = typical @ rng.normal(size=(50, 5)) @ rng.normal(size=(5, 50))
        strong = low - np.outer(positive, positive @ low) / (positive @ positive)
        for jacobian, expected in ((typical, c), (strong, 0)):
            gramian = jnp.asarray(jacobian @ jacobian.T, jnp.float32)
            weights, _ = update(losses, state, gramian=gramian)
            direction = np.asarray(weights, float) @ jacobian
            mean = jacobian.mean(0)
            distance = np.linalg.norm(direction - mean) / np.linalg.norm(mean)
            np.testing.assert_allclose(distance, expected, rtol=1e-5, atol=1e-6)
            if expected >= 1:
                gains = jacobian @ direction / np.sum(jacobian**2, axis=1)
                assert gains.min() > -1e-5
