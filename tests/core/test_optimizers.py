import dataclasses
import inspect

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import yoto_jax as yoto
from tests.oracles import paper

AUXILIARY = 3


def schedule(t):
    return 1 / (1 + t / 50)


def train(problem, tx, steps, epsilon=0.1, dtype=jnp.float32):
    """Train with the library on the problem that the oracle is given."""
    centres, scales, floors = (
        jnp.array(x, dtype) for x in (problem.centres, problem.scales, problem.floors)
    )

    def losses(w):
        distances = jnp.sum((w[None, :] - centres) ** 2, axis=-1)
        return tuple(scales * distances + floors)

    mu = yoto.init_loss_logits(
        losses(jnp.zeros(centres.shape[1], dtype)), 0, epsilon=epsilon
    )
    mu = dataclasses.replace(
        mu, learned=jnp.full(mu.learned.shape, np.log(epsilon), dtype)
    )
    params = {"w": jnp.full(centres.shape[1], 2.0, dtype), "mu": mu}

    def step(carry, _):
        params, state = carry
        grads = jax.grad(lambda p: yoto.composite_loss(losses(p["w"]), p["mu"]))(params)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), (params["w"], params["mu"].learned)

    run = jax.jit(lambda carry: jax.lax.scan(step, carry, length=steps))
    return run((params, tx.init(params)))[1]


def start(problem, epsilon=0.1):
    w = np.full(problem.centres.shape[1], 2.0)
    return w, np.array([0.0] + [np.log(epsilon)] * (len(problem.centres) - 1))


@pytest.mark.parametrize("entropy", ["all", "auxiliary"])
@pytest.mark.parametrize("x64", [False, True])
def test_sgdw_is_algorithm_1(x64, entropy):
    problem = paper.Quadratics(AUXILIARY + 1, dim=5, seed=0)
    expected = paper.algorithm_1(
        problem,
        start(problem),
        200,
        lr=0.02,
        beta1=0.9,
        weight_decay=0.05,
        rho=0.7,
        schedule=schedule,
        entropy=entropy,
    )
    tx = yoto.sgdw(
        lambda t: 0.02 * schedule(t.astype(float)),
        momentum=0.9,
        weight_decay=0.05,
        hyperparameter_decay=0.7,
        entropy=entropy,
    )
    with jax.enable_x64(x64):
        w, mu = train(problem, tx, 200, dtype=jnp.float64 if x64 else jnp.float32)
    tolerance = 1e-12 if x64 else 1e-6
    np.testing.assert_allclose(
        w, [w for w, _ in expected], rtol=tolerance, atol=tolerance
    )
    np.testing.assert_allclose(
        mu, [mu[1:] for _, mu in expected], rtol=tolerance, atol=tolerance
    )
    assert all(mu[0] == 0.0 for _, mu in expected)


@pytest.mark.parametrize("x64", [False, True])
def test_adamw_is_its_adam_form(x64):
    problem = paper.Quadratics(AUXILIARY + 1, dim=5, seed=1)
    expected = paper.algorithm_1_adamw(
        problem,
        start(problem),
        200,
        lr=0.02,
        b1=0.9,
        b2=0.999,
        eps=1e-8,
        weight_decay=0.05,
        rho=2.0,
        schedule=schedule,
    )
    tx = yoto.adamw(
        lambda t: 0.02 * schedule(t.astype(float)),
        weight_decay=0.05,
        hyperparameter_decay=2.0,
    )
    with jax.enable_x64(x64):
        w, mu = train(problem, tx, 200, dtype=jnp.float64 if x64 else jnp.float32)
    # Where a gradient passes through zero, Adam's quotient loses digits in float32.
    tolerance = 1e-10 if x64 else 2e-5
    np.testing.assert_allclose(w, [w for w, _ in expected], rtol=0, atol=tolerance)
    np.testing.assert_allclose(
        mu, [mu[1:] for _, mu in expected], rtol=0, atol=tolerance
    )


def test_a_constant_rate_equals_a_constant_schedule():
    problem = paper.Quadratics(3, dim=2, seed=2)
    for factory in (yoto.sgdw, yoto.adamw):
        constant = train(
            problem, factory(0.02, weight_decay=0.1, hyperparameter_decay=0.5), 30
        )
        schedule = train(
            problem,
            factory(
                optax.constant_schedule(0.02),
                weight_decay=optax.constant_schedule(0.1),
                hyperparameter_decay=optax.constant_schedule(0.5),
            ),
            30,
        )
        np.testing.assert_allclose(constant[0], schedule[0], rtol=1e-6)
        np.testing.assert_allclose(constant[1], schedule[1], rtol=1e-6)


