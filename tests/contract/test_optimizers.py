"""What every transformation of this package promises; a new one is a new row."""

import dataclasses
import functools
import inspect
import itertools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import yoto_jax as yoto

pytestmark = pytest.mark.usefixtures("quick_compilation")


@dataclasses.dataclass(frozen=True)
class Row:
    factory: Callable[..., optax.GradientTransformation]
    kwargs: dict[str, Any]
    optimizes: bool = True  # or is a link in a chain

    def make(self, **kwargs):
        return self.factory(**{**self.kwargs, **kwargs})


ROWS = {
    "add_hyperparameter_decay": Row(
        yoto.add_hyperparameter_decay, {"hyperparameter_decay": 0.5}, optimizes=False
    ),
    "sgdw": Row(
        yoto.sgdw,
        {"learning_rate": 0.02, "weight_decay": 1e-4, "hyperparameter_decay": 0.5},
    ),
    "adamw": Row(yoto.adamw, {"learning_rate": 0.02, "hyperparameter_decay": 0.5}),
}


def partitioned(tx):
    labels = yoto.label_loss_logits
    return optax.partition({"loss_logits": tx, "model": optax.adam(0.02)}, labels)


def masked(tx):
    is_mu = lambda x: isinstance(x, yoto.LossLogits)
    mask = lambda params: jax.tree.map(is_mu, params, is_leaf=is_mu)
    return optax.masked(tx, mask)


def leafwise_masked(tx):
    """Matrices alone: what is left of loss logits is empty."""
    return optax.masked(tx, lambda params: jax.tree.map(lambda x: x.ndim > 1, params))


def leafwise_partition(tx):
    """Labels by path, which know nothing of loss logits."""
    label = lambda path, _: "some" if "w" in jax.tree_util.keystr(path) else "rest"
    labels = lambda params: jax.tree_util.tree_map_with_path(label, params)
    return optax.partition({"some": tx, "rest": optax.adam(0.02)}, labels)


def frozen(tx):
    freeze = lambda params: jax.tree.map(lambda x: x.ndim == 1, params)
    return optax.selective_transform(tx, freeze_mask=freeze)


FORMS: dict[str, Callable[[Any], Any]] = {
    "bare": lambda tx: tx,
    "chain": lambda tx: optax.chain(optax.clip_by_global_norm(10.0), tx),
    "named_chain": lambda tx: optax.named_chain(("a", optax.identity()), ("b", tx)),
    "partition": partitioned,
    "masked": masked,
    "multi_steps": lambda tx: optax.MultiSteps(tx, 2),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 5),
    "conditional": lambda tx: optax.conditionally_transform(tx, lambda step: step < 99),
    "extra_args": optax.with_extra_args_support,
    "leaf-wise mask": leafwise_masked,
    "leaf-wise partition": leafwise_partition,
    "frozen": frozen,
}

BRANCHING = [FORMS[name] for name in ("multi_steps", "apply_if_finite", "conditional")]

MU = yoto.init_loss_logits({"a": 0.0, "b": 0.0, "c": 0.0}, "b")
TREES: dict[str, Any] = {
    "plain": {"w": jnp.linspace(-1, 1, 3), "mu": MU},
    "none": {"w": jnp.ones(3), "activation": None, "deep": [{"mu": MU, "bias": None}]},
    "two": {"w": jnp.ones(()), "heads": (MU, MU)},
    "alone": MU,
    "without": {"w": jnp.ones((2, 2)), "b": None},
    "empty": {},
    "one loss": {"w": jnp.ones(2), "mu": yoto.init_loss_logits({"a": 0.0}, "a")},
    "forty": {"w": jnp.ones(2), "mu": yoto.init_loss_logits([0.0] * 40, 7)},
}

rows = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
trees = pytest.mark.parametrize("params", TREES.values(), ids=TREES)
# What the optimizers warn of is tested with them; here they are to work all the same.
without_logits = pytest.mark.filterwarnings("ignore:the parameters hold no LossLogits")
in_16_bits = pytest.mark.filterwarnings("ignore:the loss logits are")


def gradients(params, scale=0.1):
    return jax.tree.map(lambda x: jnp.cos(x) * jnp.asarray(scale, x.dtype), params)


def types(tree):
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(x.shape, x.dtype, x.weak_type) for x in leaves]


