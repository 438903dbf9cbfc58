"""Softmax alignment against an independent transcription, and what it promises."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import yoto_jax as yoto

pytestmark = pytest.mark.usefixtures("quick_compilation")

LOSSES = {"a": 1.0, "b": 1.0, "c": 1.0, "label": 1.0}


def gramians(steps, *, size=4, dimension=6, seed=0):
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(steps, size, dimension)) + rng.normal(size=(size, 1))
    return rows @ rows.swapaxes(1, 2)


def follow(weighting, seen, losses=None):
    """The weights of every step."""
    losses = LOSSES if losses is None else losses
    update = jax.jit(weighting.update)
    state, out = weighting.init(losses), []
    for gramian in seen:
        weights, state = update(losses, state, gramian=jnp.asarray(gramian))
        out.append([float(w) for w in jax.tree.leaves(weights)])
    return np.array(out), state


def transcribed(seen, rate, decay, place):
    """NumPy float64: plain gradient descent on the logits, slopes by differences."""
    others = [i for i in range(len(seen[0])) if i != place]
    mu, out = np.zeros(len(others)), []
    cosines, nu = 0.0, 0.0
    for t, gramian in enumerate(seen):
        norms = np.sqrt(np.diag(gramian))
        keep = min(decay, 1 - 1 / (t + 1))
        cosines = keep * cosines + (1 - keep) * gramian / np.outer(norms, norms)
        nu = keep * nu + (1 - keep) * norms

        def objective(mu, cosines=cosines, nu=nu):
            share = np.exp(mu) * nu[others]
            length = np.sqrt(share @ cosines[np.ix_(others, others)] @ share)
            return -share @ cosines[others, place] / length

        weights = np.zeros(len(gramian))
        weights[others] = np.exp(mu) / np.exp(mu).sum()
        out.append(weights)
        h = 1e-6
        slope = [
            (objective(mu + h * e) - objective(mu - h * e)) / (2 * h)
            for e in np.eye(len(mu))
        ]
        mu = mu - rate * np.array(slope)
    return np.array(out)


@pytest.mark.parametrize("downstream", ["label", "b"])
def test_steps_equal_an_independent_transcription(downstream):
    seen = gramians(30)
    place = sorted(LOSSES).index(downstream)
    with jax.enable_x64(True):
        losses = {name: jnp.float64(1.0) for name in LOSSES}
        weighting = yoto.weightings.softmax_alignment(
            downstream, optimizer=optax.sgd(0.5), decay=0.8
        )
        ours, _ = follow(weighting, seen, losses)
    np.testing.assert_allclose(ours, transcribed(seen, 0.5, 0.8, place), atol=1e-7)


def test_weights_are_positive_sum_to_1_and_leave_the_downstream_loss_out():
    weights, _ = follow(yoto.weightings.softmax_alignment("label"), gramians(20))
    np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-6)
    np.testing.assert_array_equal(weights[:, 3], 0)
    assert (weights[:, :3] > 0).all()


def test_the_composite_gradient_turns_to_the_downstream_one():
    gramian = gramians(1)[0]
    optimizer = optax.sgd(0.3)
    weighting = yoto.weightings.softmax_alignment("label", optimizer=optimizer)
    weights, _ = follow(weighting, [gramian] * 200)
    cosines = [
        w @ gramian[:, 3] / np.sqrt(w @ gramian @ w * gramian[3, 3]) for w in weights
    ]
    assert cosines[-1] > cosines[0] + 0.01
    assert (np.diff(cosines) > -1e-6).all()


def test_the_unit_of_the_downstream_loss_does_not_matter():
    seen = gramians(30)
    unit = np.diag([1, 1, 1, 1e4])
    weighting = yoto.weightings.softmax_alignment("label")
    ours, _ = follow(weighting, seen)
    other, _ = follow(weighting, unit @ seen @ unit)
    np.testing.assert_allclose(ours, other, atol=1e-4)


def test_a_batch_without_downstream_gradient_leaves_the_logits():
    gramian = gramians(1)[0]
    gramian[3] = gramian[:, 3] = 0
    weighting = yoto.weightings.softmax_alignment("label")
    before = weighting.init(LOSSES)
    _, after = follow(weighting, [gramian] * 5)
    np.testing.assert_array_equal(after.inner.mu.learned, before.inner.mu.learned)


def test_the_first_weights_are_equal():
    first = yoto.weightings.softmax_alignment("label").init(LOSSES).loss_weights
    found = [float(first[name]) for name in ("a", "b", "c", "label")]
    np.testing.assert_allclose(found, [1 / 3, 1 / 3, 1 / 3, 0], rtol=1e-6)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\), got 1"):
        yoto.weightings.softmax_alignment("label", decay=1.0)
    with pytest.raises(ValueError, match="besides the downstream one, got 'label'"):
        yoto.weightings.softmax_alignment("label").init({"label": 0.0})
    with pytest.raises(ValueError, match="nothing"):
        yoto.weightings.softmax_alignment("nothing").init(LOSSES)


def test_batches_without_a_gradient_do_not_dilute_the_cosines():
    full = gramians(1)[0]
    silent = full.copy()
    silent[[1, 3]] = 0
    silent[:, [1, 3]] = 0
    weighting = yoto.weightings.softmax_alignment("label")
    _, state = follow(weighting, [full, silent, full, silent, silent])
    norms = np.sqrt(np.diag(full))
    np.testing.assert_allclose(
        state.inner.cosines, full / np.outer(norms, norms), rtol=1e-5
    )