def test_without_loss_logits_they_are_the_optimizers_of_optax():
    params = {"w": jnp.linspace(-1, 1, 6), "none": None}
    grads = jax.tree.map(lambda x: x**2 - 0.3, params)
    pairs = [
        (yoto.adamw(0.1, weight_decay=0.01), optax.adamw(0.1, weight_decay=0.01)),
        (yoto.sgdw(0.1), optax.sgd(0.1, momentum=0.9)),
    ]
    for ours, theirs in pairs:
        results = []
        with pytest.warns(UserWarning, match="hold no LossLogits"):
            starts = [(tx, tx.init(params)) for tx in (ours, theirs)]
        for tx, state in starts:
            p = params
            for _ in range(5):
                updates, state = tx.update(grads, state, p)
                p = optax.apply_updates(p, updates)
            results.append(p["w"])
        np.testing.assert_allclose(*results, rtol=1e-6)


LINKS = {
    "adamw": yoto.adamw(0.1),
    "sgdw": yoto.sgdw(0.1),
    "link": optax.chain(yoto.add_hyperparameter_decay(0.5), optax.sgd(0.1)),
}


def with_logits():
    return {"w": jnp.ones(2), "mu": yoto.init_loss_logits((0.0, 0.0), 0)}


@pytest.mark.parametrize("tx", LINKS.values(), ids=LINKS)
def test_logits_that_nothing_would_decay_are_warned_of(tx):
    params = with_logits()
    flat, _ = jax.flatten_util.ravel_pytree(params)
    for lost in (
        lambda: optax.flatten(tx).init(params),
        lambda: tx.init(flat),
        lambda: tx.init({"w": params["w"]}),
        lambda: jax.eval_shape(tx.init, {"w": params["w"]}),
    ):
        with pytest.warns(UserWarning, match="hold no LossLogits") as caught:
            lost()
        assert len(caught) == 1
        for words in ("optax.flatten", "label_loss_logits", "hyperparameter_decay=0"):
            assert words in str(caught[0].message)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("tx", LINKS.values(), ids=LINKS)
def test_logits_that_cannot_take_small_steps_are_warned_of(tx, dtype):
    low = jax.tree.map(lambda x: x.astype(dtype), with_logits())
    with pytest.warns(UserWarning, match=f"logits are {jnp.dtype(dtype).name}.*cast"):
        state = tx.init(low)
    # It is true: a step of an optimizer at 1e-3 leaves them where they are.
    updates, _ = tx.update(jax.tree.map(lambda x: 3e-3 * x, low), state, low)
    small = jax.tree.map(lambda u: (1e-4 * jnp.sign(u)).astype(u.dtype), updates)
    moved = optax.apply_updates(low, small)
    np.testing.assert_array_equal(moved["mu"].learned, low["mu"].learned)


def test_parts_of_the_parameters_are_not_warned_of():
    """Pytest makes an error of every warning."""
    params = with_logits()
    model = {"w": params["w"]}
    halves = lambda params: {"w": "a", "mu": "b"}
    leafwise = {"w": True, "mu": jax.tree.map(lambda _: False, params["mu"])}
    for tx in (
        optax.partition({"a": yoto.adamw(0.1), "b": yoto.sgdw(0.1)}, halves),
        optax.masked(yoto.adamw(0.1), {"w": True, "mu": False}),
        optax.masked(yoto.adamw(0.1), leafwise),
        optax.partition(
            {"model": optax.flatten(optax.adam(0.1)), "loss_logits": yoto.adamw(0.1)},
            yoto.label_loss_logits,
        ),
        optax.inject_hyperparams(yoto.adamw)(0.1),
    ):
        tx.init(params)
    for factory in (yoto.adamw, yoto.sgdw):
        factory(0.1, hyperparameter_decay=0).init(model)
        factory(0.1).init({})
        optax.tree.map_params(factory(0.1), lambda x: x, factory(0.1).init(params))
    low = {"w": params["w"].astype(jnp.bfloat16), "mu": params["mu"]}
    yoto.adamw(0.1).init(low)