# Every form on the tree of a user, and the plain form on every tree: all with all
# is left to `make test-all`.
PAIRS = [
    pytest.param(
        form,
        params,
        id=f"{tree}-{name}",
        marks=[] if name == "bare" or tree in ("plain", "none") else pytest.mark.slow,
    )
    for name, form in FORMS.items()
    for tree, params in TREES.items()
]


@without_logits
@rows
@pytest.mark.parametrize(("form", "params"), PAIRS)
def test_every_form_works_on_every_tree(row, form, params):
    tx = form(row.make())
    # Without jit a branch is compiled anew in every step.
    update = jax.jit(tx.update) if form in BRANCHING else tx.update
    state = tx.init(params)
    for _ in range(3):
        updates, new_state = update(gradients(params), state, params)
        assert jax.tree.structure(updates) == jax.tree.structure(params)
        assert types(new_state) == types(state)
        chex.assert_tree_all_finite(updates)
        state = new_state
    optax.apply_updates(params, updates)


@rows
@forms
def test_one_trace_over_100_steps(row, form):
    chex.clear_trace_counter()  # It counts by name, over all tests.
    tx = form(row.make())
    params = TREES["plain"]

    @jax.jit
    @chex.assert_max_traces(1)
    def step(params, state):
        updates, state = tx.update(gradients(params), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(100):
        params, state = step(params, state)
    chex.assert_tree_all_finite(params)


@rows
def test_unknown_extra_arguments_are_tolerated(row):
    tx = row.make()
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    params = TREES["plain"]
    tx.update(gradients(params), tx.init(params), params, unknown=3)
    assert list(inspect.signature(tx.update).parameters)[:3] == [
        "updates",
        "state",
        "params",
    ]


@without_logits
@rows
@trees
def test_map_params(row, params):
    """Optax finds the copies of the parameters in the state, loss logits included."""
    tx = row.make()
    state = tx.init(params)
    mapped = optax.tree.map_params(tx, lambda x: x + 1, state)
    assert jax.tree.structure(mapped) == jax.tree.structure(state)
    if row.factory is yoto.adamw:
        for new, old in zip(
            jax.tree.leaves(optax.tree.get(mapped, "nu")),
            jax.tree.leaves(optax.tree.get(state, "nu")),
            strict=True,
        ):
            np.testing.assert_array_equal(new, old + 1)


@rows
@pytest.mark.parametrize("scheduled", [False, True])
def test_inject_hyperparams_equals_plain(row, scheduled):
    kwargs = {
        name: optax.constant_schedule(value) if scheduled else value
        for name, value in row.kwargs.items()
    }
    plain, injected = row.make(), optax.inject_hyperparams(row.factory)(**kwargs)
    params = TREES["plain"]
    plain_state, state = plain.init(params), injected.init(params)
    for _ in range(3):
        expected, plain_state = jax.jit(plain.update)(
            gradients(params), plain_state, params
        )
        updates, state = jax.jit(injected.update)(gradients(params), state, params)
        chex.assert_trees_all_close(updates, expected, rtol=1e-5)
        # An injected b2 is a float32 array, and 1 - b2 loses digits of it.
        chex.assert_trees_all_close(state.inner_state, plain_state, rtol=1e-4)
    assert set(row.kwargs) <= set(state.hyperparams)


@rows
def test_schedules_wherever_they_are_annotated(row):
    parameters = inspect.signature(row.factory).parameters
    names = [n for n, p in parameters.items() if p.annotation == optax.ScalarOrSchedule]
    params = TREES["plain"]
    assert names
    for name in names:
        value = row.kwargs.get(name, 0.0)
        results = []
        for argument in (value, optax.constant_schedule(value)):
            tx = row.make(**{name: argument})
            state = tx.init(params)
            for _ in range(2):
                updates, state = tx.update(gradients(params), state, params)
            results.append(updates)
        chex.assert_trees_all_close(*results, rtol=1e-6)


@in_16_bits
@rows
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_updates_keep_their_dtype(row, dtype):
    params = jax.tree.map(lambda x: x.astype(dtype), TREES["plain"])
    mixed = {"w": params["w"], "mu": MU}
    for tree in (params, mixed):
        tx = row.make()
        updates, _ = tx.update(gradients(tree), tx.init(tree), tree)
        chex.assert_trees_all_equal_dtypes(updates, tree)


@rows
def test_gradient_accumulation_waits(row):
    tx = optax.MultiSteps(row.make(), every_k_schedule=4)
    params = TREES["plain"]
    state = tx.init(params)
    for step in range(4):
        updates, state = tx.update(gradients(params), state, params)
        zero = all(not jnp.any(u) for u in jax.tree.leaves(updates))
        assert zero == (step < 3)


@in_16_bits
@rows
@pytest.mark.parametrize(
    ("dtype", "x64"),
    [
        *itertools.product(["bfloat16", "float16", "float32"], [False, True]),
        ("float64", True),
    ],
)
def test_state_types_are_stable_inside_cond(row, dtype, x64):
    with jax.enable_x64(x64):
        params = jax.tree.map(lambda x: x.astype(dtype), TREES["plain"])
        tx = row.make()
        state = tx.init(params)

        def update(params, state):
            updates, state = tx.update(gradients(params), state, params)
            return optax.apply_updates(params, updates), state

        new = jax.jit(
            lambda p, s: jax.lax.cond(True, update, lambda p, s: (p, s), p, s)
        )(params, state)
        assert types(new) == types((params, state))


OPTIMIZERS = [name for name, row in ROWS.items() if row.optimizes]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("shape", [(), (2,), (2, 2)], ids=str)
def test_optimizers_converge_on_a_parabola(name, shape):
    tx = ROWS[name].make(weight_decay=0.0)
    target = jnp.full(shape, 0.7)
    losses = lambda w: {"fit": jnp.sum((w - target) ** 2), "size": jnp.sum(w**2) + 9.0}
    params = {"w": jnp.zeros(shape), "mu": yoto.init_loss_logits(losses(target), "fit")}

    def step(carry, _):
        params, state = carry
        grads = jax.grad(lambda p: yoto.composite_loss(losses(p["w"]), p["mu"]))(params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), length=3000)
    np.testing.assert_allclose(params["w"], target, atol=3e-2)
    # The logit of a loss that never falls sinks as deep as the decay lets it.
    assert params["mu"].learned[0] < np.log(0.1)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_donation(name):
    tx = ROWS[name].make()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state):
        updates, state = tx.update(gradients(params), state, params)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.copy, TREES["two"])
    state = tx.init(params)
    for _ in range(3):
        params, state = step(params, state)
    chex.assert_tree_all_finite(params)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_bad_batch_changes_nothing_under_apply_if_finite(name, bad):
    tx = optax.apply_if_finite(ROWS[name].make(), max_consecutive_errors=10)
    losses = lambda w, x: {"a": (w * x - 1.0) ** 2, "b": w**2 + 0.5, "c": (w - 3) ** 2}
    params = {"w": jnp.float32(0.5), "mu": MU}

    @jax.jit
    def step(params, state, x):
        objective = lambda p: yoto.composite_loss(losses(p["w"], x), p["mu"])
        updates, state = tx.update(jax.grad(objective)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    batches = [1.0, 2.0, bad, bad, 1.5, 1.0]
    for x in batches:
        before = params, state.inner_state
        params, state = step(params, state, x)
        if not np.isfinite(x):
            chex.assert_trees_all_equal((params, state.inner_state), before)
            assert not state.last_finite
    assert state.total_notfinite == 2
    # The run goes on as if the bad batches had never come.
    clean, clean_state = {"w": jnp.float32(0.5), "mu": MU}, tx.init(params)
    for x in (1.0, 2.0, 1.5, 1.0):
        clean, clean_state = step(clean, clean_state, x)
    chex.assert_trees_all_equal(params, clean)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_vmap_over_seeds_equals_single_runs(name):
    tx = ROWS[name].make()
    params = jax.vmap(lambda key: {"w": jax.random.normal(key, (3,)), "mu": MU})(
        jax.random.split(jax.random.key(0), 4)
    )

    def run(params):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(gradients(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), length=10)[0][0]

    together = jax.vmap(run)(params)
    for k in range(4):
        single = run(jax.tree.map(lambda x: x[k], params))
        chex.assert_trees_all_close(
            jax.tree.map(lambda x: x[k], together), single, rtol=1e-6
        )
