"""Weightings made of other weightings."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import yoto_jax as yoto
from yoto_jax import make_weighting, monitoring, weightings

pytestmark = pytest.mark.usefixtures("quick_compilation")

STEPS = [{"a": 1.0, "b": 4.0}, {"a": 2.0, "b": 2.0}, {"a": 4.0, "b": 1.0}]


def inverse(needs=("losses",), **options):
    """Weights 1 / loss, or the square root of the inverse diagonal of a Gramian."""

    def update(losses, inner, spec, **seen):
        gramian = seen.get("gramian")
        weights = 1 / losses if gramian is None else jnp.diagonal(gramian) ** -0.5
        return weights, inner + 1.0

    return make_weighting(
        lambda spec: jnp.zeros((), spec.dtype), update, needs=needs, **options
    )


def run(weighting, steps=STEPS, **statistics):
    state = weighting.init(steps[0])
    history = []
    for losses in steps:
        weights, state = weighting.update(losses, state, **statistics)
        chex.assert_trees_all_equal(weights, optax.tree.get(state, "loss_weights"))
        history.append([float(weights[name]) for name in sorted(weights)])
    return np.array(history), state


def test_every_updates_at_the_first_step_and_then_so_often():
    history, state = run(weightings.every(inverse(), 2))
    np.testing.assert_allclose(history, [[1, 0.25], [1, 0.25], [0.25, 1]])
    assert int(state.inner.num_updates) == 2
    assert float(state.inner.inner) == 2.0


def test_hold_updates_in_the_first_steps_alone():
    history, state = run(weightings.hold(inverse(), 2))
    np.testing.assert_allclose(history, [[1, 0.25], [0.5, 0.5], [0.5, 0.5]])
    assert int(state.inner.num_updates) == 2
    assert float(state.inner.inner) == 2.0


@pytest.mark.parametrize(
    "wrap", [lambda w: weightings.every(w, 1), lambda w: weightings.hold(w, 5)]
)
def test_a_loss_that_is_not_positive_is_an_error_outside_jit(wrap):
    weighting = wrap(weightings.uw_so())
    bad = {"a": -1.0, "b": 2.0}
    state = weighting.init(bad)
    with pytest.raises(ValueError, match="positive losses, loss 'a' is -1"):
        weighting.update(bad, state)
    _, after = jax.jit(weighting.update)(bad, state)
    assert int(after.num_skipped) == 1


@pytest.mark.parametrize(
    ("wrap", "name"), [(weightings.every, "steps"), (weightings.hold, "after")]
)
def test_numbers_of_steps_are_positive_integers(wrap, name):
    for bad in (0, -1, np.int64(0), jnp.int32(-2)):
        with pytest.raises(ValueError, match=f"{name} must be positive, got"):
            wrap(inverse(), bad)
    for bad in (2.5, -1.0, "2", None, True, np.ones(2, int)):
        with pytest.raises(TypeError, match=f"{name} must be an integer, got"):
            wrap(inverse(), bad)
    with pytest.raises(TypeError, match=f"{name} must be an integer, got float32"):
        jax.jit(lambda n: wrap(inverse(), n).init(STEPS[0]))(2.0)
    history, _ = run(wrap(inverse(), np.int64(2)))

    @jax.jit
    def first(steps):
        weighting = wrap(inverse(), steps)
        return weighting.update(STEPS[0], weighting.init(STEPS[0]))[0]

    np.testing.assert_allclose([first(2)["a"], first(2)["b"]], history[0])


def test_wrappers_wrap_weightings():
    for wrap in (
        lambda w: weightings.every(w, 2),
        lambda w: weightings.hold(w, 2),
        weightings.smooth,
        weightings.normalize,
        weightings.log,
        weightings.skip_outliers,
    ):
        with pytest.raises(TypeError, match="must be a LossWeighting.*got int"):
            wrap(5)


def test_wide_decays_leave_the_dtype_of_the_state():
    with jax.enable_x64(True):
        losses = {name: jnp.float32(x) for name, x in STEPS[0].items()}
        decay = np.exp(np.float64(-0.01))
        for wrap in (weightings.normalize, weightings.smooth):
            weighting = wrap(inverse(), decay=decay)
            state = weighting.init(losses)
            after = jax.jit(weighting.update)(losses, state)[1]
            chex.assert_trees_all_equal_shapes_and_dtypes(state, after)


def test_hold_looks_for_so_many_batches_that_are_not_skipped():
    weighting = weightings.hold(weightings.skip_outliers(inverse()), 2)
    state = weighting.init(STEPS[0])
    due = []
    for losses in (STEPS[0], {"a": jnp.nan, "b": 1.0}, STEPS[1], STEPS[2]):
        due.append(bool(weighting.due(state)))
        _, state = weighting.update(losses, state)
    assert due == [True, True, True, False]


def test_every_of_every_is_due_when_both_are():
    weighting = weightings.every(weightings.every(inverse(), 2), 3)
    state = weighting.init(STEPS[0])
    due = []
    for k in range(12):
        due.append(bool(weighting.due(state)))
        _, state = weighting.update(STEPS[k % 3], state)
    # The inner one counts the calls that reach it, which are those of the outer one.
    assert [k for k, now in enumerate(due) if now] == [0, 6]


def test_smooth_is_an_average_that_starts_at_the_first_weights():
    history, _ = run(weightings.smooth(inverse(), decay=0.75))
    first = np.array([1, 0.25])
    second = 0.75 * first + 0.25 * np.array([0.5, 0.5])
    third = 0.75 * second + 0.25 * np.array([0.25, 1.0])
    np.testing.assert_allclose(history, [first, second, third])


def test_smooth_moves_only_when_the_weights_inside_do():
    history, _ = run(weightings.smooth(weightings.every(inverse(), 2), decay=0.5))
    np.testing.assert_allclose(history, [[1, 0.25], [1, 0.25], [0.625, 0.625]])


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
def test_normalize_divides_by_a_running_mean(decay):
    history, state = run(
        weightings.normalize(weightings.equal(reduction="sum"), decay=decay)
    )
    values = np.array([[s["a"], s["b"]] for s in STEPS])
    scale, expected = values[0], []
    for value in values:
        scale = scale if not expected else decay * scale + (1 - decay) * value
        expected.append(1 / scale)
    np.testing.assert_allclose(history, expected, rtol=1e-6)
    np.testing.assert_allclose([state.loss_scales[n] for n in "ab"], scale)


@pytest.mark.parametrize("name", ["famo", "uncertainty", "dwa", "relobralo", "yoto"])
def test_normalized_weightings_do_not_see_the_unit_of_a_loss(name):
    make = {"yoto": lambda: weightings.yoto("a")}.get(name) or getattr(weightings, name)
    units = {"a": 1000.0, "b": 0.01}
    plain, _ = run(weightings.normalize(make()))
    scaled_steps = [{n: units[n] * s[n] for n in s} for s in STEPS]
    scaled, _ = run(weightings.normalize(make()), scaled_steps)
    np.testing.assert_allclose(scaled * [1000.0, 0.01], plain, rtol=1e-4)


def test_normalize_scales_gradient_statistics():
    gramian = jnp.array([[4.0, 1.0], [1.0, 9.0]])
    weighting = weightings.normalize(inverse(needs=("gramian",)), decay=1.0)
    history, _ = run(weighting, gramian=gramian)
    # Gradients of the scaled losses have norms 2 / 1 and 3 / 4.
    np.testing.assert_allclose(history[-1], [1 / 2, 1 / 3], rtol=1e-6)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda w: weightings.smooth(w, decay=0.5),
        lambda w: weightings.normalize(w, decay=0.5),
        lambda w: weightings.every(w, 1),
        lambda w: weightings.smooth(weightings.normalize(w), decay=0.5),
    ],
)
def test_a_bad_batch_is_held_through_wrappers(wrap):
    weighting = wrap(inverse())
    state = weighting.init(STEPS[0])
    for losses in STEPS:
        weights, state = weighting.update(losses, state)
    held, after = weighting.update({"a": jnp.nan, "b": 1.0}, state)
    chex.assert_trees_all_equal(held, weights)
    assert int(optax.tree.get(after, "num_skipped")) == 1
    resumed, _ = weighting.update(STEPS[0], after)
    expected, _ = weighting.update(STEPS[0], state)
    chex.assert_trees_all_equal(resumed, expected)


def test_observers_reach_the_weighting_inside():
    inner = inverse(
        observe=lambda inner, spec, *, cotangent_norm, gradient_norm: (
            inner + cotangent_norm / gradient_norm
        ),
        observe_step=lambda losses, inner, spec: inner + 100 * jnp.sum(losses),
    )
    for wrap in (
        lambda w: weightings.smooth(w),
        lambda w: weightings.every(w, 2),
        lambda w: weightings.normalize(w),
    ):
        weighting = wrap(inner)
        state = weighting.init(STEPS[0])
        state = weighting.observe(state, cotangent_norm=6.0, gradient_norm=2.0)
        assert float(state.inner.inner) == 3.0
        state = weighting.observe_step(STEPS[0], state)
        assert float(state.inner.inner) == 503.0


def test_wrappers_pass_on_what_is_needed():
    inner = inverse(needs=("gramian", "losses"), downstream="a")
    for wrap in (weightings.smooth, lambda w: weightings.every(w, 3)):
        assert wrap(inner).needs == inner.needs
        assert wrap(inner).downstream == "a"
        assert wrap(inner).observe is None
    needs = weightings.normalize(inverse(needs=("gramian",))).needs
    assert needs == ("losses", "gramian")


@pytest.mark.parametrize(
    "wrap",
    [
        weightings.smooth,
        weightings.normalize,
        weightings.skip_outliers,
        monitoring.recorded,
        lambda w: weightings.every(w, 2),
        lambda w: weightings.hold(weightings.every(w, 2), 2),
    ],
)
def test_the_state_of_a_wrapper_tells_what_that_of_a_weighting_does(wrap):
    _, state = run(wrap(inverse()), STEPS[:2])
    assert state.loss_weights is optax.tree.get(state, "loss_weights")
    assert int(state.num_updates) == int(optax.tree.get(state, "num_updates")) > 0
    assert int(state.num_skipped) == 0


def test_a_state_without_weights_says_so():
    state = yoto.skip_outliers(optax.sgd(0.1), losses=1).init(jnp.zeros(2))
    assert not hasattr(state, "loss_weights")
    with pytest.raises(AttributeError, match="no loss_weights in what this Skip"):
        _ = state.loss_weights


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match="steps must be positive, got 0"):
        weightings.every(inverse(), 0)
    with pytest.raises(ValueError, match="after must be positive"):
        weightings.hold(inverse(), 0)
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\), got 1"):
        weightings.smooth(inverse(), decay=1)
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\], got -1"):
        weightings.normalize(inverse(), decay=-1)
    for wrap in (weightings.smooth, weightings.normalize):
        weighting = wrap(inverse())
        with pytest.raises(ValueError, match="missing: 'b'; unexpected: 'c'"):
            weighting.update({"a": 1.0, "c": 1.0}, weighting.init(STEPS[0]))


def test_wrappers_under_scan_and_vmap():
    weighting = weightings.normalize(weightings.smooth(weightings.every(inverse(), 2)))
    losses = jax.tree.map(lambda *x: jnp.array(x), *STEPS)

    def run_all(losses):
        state = weighting.init(STEPS[0])
        step = lambda state, losses: weighting.update(losses, state)[::-1]
        return jax.lax.scan(step, state, losses)[1]

    expected, _ = run(weighting)
    got = run_all(losses)
    np.testing.assert_allclose(np.stack([got["a"], got["b"]], 1), expected, rtol=1e-6)
    batched = jax.vmap(run_all)(jax.tree.map(lambda x: jnp.stack([x, 2 * x]), losses))
    chex.assert_trees_all_close(jax.tree.map(lambda x: x[0], batched), got, rtol=1e-6)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda w: weightings.normalize(weightings.smooth(w, decay=0.5)),
        lambda w: weightings.smooth(weightings.normalize(w), decay=0.5),
        lambda w: weightings.normalize(weightings.every(weightings.smooth(w), 2)),
    ],
)
def test_nested_wrappers_keep_their_units_apart(wrap):
    losses = {"a": 1e-3, "b": 2e-3}
    history, _ = run(wrap(weightings.equal(reduction="sum")), [losses] * 6)
    np.testing.assert_allclose(history, [[1000, 500]] * 6, rtol=1e-5)


def test_smooth_twice_is_the_average_of_an_average():
    history, _ = run(
        weightings.smooth(weightings.smooth(inverse(), decay=0.5), decay=0.5)
    )
    once, _ = run(weightings.smooth(inverse(), decay=0.5))
    twice = once.copy()
    for k in range(1, len(once)):
        twice[k] = 0.5 * twice[k - 1] + 0.5 * once[k]
    np.testing.assert_allclose(history, twice, rtol=1e-6)


def test_every_tries_again_after_a_bad_batch():
    weighting = weightings.every(inverse(), 100)
    bad = {"a": jnp.nan, "b": 1.0}
    history, state = run(weighting, [bad, {"a": 0.25, "b": 0.5}, STEPS[0]])
    np.testing.assert_allclose(history[1:], [[4, 2], [4, 2]])
    assert int(state.inner.num_skipped) == 1


@pytest.mark.parametrize(
    "wrap",
    [
        lambda w: weightings.hold(w, 5),
        lambda w: weightings.every(w, 2),
        lambda w: weightings.smooth(w),
        lambda w: weightings.hold(weightings.every(w, 2), 5),
    ],
)
def test_all_skipped_batches_are_counted(wrap):
    weighting = wrap(weightings.skip_outliers(weightings.scale_invariant()))
    state = weighting.init(STEPS[0])
    for losses in (STEPS[0], {"a": np.nan, "b": 1.0}, {"a": 1e9, "b": 1.0}, STEPS[1]):
        _, state = jax.jit(weighting.update)(losses, state)
    assert int(state.num_skipped) == (2 if "Every" not in repr(state) else 1)


def test_what_the_weighting_inside_refuses_is_counted_outside():
    weighting = weightings.skip_outliers(weightings.scale_invariant())
    state = weighting.init([1.0, 1.0])
    weights, good = jax.jit(weighting.update)([2.0, 1.0], state)
    state = good
    for number, bad in enumerate((0.0, -1.0), start=1):
        kept, state = jax.jit(weighting.update)([bad, 1.0], state)
        assert int(state.num_skipped) == number
        assert not state.accepted
        np.testing.assert_array_equal(kept, weights)
        chex.assert_trees_all_equal(state.inner, good.inner)
        chex.assert_trees_all_equal(state.loss_scales, good.loss_scales)


@pytest.mark.parametrize(
    "wrap", [lambda w: weightings.every(w, 4), lambda w: weightings.hold(w, 1)]
)
@pytest.mark.parametrize("run", [lambda f: f, jax.jit])
def test_bad_batches_are_counted_at_steps_that_hold_the_weights(wrap, run):
    weighting = wrap(inverse())
    _, state = run(weighting.update)(STEPS[0], weighting.init(STEPS[0]))
    for number in (1, 2, 3):
        weights, state = run(weighting.update)({"a": np.nan, "b": 1.0}, state)
        assert int(state.num_skipped) == number
        assert int(state.step) == 1
        assert float(weights["b"]) == 0.25
    absent = {"a": False, "b": True}
    _, state = run(weighting.update)({"a": np.nan, "b": 1.0}, state, present=absent)
    assert (int(state.num_skipped), int(state.step)) == (3, 2)


def test_what_is_held_stays_so_when_the_counter_runs_over():
    weighting = weightings.hold(inverse(), 2)
    _, state = weighting.update(STEPS[0], weighting.init(STEPS[0]))
    state = state._replace(step=jnp.int32(2**31 - 1))
    for losses in STEPS:
        weights, state = weighting.update(losses, state)
        assert not weighting.due(state)
        assert float(weights["b"]) == 0.25


def test_a_loss_of_zero_keeps_its_scale():
    weighting = weightings.normalize(weightings.upgrad(), decay=0.9)
    state = weighting.init({"a": 0.0, "hinge": 0.0})
    gramian = jnp.diag(jnp.array([1.0, 0.0]))
    update = jax.jit(lambda s, x: weighting.update(x, s, gramian=gramian)[1])
    state = update(state, {"a": 1.0, "hinge": 4.0})
    for _ in range(2000):
        state = update(state, {"a": 1.0, "hinge": 0.0})
    assert int(optax.tree.get(state, "num_skipped")) == 0
    assert float(state.loss_scales["hinge"]) == 4.0
    fresh = update(weighting.init({"a": 0.0, "hinge": 0.0}), {"a": 1e-20, "hinge": 0.0})
    assert float(fresh.loss_scales["hinge"]) == 0.0


def test_normalized_statistics_have_no_unit():
    for name, power in {"alignment": 2, "ntk_diagonal": 1, "norms": 1}.items():
        inner = make_weighting(
            lambda spec: (),
            lambda losses, inner, spec, **seen: (*seen.values(), inner),
            needs=(name,),
            downstream="b",
        )
        weighting = weightings.normalize(inner)
        shown = []
        for unit in (1.0, 100.0):
            losses = {"a": 2.0, "b": 3.0 * unit}
            value = jnp.array([5.0, 7.0 * unit**power])
            if name == "alignment":
                value = jnp.array([5.0 * unit, 7.0 * unit**2])
            seen = {name: value}
            _, state = weighting.update(losses, weighting.init(losses), **seen)
            shown.append([float(state.normalized[n]) for n in "ab"])
        np.testing.assert_allclose(*shown, rtol=1e-5)
    with pytest.raises(ValueError, match="cannot tell the unit of curvature"):
        weightings.normalize(inverse(needs=("curvature",)))


def test_no_gradient_flows_through_normalised_weights():
    weighting = weightings.normalize(weightings.equal(reduction="sum"))
    state = weighting.init({"a": 1.0})

    def composite(x):
        weights, _ = weighting.update({"a": x}, state)
        return weights["a"] * x

    np.testing.assert_allclose(jax.grad(composite)(4.0), 0.25)


def test_a_weighting_that_counts_nothing_can_be_wrapped():
    def update(losses, state, **_):
        weights = jax.tree.map(lambda x: jnp.float32(1.0) / x, losses)
        return weights, {"loss_weights": weights}

    one = lambda losses: {"loss_weights": jax.tree.map(jnp.ones_like, losses)}
    own = inverse()._replace(init=one, update=update)
    history, _ = run(weightings.smooth(own, decay=0.75))
    expected, _ = run(weightings.smooth(inverse(), decay=0.75))
    np.testing.assert_allclose(history, expected, rtol=1e-6)
    run(weightings.normalize(weightings.every(own, 2)))


# Logarithms.

PARAMS = {"w": jnp.array([[0.5, -1.0], [0.3, 0.8], [-0.6, 0.1]]), "b": jnp.ones(2)}
BATCHES = jax.random.normal(jax.random.key(0), (4, 8, 3))
UNITS = {"a": 1e-3, "b": 1.0, "c": 1e3}


def encoder(params, x):
    return jnp.tanh(x @ params["w"])


def heads(params, z, x):
    y = z @ params["b"]
    return {
        "a": 0.1 * jnp.mean((y - x[:, 0]) ** 2) + 0.02,
        "b": jnp.mean(jnp.abs(y + 2) ** 3) + 0.5,
        "c": 5 * jnp.mean(jnp.exp(z[:, 0] - x[:, 1])) + 1.0,
    }


def losses_of(params, x):
    return heads(params, encoder(params, x), x)


def logs_of(*arguments, f=losses_of):
    return jax.tree.map(jnp.log, f(*arguments))


def in_units(*arguments, f=losses_of):
    return {name: UNITS[name] * loss for name, loss in f(*arguments).items()}


def gradients(loss_fn, weighting, batches=BATCHES, **options):
    """Gradients and weights of steps that the parameters sit out, and the state."""
    step = jax.jit(yoto.value_and_grad(loss_fn, weighting, **options))
    state, history = weighting.init(dict.fromkeys("abc", 0.0)), []
    for x in batches:
        _, grads, state = step(PARAMS, state, x)
        history.append((grads, state.loss_weights))
    return history, state


LOOKING_AT_GRADIENTS = {
    "equal": lambda: weightings.equal(),
    "static": lambda: weightings.static({"a": 1.0, "b": 0.3, "c": 2.0}),
    "mgda": lambda: weightings.mgda(),
    "cagrad": lambda: weightings.cagrad(),
    "imtl_g": lambda: weightings.imtl_g(),
    "upgrad": lambda: weightings.upgrad(),
    "pcgrad": lambda: weightings.pcgrad(),
    "grad_norm_balance": lambda: weightings.grad_norm_balance("b"),
    "lr_annealing": lambda: weightings.lr_annealing("b"),
    "grap": lambda: weightings.grap("b"),
    "auto_lambda": lambda: weightings.auto_lambda("b", optimizer=optax.sgd(0.1)),
    "smooth": lambda: weightings.smooth(weightings.mgda(), decay=0.5),
}


@pytest.mark.parametrize("name", LOOKING_AT_GRADIENTS)
def test_log_is_the_weighting_of_the_logarithms_of_the_losses(name):
    make = LOOKING_AT_GRADIENTS[name]
    expected, plain = gradients(logs_of, make())
    got, state = gradients(losses_of, weightings.log(make()))
    scaled, _ = gradients(in_units, weightings.log(make()))
    for x, (wanted, _), (grads, weights), (same, other) in zip(
        BATCHES, expected, got, scaled, strict=True
    ):
        chex.assert_trees_all_close(grads, wanted, rtol=2e-4, atol=1e-5)
        # No unit of a loss matters, by the identity that it is inverse in the weight.
        chex.assert_trees_all_close(same, wanted, rtol=2e-4, atol=1e-5)
        back = {n: UNITS[n] * w for n, w in other.items()}
        chex.assert_trees_all_close(back, weights, rtol=2e-4, atol=1e-6)
        sizes = losses_of(PARAMS, x)
    own = {n: weights[n] * sizes[n] for n in sizes}
    chex.assert_trees_all_close(state.log_weights, own, rtol=1e-5)
    chex.assert_trees_all_close(state.log_weights, plain.loss_weights, rtol=2e-4)


def test_log_of_weights_that_are_held_by_the_engine():
    mgda = weightings.mgda()
    outer, _ = gradients(losses_of, weightings.every(weightings.log(mgda), 2))
    inner, state = gradients(losses_of, weightings.log(weightings.every(mgda, 2)))
    chex.assert_trees_all_close(inner, outer, rtol=1e-5, atol=1e-7)
    chex.assert_trees_all_equal(inner[0][1], inner[1][1])
    assert int(state.num_updates) == 2


@pytest.mark.parametrize("weigh_heads", [False, True])
@pytest.mark.parametrize("name", ["mgda", "grad_norm_balance", "grap"])
def test_log_with_gradients_of_the_representation(name, weigh_heads):
    make = LOOKING_AT_GRADIENTS[name]
    options = {"gradients": yoto.of_representation(encoder, weigh_heads=weigh_heads)}
    log_heads = lambda *arguments: logs_of(*arguments, f=heads)
    heads_in_units = lambda *arguments: in_units(*arguments, f=heads)
    expected, _ = gradients(log_heads, make(), **options)
    got, _ = gradients(heads, weightings.log(make()), **options)
    scaled, _ = gradients(heads_in_units, weightings.log(make()), **options)
    # Heads that no weight reaches, and that of a downstream loss, have their own unit.
    leaves = "wb" if weigh_heads and name != "grap" else "w"
    for wanted, *found in zip(expected, got, scaled, strict=True):
        for grads, _ in found:
            for leaf in leaves:
                chex.assert_trees_all_close(
                    grads[leaf], wanted[0][leaf], rtol=2e-4, atol=1e-5
                )


@pytest.mark.parametrize("name", ["mgda", "grad_norm_balance", "auto_lambda"])
def test_log_where_losses_are_absent(name):
    make = LOOKING_AT_GRADIENTS[name]

    def masked(f):
        def loss_fn(params, x):
            there = {"a": x[0, 0] > 0, "b": jnp.asarray(True), "c": x[0, 1] > 0}
            losses = jax.tree.map(
                lambda ok, loss: jnp.where(ok, loss, jnp.nan), there, f(params, x)
            )
            return yoto.MaskedLosses(losses, there)

        return loss_fn

    signs = jnp.array([[1.0, 1.0], [-1, 1], [1, -1], [-1, -1]])
    batches = BATCHES.at[:, 0, :2].set(signs)
    expected, _ = gradients(masked(logs_of), make(), batches)
    got, state = gradients(masked(losses_of), weightings.log(make()), batches)
    for (wanted, _), (grads, _) in zip(expected, got, strict=True):
        chex.assert_trees_all_close(grads, wanted, rtol=2e-4, atol=1e-5)
    assert int(state.num_skipped) == 0


def test_log_in_aggregate():
    x = BATCHES[0]
    losses, jacobian = jax.jit(yoto.value_and_jacobian(losses_of))(PARAMS, x)
    _, log_jacobian = jax.jit(yoto.value_and_jacobian(logs_of))(PARAMS, x)
    found = []
    for weighting, values, rows in (
        (weightings.log(weightings.mgda()), losses, jacobian),
        (weightings.mgda(), logs_of(PARAMS, x), log_jacobian),
    ):
        tx = yoto.aggregate(weighting, values)
        grads, _ = tx.update(rows, tx.init(PARAMS), losses=values)
        found.append(grads)
    chex.assert_trees_all_close(*found, rtol=1e-4, atol=1e-6)


def test_log_of_known_methods():
    values = np.array([[s["a"], s["b"]] for s in STEPS])
    history, _ = run(weightings.log(weightings.equal(reduction="sum")))
    np.testing.assert_allclose(history, 1 / values, rtol=1e-6)
    smooth_maximum = weightings.stch(smoothing=0.3, preference=1.0)
    history, _ = run(weightings.log(smooth_maximum))
    expected, _ = run(weightings.stch(smoothing=0.3, form="log"))
    np.testing.assert_allclose(2 * history, expected, rtol=1e-5)
    # Unit gradients at a right angle of losses 4 and 1: 1/4 and 1 of the logarithms.
    weighting = weightings.log(weightings.mgda())
    state = weighting.init(STEPS[2])
    weights, _ = weighting.update(STEPS[2], state, gramian=jnp.eye(2))
    alpha = np.array([1, 1 / 16]) / (17 / 16)  # inverse to the squared lengths
    np.testing.assert_allclose([weights["a"], weights["b"]], alpha / [4, 1], rtol=1e-5)


@pytest.mark.parametrize("wrap", [weightings.normalize, lambda w: w])
def test_log_inside_and_around_wrappers(wrap):
    log, mgda = weightings.log, weightings.mgda()
    gramian = jnp.array([[4.0, 1.0], [1.0, 9.0]])
    plain, _ = run(log(mgda), gramian=gramian)
    history, _ = run(wrap(log(mgda)), gramian=gramian)
    np.testing.assert_allclose(history, plain, rtol=1e-5, atol=1e-7)
    held = [plain[0], plain[0], plain[2]]
    for weighting in (
        log(weightings.every(wrap(mgda), 2)),
        weightings.every(wrap(log(mgda)), 2),
        weightings.skip_outliers(wrap(log(weightings.every(mgda, 2)))),
    ):
        history, state = run(weighting, gramian=gramian)
        if weighting.due is not None and wrap is not weightings.normalize:
            np.testing.assert_allclose(history, held, rtol=1e-5)
        assert int(optax.tree.get_all_with_path(state, "num_skipped")[0][1]) == 0
        assert weighting.positive
    for weighting in log(weightings.hold(mgda, 1)), weightings.hold(log(mgda), 1):
        history, _ = run(weighting, gramian=gramian)
        np.testing.assert_allclose(history, [plain[0]] * 3, rtol=1e-5)


def test_log_in_the_lanes_of_a_race():
    own = {"log": weightings.log(weightings.mgda()), "equal": weightings.equal()}
    arms = yoto.racing.one_of(own)
    gramian = jnp.array([[4.0, 1.0], [1.0, 9.0]])
    states = yoto.racing.start(arms.init(STEPS[0]), 2)
    update = jax.vmap(lambda s, x: arms.update(x, s, gramian=gramian), (0, None))
    for losses in STEPS:
        weights, states = update(states, losses)
    for lane, weighting in enumerate(own.values()):
        seen = {"gramian": gramian} if "gramian" in weighting.needs else {}
        history, _ = run(weighting, **seen)
        got = [weights["a"][lane], weights["b"][lane]]
        np.testing.assert_allclose(got, history[-1], rtol=1e-6)
    assert yoto.racing.one_of({"dwa": weightings.dwa()}).positive
    assert not yoto.racing.one_of({"equal": weightings.equal()}).positive


@pytest.mark.parametrize("bad", [0.0, -2.0, jnp.nan, jnp.inf])
@pytest.mark.parametrize("wrap", [weightings.log, lambda w: weightings.log(foreign(w))])
def test_a_loss_without_a_logarithm_is_an_error_or_a_batch_that_is_held(bad, wrap):
    weighting = wrap(weightings.static({"a": 3.0, "b": 1.0}))
    state = weighting.init(STEPS[0])
    weights, state = weighting.update(STEPS[1], state)
    losses = {"a": 1.0, "b": bad}
    if np.isfinite(bad):
        with pytest.raises(
            ValueError, match=rf"positive losses, loss 'b' is {bad:.4g}"
        ):
            weighting.update(losses, state)
    held, after = jax.jit(weighting.update)(losses, state)
    chex.assert_trees_all_equal(held, weights)
    expected = optax.tree.set(state, num_skipped=jnp.int32(1))
    chex.assert_trees_all_equal(after, expected)
    present = {"a": True, "b": False}
    alone, after = weighting.update(losses, state, present=present)
    assert (float(alone["a"]), float(alone["b"])) == (3.0, 0.0)
    assert float(after.loss_weights["b"]) == float(weights["b"])


def foreign(weighting):
    """Looks at no loss, and takes every batch."""

    def update(losses, state, *, present=None, **statistics):
        ones = jax.tree.map(jnp.ones_like, losses)
        return weighting.update(ones, state, present=present)

    return weighting._replace(update=update)


def test_log_holds_weights_that_would_overflow():
    weighting = weightings.log(weightings.static(100.0))
    state = weighting.init(STEPS[0])
    weights, state = weighting.update(STEPS[0], state)
    held, after = jax.jit(weighting.update)({"a": 1.2e-38, "b": 1.0}, state)
    chex.assert_trees_all_equal(held, weights)
    assert (int(after.num_updates), int(after.num_skipped)) == (1, 1)
    chex.assert_trees_all_equal(after.log_weights, state.log_weights)


def test_log_shows_losses_after_the_step_as_logarithms():
    famo = weightings.famo(exact=True, lower_bounds=-10.0)
    weighting, logs = weightings.log(famo), lambda x: jax.tree.map(jnp.log, x)
    state, plain = weighting.init(STEPS[0]), famo.init(STEPS[0])
    for before, after in itertools.pairwise(STEPS):
        _, state = weighting.update(before, state)
        _, plain = famo.update(logs(before), plain)
        state = weighting.observe_step(after, state)
        plain = famo.observe_step(logs(after), plain)
    chex.assert_trees_all_close(state.inner.inner, plain.inner, rtol=1e-5)
    assert weightings.log(weightings.mgda()).observe_step is None


def test_log_takes_losses_in_bfloat16():
    weighting = weightings.log(weightings.equal(reduction="sum"))
    losses = {"a": jnp.bfloat16(0.3), "b": jnp.bfloat16(700.0)}
    weights, _ = weighting.update(losses, weighting.init(losses))
    for name, weight in weights.items():
        assert weight.dtype == jnp.float32
        np.testing.assert_allclose(weight, 1 / np.float32(losses[name]), rtol=1e-6)


def test_what_needs_positive_losses_cannot_be_shown_logarithms():
    methods = {
        name: method.example("a") for name, method in weightings.methods().items()
    }
    for name, method in weightings.methods().items():
        weighting = methods[name]
        assert weighting.positive == (method.accepts != "any")
        assert weightings.every(weightings.smooth(weighting), 2).positive == (
            weighting.positive
        )
        if weighting.positive:
            with pytest.raises(ValueError, match="log shows .* needs positive losses"):
                weightings.log(weighting)
    below = weightings.log(weightings.famo(lower_bounds=[-3.0, 0.0]))
    _, state = jax.jit(below.update)([0.5, 2.0], below.init([0.0, 0.0]))
    assert int(state.num_updates) == 1
    with pytest.raises(ValueError, match="needs positive losses"):
        weightings.log(weightings.log(weightings.mgda()))
    with pytest.raises(ValueError, match="cannot tell what ntk_diagonal of the log"):
        weightings.log(weightings.ntk())