@pytest.mark.parametrize(
    ("ours", "theirs", "kwargs"),
    [
        (yoto.adamw, optax.adamw, {"nesterov": True, "weight_decay": 0.1}),
        (yoto.adamw, optax.adamw, {"eps_root": 1e-2, "eps": 1e-3}),
        (yoto.adamw, optax.adamw, {"mu_dtype": jnp.bfloat16, "b1": 0.5, "b2": 0.7}),
        (yoto.sgdw, optax.sgd, {"momentum": 0.5, "nesterov": True}),
        (yoto.sgdw, optax.sgd, {"momentum": 0.5, "accumulator_dtype": jnp.bfloat16}),
    ],
)
def test_every_option_of_optax_arrives(ours, theirs, kwargs):
    params = {"w": jnp.linspace(-1, 1, 6)}
    results = []
    for factory, options in ((ours, kwargs), (theirs, kwargs), (ours, {})):
        ours_only = {} if factory is theirs else {"hyperparameter_decay": 0.0}
        tx = factory(0.1, **options, **ours_only)
        p, state = params, tx.init(params)
        for _ in range(5):
            grads = jax.tree.map(lambda x: x**2 - 0.3, p)
            updates, state = tx.update(grads, state, p)
            p = optax.apply_updates(p, updates)
        results.append(p["w"])
    # With bfloat16 momentum, scaling before or after it rounds differently.
    rtol = 1e-2 if "accumulator_dtype" in kwargs else 1e-6
    np.testing.assert_allclose(results[0], results[1], rtol=rtol)
    assert not np.allclose(results[0], results[2], rtol=1e-5)


def test_adamw_hands_on_the_entropy():
    mu = yoto.init_loss_logits((0.0, 0.0, 0.0), 0, epsilon=[0.2, 3.0])
    full, learned = np.append(0.0, np.array(mu.learned, float)), np.arange(3) > 0
    for entropy in ("all", "auxiliary"):
        tx = yoto.adamw(1.0, hyperparameter_decay=2.0, entropy=entropy)
        updates, _ = tx.update(jax.tree.map(jnp.zeros_like, mu), tx.init(mu), mu)
        slope = paper.regularizer_gradient(full, learned, entropy)[learned]
        np.testing.assert_allclose(updates.learned, -2 * slope, rtol=1e-5)


def test_one_loss_leaves_the_plain_optimizer():
    """With nothing to weigh, the model moves as without us, bit for bit."""
    params = {"w": jnp.linspace(-1, 1, 6)}
    loss = lambda w: jnp.sum((w - 0.3) ** 2)
    mu = yoto.init_loss_logits({"only": 0.0}, "only")
    plain, ours = optax.adamw(0.1), yoto.adamw(0.1)
    joint = {**params, "mu": mu}
    plain_state, joint_state = plain.init(params), ours.init(joint)
    for _ in range(20):
        grads = jax.grad(lambda p: loss(p["w"]))(params)
        updates, plain_state = plain.update(grads, plain_state, params)
        params = optax.apply_updates(params, updates)
        grads = jax.grad(
            lambda p: yoto.composite_loss({"only": loss(p["w"])}, p["mu"])
        )(joint)
        updates, joint_state = ours.update(grads, joint_state, joint)
        joint = optax.apply_updates(joint, updates)
    np.testing.assert_array_equal(params["w"], joint["w"])


@pytest.mark.parametrize("factory", [yoto.sgdw, yoto.adamw])
@pytest.mark.parametrize(
    "mask",
    [
        None,
        {"w": True, "b": False, "mu": True},
        lambda params: jax.tree.map(lambda x: x.ndim > 0, params),
        lambda params: {"w": True, "b": False, "mu": True},
    ],
    ids=["none", "prefix", "callable", "callable-prefix"],
)
def test_weight_decay_never_touches_loss_logits(factory, mask):
    params = {
        "w": jnp.ones(2),
        "b": jnp.ones(()),
        "mu": yoto.init_loss_logits((0.0, 0.0), 0),
    }
    tx = factory(0.1, weight_decay=0.5, hyperparameter_decay=0.0, mask=mask)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zeros, tx.init(params), params)
    np.testing.assert_allclose(updates["w"], -0.05, rtol=1e-6)
    np.testing.assert_allclose(updates["b"], -0.05 if mask is None else 0, rtol=1e-6)
    np.testing.assert_array_equal(updates["mu"].learned, 0.0)


