"""Misuse of weightings and engine that would otherwise go unnoticed."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import yoto_jax as yoto
from yoto_jax import weightings

LOSSES = {"a": 1.0, "b": 2.0}


def loss_fn(w):
    return {"a": jnp.sum(w**2), "b": jnp.sum((w - 1) ** 2)}


W = jnp.array([0.5, -1.0])


@pytest.mark.parametrize(
    "state",
    [
        None,
        optax.adam(0.1).init(W),
        weightings.gradnorm().init(LOSSES),
        weightings.every(weightings.famo(), 2).init(LOSSES),
    ],
    ids=["None", "of an optimizer", "of another weighting", "of a wrapper"],
)
@pytest.mark.parametrize("wrap", [False, True])
def test_the_state_of_something_else(state, wrap):
    weighting = weightings.famo()
    if wrap:
        weighting = weightings.every(weightings.smooth(weighting), 3)
    for call in (
        lambda: weighting.update(LOSSES, state),
        lambda: yoto.value_and_grad(loss_fn, weighting)(W, state),
        lambda: jax.jit(yoto.value_and_grad(loss_fn, weighting))(W, state),
    ):
        with pytest.raises(TypeError, match="state"):
            call()


@pytest.mark.parametrize(
    "wrap",
    [
        weightings.smooth,
        weightings.normalize,
        weightings.log,
        weightings.skip_outliers,
    ],
)
def test_the_state_inside_a_wrapper(wrap):
    weighting = weightings.upgrad()
    with pytest.raises(TypeError, match=r"State that init of this weighting returns"):
        wrap(weighting).update(LOSSES, weighting.init(LOSSES))


def test_a_batch_in_place_of_the_state():
    step = yoto.value_and_grad(lambda w, x: loss_fn(w * x), weightings.equal())
    with pytest.raises(TypeError, match="second argument must be the state"):
        step(W, jnp.ones(2))


def test_logits_inside_a_tree_are_found_for_the_message():
    params = {"model": W, "loss": {"mu": yoto.init_loss_logits(LOSSES, "a")}}
    with pytest.raises(TypeError, match=r"got dict with one at \['loss'\]\['mu'\]"):
        yoto.loss_weights(params)


def test_the_message_names_both_states():
    state = weightings.gradnorm().init(LOSSES)
    with pytest.raises(TypeError, match=r"FamoState.*GradNormState"):
        weightings.famo().update(LOSSES, state)


def test_losses_below_their_bounds():
    weighting = weightings.famo(lower_bounds=1.5)
    state = weighting.init(LOSSES)
    with pytest.raises(ValueError, match="'a' is 1.*lower_bounds"):
        weighting.update(LOSSES, state)
    _, after = jax.jit(weighting.update)(LOSSES, state)
    assert (after.num_updates, after.num_skipped) == (0, 1)


def test_auxiliary_output_that_is_not_announced():
    weighting = weightings.equal()
    with_aux = lambda w: (loss_fn(w), jnp.mean(w))
    state = weighting.init(jax.eval_shape(with_aux, W))  # aux as a third loss
    with pytest.raises(TypeError, match="has_aux=True"):
        yoto.value_and_grad(with_aux, weighting)(W, state)
    with pytest.raises(TypeError, match="has_aux=True"):
        yoto.value_and_jacobian(with_aux)(W)


def test_auxiliary_output_that_is_missing():
    weighting = weightings.equal()
    state = weighting.init(LOSSES)
    with pytest.raises(TypeError, match=r"must return \(losses, aux\), got a dict"):
        yoto.value_and_grad(loss_fn, weighting, has_aux=True)(W, state)
    pair = lambda w: list(loss_fn(w).values())
    with pytest.raises(TypeError, match=r"must return \(losses, aux\), got a list"):
        yoto.value_and_jacobian(pair, has_aux=True)(W)


@pytest.mark.parametrize("chunk_size", [0, -1, 1.5, "2"])
def test_chunk_sizes(chunk_size):
    with pytest.raises(ValueError, match="chunk_size must be a positive integer"):
        yoto.of_parameters(chunk_size=chunk_size)
    with pytest.raises(ValueError, match="chunk_size must be a positive integer"):
        yoto.value_and_jacobian(loss_fn, chunk_size=chunk_size)


def test_an_axis_that_is_not_there():
    weighting = weightings.equal()
    step = yoto.value_and_grad(loss_fn, weighting, axis_name="d")
    with pytest.raises(ValueError, match="axis_name: 'd' is no axis"):
        jax.jit(step)(W, weighting.init(LOSSES))
    with pytest.raises(ValueError, match="axis_name: 'd' is no axis"):
        yoto.value_and_jacobian(loss_fn, axis_name="d")(W)


def test_heads_that_do_not_use_the_representation():
    weighting = weightings.mgda()
    of_z = yoto.of_representation(lambda w: jnp.tanh(w))
    heads = lambda w, z: {"a": jnp.sum(z**2), "b": jnp.sum(w**2)}
    step = yoto.value_and_grad(heads, weighting, gradients=of_z)
    with pytest.raises(ValueError, match="z, .* has no effect on 'b'"):
        step(W, weighting.init(LOSSES))
    constant = lambda w, z: {"a": jnp.sum(z**2), "b": jnp.float32(1)}
    step = yoto.value_and_grad(constant, weighting, gradients=of_z)
    with pytest.raises(ValueError, match="z, .* has no effect on 'b'"):
        jax.jit(step)(W, weighting.init(LOSSES))


def test_losses_that_do_not_use_the_selected_part():
    weighting = weightings.grad_norm_balance()
    params = {"first": W, "last": W}
    losses = lambda p: {"a": jnp.sum(p["first"] * p["last"]), "b": jnp.sum(p["first"])}
    last = yoto.of_parameters(select=lambda p: p["last"])
    step = yoto.value_and_grad(losses, weighting, gradients=last)
    with pytest.raises(ValueError, match="select= returns have no effect on 'b'"):
        jax.jit(step)(params, weighting.init(LOSSES))
    masked = lambda p: yoto.MaskedLosses(losses(p), {"a": True, "b": False})
    step = yoto.value_and_grad(masked, weighting, gradients=last)
    _, grads, _ = step(params, weighting.init(LOSSES))
    assert bool(jnp.all(jnp.isfinite(grads["first"])))


@pytest.mark.parametrize("name", ["loss_weights", "num_updates", "num_skipped"])
def test_losses_named_as_fields_of_states(name):
    for losses in ({name: 1.0, "b": 2.0}, {"heads": {name: 1.0}, "b": 2.0}):
        with pytest.raises(ValueError, match=f"a loss cannot be named '{name}'"):
            weightings.every(weightings.scale_invariant(), 3).init(losses)


def test_gradients_of_no_parameters():
    for tx in (
        yoto.per_loss(optax.adam(0.1), 2),
        yoto.aggregate(weightings.upgrad(), 2),
        yoto.grad_drop(2),
    ):
        with pytest.raises(ValueError, match="the updates hold no arrays"):
            tx.update({}, tx.init({}), {})


HALF = np.float64(0.5)
WIDE = {
    "cagrad": weightings.cagrad(c=HALF),
    "gradvac": weightings.gradvac(decay=HALF),
    "grap": weightings.grap(
        "a", regularization=HALF, gramian_decay=HALF, norm_decay=HALF
    ),
    "grap_closed_form": weightings.grap_closed_form(
        "a", gramian_decay=HALF, norm_decay=HALF
    ),
    "auto_lambda": weightings.auto_lambda("a", step_size=HALF, downstream_weight=HALF),
}


@pytest.mark.filterwarnings("error::FutureWarning")
@pytest.mark.parametrize("name", WIDE)
def test_hyperparameters_wider_than_the_losses(name):
    """As from a sweep in NumPy, where JAX may have float64."""
    weighting = WIDE[name]
    with jax.enable_x64(True):
        losses = {name: jnp.float32(x) for name, x in LOSSES.items()}
        gramian = jnp.array([[4.0, -1.0], [-1.0, 1.0]], jnp.float32)
        known = {"gramian": gramian, "norms": jnp.sqrt(jnp.diagonal(gramian))}
        known |= {"alignment": gramian[0]}
        seen = {k: v for k, v in known.items() if k in weighting.needs}
        update = lambda state: weighting.update(losses, state, **seen)[1]
        start = weighting.init(losses)
        state, _ = jax.jit(
            lambda s: jax.lax.scan(lambda s, _: (update(s), None), s, length=3)
        )(start)
        assert int(state.num_updates) == 3
        assert all(x.dtype == jnp.float32 for x in state.loss_weights.values())


def test_losses_in_a_set():
    with pytest.raises(TypeError, match="a set of losses has no order"):
        yoto.init_loss_logits({"a", "b"}, "a")


def test_axes_of_masked_means_and_advantages():
    values, masks = {"a": jnp.ones(2)}, {"a": jnp.ones(2, bool)}
    with pytest.raises(ValueError, match="axis_name: 'd' is no axis"):
        yoto.masked_mean(values, masks, axis_name="d")
    with pytest.raises(ValueError, match="axis_name: 'd' is no axis"):
        yoto.group_advantages({"a": jnp.ones((2, 2))}, axis_name="d")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: weightings.dwa(window=2.5), "window must be an integer, got 2.5"),
        (
            lambda: weightings.imtl_l(optimizer=0.1),
            "optimizer must be an Optax transformation, got a float",
        ),
        (
            lambda: weightings.gradnorm(optimizer=optax.adam),
            "optimizer must be an Optax transformation, got a function",
        ),
    ],
)
def test_arguments_of_another_kind(make, message):
    with pytest.raises(TypeError, match=message):
        make()


def test_flags_that_are_none():
    with pytest.raises(TypeError, match="all_losses must be True or False"):
        yoto.on_validation(all_losses="no")


def test_a_part_that_is_not_there():
    with pytest.raises(TypeError, match="select must be a function .* got 'last'"):
        yoto.of_parameters(select="last")
    weighting = weightings.mgda()
    part = yoto.of_parameters(select=lambda p: p["decoder"])
    losses = lambda p: {"a": jnp.sum(p["w"]), "b": jnp.sum(p["w"] ** 2)}
    step = yoto.value_and_grad(losses, weighting, gradients=part)
    with pytest.raises(ValueError, match="no 'decoder' in them; their arrays are w"):
        step({"w": W}, weighting.init(LOSSES))


@pytest.mark.parametrize(
    "make",
    [
        lambda x: weightings.dwa(temperature=x),
        lambda x: weightings.cagrad(c=x),
        lambda x: weightings.fair_grad(alpha=x),
        lambda x: weightings.nash_mtl(max_norm=x),
        lambda x: weightings.smooth(weightings.equal(), decay=x),
        lambda x: weightings.normalize(weightings.equal(), decay=x),
        lambda x: yoto.OutlierRule(limit=x),
        lambda x: weightings.relobralo(alpha=x),
        lambda x: weightings.grap("a", regularization=x),
        lambda x: weightings.gradvac(decay=x),
        lambda x: weightings.uw_so(temperature=x),
        lambda x: weightings.cov(decay=x),
        lambda x: weightings.slaw(decay=x),
        lambda x: weightings.slaw(eps=x),
    ],
)
def test_hyperparameters_that_are_no_good_numbers(make):
    for bad in (np.float32(-1), jnp.float32(-1), float("nan"), -1):
        with pytest.raises(ValueError, match="must"):
            make(bad)
    with pytest.raises(TypeError, match="must be a number, got '0.5'"):
        make("0.5")


def test_keys():
    losses = {"a": 1.0}
    raw = weightings.random(key=jax.random.PRNGKey(3)).init(losses)
    typed = weightings.random(key=jax.random.key(3)).init(losses)
    assert raw.inner.key == typed.inner.key
    with pytest.raises(TypeError, match="key must be"):
        weightings.random(key=0.5).init(losses)


# Losses that are no tree of numbers.


@pytest.mark.parametrize(
    ("losses", "error", "message"),
    [
        (1.0, ValueError, "expected a tree of 'a', 'b', got one value without it"),
        (["a", "b"], TypeError, r"is the string 'a', .* dict\.fromkeys"),
        ({"a": 1, "b": 2}, TypeError, r"floating-point number, such as 0\.0"),
    ],
)
def test_losses_of_another_kind(losses, error, message):
    weighting = weightings.equal()
    with pytest.raises(error, match=message):
        weighting.update(losses, weighting.init(LOSSES))


# Gradients that are not stacked.


@pytest.mark.parametrize(
    "link",
    [
        yoto.aggregate(weightings.upgrad(), LOSSES),
        yoto.grad_drop(LOSSES),
        yoto.per_loss(optax.sgd(0.1), LOSSES),
    ],
    ids=["aggregate", "grad_drop", "per_loss"],
)
def test_a_gradient_whose_first_axis_happens_to_have_a_row_for_each_loss(link):
    params = {"w": jnp.ones((2, 3))}
    state = link.init(params)
    with pytest.raises(ValueError, match=r"value_and_jacobian .* \(2, 2, 3\), got"):
        link.update(params, state, params)
    rows = jax.tree.map(lambda x: jnp.stack([x, x]), params)
    link.update(rows, state, params)
    link.update(rows, state)  # Without parameters there is nothing to compare with.