@pytest.mark.parametrize("model", [optax.lion(0.01), optax.contrib.muon(0.05)])
@pytest.mark.parametrize("joint", [True, False])
def test_other_optimizers(model, joint):
    """One optimizer for all with the link in front, or one of its own for mu."""
    if joint:
        tx = optax.chain(yoto.add_hyperparameter_decay(0.3), model)
    else:
        tx = optax.partition(
            {"model": model, "loss_logits": yoto.adamw(0.02)}, yoto.label_loss_logits
        )
    target = jax.random.normal(jax.random.key(0), (4, 3))
    losses = lambda w: {"fit": jnp.mean((w - target) ** 2), "size": jnp.mean(w**2)}
    params = {
        "w": jnp.zeros((4, 3)),
        "mu": yoto.init_loss_logits(losses(target), "fit"),
    }

    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda p: yoto.composite_loss(losses(p["w"]), p["mu"]))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(200):
        params, state = step(params, state)
    assert losses(params["w"])["fit"] < 0.05 * losses(jnp.zeros((4, 3)))["fit"]
    assert abs(params["mu"].learned[0] - np.log(0.1)) > 0.05
    assert np.isfinite(params["mu"].learned).all()


def test_labels():
    mu = yoto.init_loss_logits((0.0, 0.0), 0)
    params = {"a": jnp.ones(2), "b": [None, mu], "c": {}}
    assert yoto.label_loss_logits(params) == {
        "a": "model",
        "b": [None, "loss_logits"],
        "c": {},
    }
    assert yoto.label_loss_logits(mu) == "loss_logits"


def test_exponential_weights_collapse_and_softmax_does_not():
    """The paper's argument: dL/dmu_i = exp(mu_i) l_i > 0 shrinks every weight."""
    losses = jnp.array([1.0, 1.0, 1.0])

    def descend(loss):
        step = lambda mu, _: (mu - 0.1 * jax.grad(loss)(mu), None)
        return jax.lax.scan(step, jnp.zeros(3), length=10_000)[0]

    exponential = descend(lambda mu: jnp.exp(mu) @ losses)
    assert np.exp(exponential).sum() < 0.01

    def softmax_loss(mu):
        logits = yoto.LossLogits(mu[1:], jax.tree.structure((0.0,) * 3), 0)
        return yoto.composite_loss(tuple(losses), logits)

    np.testing.assert_allclose(descend(softmax_loss), 0.0, atol=1e-6)


@pytest.mark.parametrize("factory", [yoto.sgdw, yoto.adamw])
@pytest.mark.parametrize(
    "options",
    [
        {name: value}
        for name in ("learning_rate", "weight_decay", "hyperparameter_decay")
        for value in (-0.1, np.nan, np.float32(np.inf), "0.1", [0.1], np.ones(2))
    ]
    + [{"momentum": x, "b1": x} for x in (1.0, -0.1, np.float32(np.nan), None)]
    + [{"b2": 1.0, "momentum": 2}, {"eps": -1e-8, "momentum": "0.9"}],
    ids=str,
)
def test_rates_that_cannot_be(factory, options):
    taken = inspect.signature(factory).parameters
    options = {name: value for name, value in options.items() if name in taken}
    (name, _) = next(iter(options.items()))
    with pytest.raises((TypeError, ValueError), match=f"{name} must be .*, got"):
        factory(**{"learning_rate": 0.1, **options})


@pytest.mark.parametrize("factory", [yoto.sgdw, yoto.adamw])
def test_errors(factory):
    with pytest.raises(ValueError, match="hyperparameter_decay must be.*-1"):
        factory(0.1, hyperparameter_decay=-1.0)
    with pytest.raises(ValueError, match="weight_decay must be.*inf"):
        factory(0.1, weight_decay=float("inf"))
    with pytest.raises(ValueError, match="entropy must be"):
        factory(0.1, entropy="none")
    of_moments = "mu_dtype" if factory is yoto.adamw else "accumulator_dtype"
    with pytest.raises(TypeError, match=f"{of_moments} must be a floating-point"):
        factory(0.1, **{of_moments: jnp.int32})
    with pytest.raises(TypeError, match="mask must hold True and False, got 'w'"):
        factory(0.1, mask="w").init(with_logits())
    with pytest.raises(TypeError, match="hyperparameter_decay must be.*None"):
        factory(0.1, hyperparameter_decay=None)
    params = {"mu": yoto.init_loss_logits((0.0, 0.0), 0)}
    tx = factory(0.1)
    with pytest.raises(ValueError, match="needs the current loss logits"):
        tx.update(params, tx.init(params))


@pytest.mark.parametrize("optimizer", [yoto.adamw, yoto.sgdw])
def test_a_schedule_of_the_decay_keeps_the_dtype_of_updates(optimizer):
    params = {"w": jnp.ones(2, jnp.bfloat16), "mu": MU_AB}
    tx = optimizer(1e-2, weight_decay=optax.linear_schedule(0.1, 0.01, 10))
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    kinds = lambda tree: [x.dtype for x in jax.tree.leaves(tree)]
    assert kinds(updates) == kinds(params)


@pytest.mark.parametrize(
    ("ours", "theirs", "kwargs"),
    [
        (yoto.adamw, optax.adamw, {"weight_decay": 1e-3}),
        (yoto.sgdw, optax.sgd, {"momentum": 0.9}),
    ],
)
def test_bfloat16_gradients_of_float32_parameters_make_float32_updates(
    ours, theirs, kwargs
):
    params, grads = {"w": jnp.ones(3)}, {"w": jnp.array([1.0, 0.3, -2.0], jnp.bfloat16)}
    found = []
    for tx in (ours(1e-3, hyperparameter_decay=0, **kwargs), theirs(1e-3, **kwargs)):
        state = tx.init(params)
        for _ in range(3):
            updates, state = tx.update(grads, state, params)
        found.append(updates["w"])
    assert found[0].dtype == jnp.float32
    # SGD has the learning rate inside the momentum: the product is one more bfloat16.
    np.testing.assert_allclose(*found, rtol=1e-6 if ours is yoto.adamw else 2**-8)


MU_AB = yoto.init_loss_logits({"a": 0.0, "b": 0.0}, "a")


@pytest.mark.parametrize("optimizer", [yoto.adamw, yoto.sgdw])
def test_logits_of_other_losses_have_a_tree_each_of_what_is_there(optimizer):
    params = {
        "one": MU_AB,
        "two": yoto.init_loss_logits({"c": 0.0, "d": 0.0}, "c"),
        "again": MU_AB,
    }
    grads = jax.tree.map(jnp.ones_like, params)
    tx = optimizer(1e-2)
    state = tx.init(params)
    there = [{"c": True, "d": True}, {"a": True, "b": False}]
    present = jax.tree.map(jnp.asarray, there)
    updates, _ = tx.update(grads, state, params, present=present)
    assert not updates["one"].learned.any()
    assert not updates["again"].learned.any()
    assert updates["two"].learned.all()
    with pytest.raises(ValueError, match="present do not match those of the losses"):
        tx.update(grads, state, params, present=present[:1])


@pytest.mark.parametrize("optimizer", [yoto.adamw, yoto.sgdw])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_logits_of_the_same_losses_have_a_tree_each_in_their_order(optimizer, order):
    params = {"one": MU_AB, "two": MU_AB}
    grads = jax.tree.map(jnp.ones_like, params)
    tx = optimizer(1e-2)
    there = [{"a": True, "b": False}, {"a": True, "b": True}]
    present = jax.tree.map(jnp.asarray, [there[k] for k in order])
    state = tx.init(params)
    updates, _ = tx.update(grads, state, params, present=present)
    moved = [bool(updates[name].learned.any()) for name in ("one", "two")]
    assert moved == [there[k]["b"] for k in order]
    alone = {"one": MU_AB, "two": MU_AB}
    for name, own in zip(("one", "two"), present, strict=True):
        ones = jax.tree.map(jnp.ones_like, MU_AB)
        alone[name], _ = tx.update(ones, tx.init(MU_AB), MU_AB, present=own)
    np.testing.assert_array_equal(
        *[[x.learned for x in tree.values()] for tree in (updates, alone)]
    )
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), grads)
    again, _ = tx.update(low, state, params, present=present)
    for name, update in again.items():
        np.testing.assert_allclose(update.learned, updates[name].learned, atol=1e-4)
    part = optax.masked(tx, {"one": True, "two": False})
    with pytest.raises(ValueError, match="2 trees for the losses 'a', 'b'"):
        part.update(grads, part.init(params), params, present=present)
