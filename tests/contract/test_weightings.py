"""What every loss weighting of this package promises, and what the registry says.

The rows are those of the registry; wrappers have theirs here.
"""

import dataclasses
import functools
import inspect
import pathlib
import re
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import yoto_jax as yoto
from yoto_jax import weightings
from yoto_jax.testing import Trial, checks
from yoto_jax.weightings import _registry

pytestmark = pytest.mark.usefixtures("quick_compilation")

CHECKS = checks()


@dataclasses.dataclass(frozen=True)
class Row:
    """A weighting for losses of which the first is called ``first``."""

    make: Callable[[Any], yoto.LossWeighting]
    method: weightings.Method | None = None  # None: a wrapper
    at_least: int = 1  # losses that it takes
    order_matters: bool = False
    about: bool = False  # about the first loss


METHODS = weightings.methods()
WRAPPED = {
    "every": lambda first: weightings.every(weightings.imtl_g(), 2),
    "hold": lambda first: weightings.hold(
        weightings.grad_norm_balance(average="norms"), 3
    ),
    "smooth": lambda first: weightings.smooth(weightings.imtl_g(), decay=0.5),
    "log": lambda first: weightings.log(weightings.imtl_g()),
    "normalize": lambda first: weightings.normalize(weightings.famo()),
    "skip_outliers": lambda first: weightings.skip_outliers(weightings.imtl_g()),
    "all wrapped": lambda first: weightings.normalize(
        weightings.smooth(weightings.every(weightings.imtl_g(), 2), decay=0.5)
    ),
}
ROWS = {
    name: Row(
        method.example,
        method,
        method.smallest_count,
        method.order_matters,
        method.requires in ("primary", "reference", "downstream"),
    )
    for name, method in METHODS.items()
} | {name: Row(make) for name, make in WRAPPED.items()}


@pytest.fixture(scope="module", params=ROWS.values(), ids=list(ROWS))
def row(request):
    """Of module scope, so that a row's tests follow each other and share programs."""
    yield request.param
    trial_of.cache_clear()


@functools.cache
def trial_of(row, count=3):
    """The weighting of a row on a small problem; its programs are compiled once."""
    names = dict.fromkeys("abc"[:count], 0.0) if count <= 3 else [0.0] * count
    first = "a" if count <= 3 else 0
    about = first if row.about else None
    return Trial(row.make(first), names, about=about)


def unkeyed(tree):
    """Typed keys as numbers, which chex can compare."""
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return jax.tree.map(lambda x: jax.random.key_data(x) if is_key(x) else x, tree)


def assert_close(tree, reference, rtol=1e-5):
    chex.assert_trees_all_close(unkeyed(tree), unkeyed(reference), rtol=rtol, atol=1e-6)


# One test for each check, so that some can stand for all in `make test`.


def test_the_state_says_the_weights_and_counts(row):
    CHECKS["state"](trial_of(row))


def test_one_trace_and_the_same_types_ever_after(row):
    trial = trial_of(row)
    CHECKS["training"](trial)
    _, state, history = trial.train(6)
    assert all(weights.keys() == set("abc") for weights in history)
    updates = int(optax.tree.get(state, "num_updates"))
    assert updates == (3 if optax.tree.get(state, "step") is not None else 6)


def test_scan_under_vmap_equals_a_loop(row):
    CHECKS["scan and vmap"](trial_of(row))


@pytest.mark.parametrize(
    "name", ["random", "relobralo", "pcgrad", "grap", "all wrapped"]
)
def test_donation(name):
    trial = trial_of(ROWS[name])
    step, state = jax.jit(trial.value_and_grad(), donate_argnums=1), trial.init()
    for x in trial.batches[:3]:
        _, grads, state = step(trial.params, state, x)
    chex.assert_tree_all_finite(unkeyed((grads, state)))


@pytest.mark.parametrize("name", ["equal", "famo", "lr_annealing", "upgrad", "grap"])
def test_eager_equals_jit(name):
    CHECKS["eager"](trial_of(ROWS[name]))


def test_the_gradient_is_the_weighted_sum(row):
    CHECKS["gradient"](trial_of(row))


# Twenty gradients of fifteen parameters depend on each other.
@pytest.mark.parametrize("count", [1, 20])
def test_one_loss_and_twenty(row, count):
    trial = trial_of(row, max(count, row.at_least))
    CHECKS["training"](trial)
    weights = optax.tree.get(trial.stay(2)[-1], "loss_weights")
    assert len(jax.tree.leaves(weights)) == max(count, row.at_least)


def test_low_precision_and_double(row):
    CHECKS["precision"](trial_of(row))


def test_zero_gradients_give_finite_weights(row):
    CHECKS["zero gradients"](trial_of(row))


def test_a_bad_batch_changes_nothing_but_a_counter(row):
    CHECKS["bad batches"](trial_of(row))


def test_a_bad_number_changes_nothing_but_a_counter(row):
    CHECKS["bad numbers"](trial_of(row))


def test_absent_losses_leave_no_trace(row):
    CHECKS["absent losses"](trial_of(row))


def test_without_a_loss_the_weights_are_those_for_the_others(row):
    if not row.order_matters:
        CHECKS["fewer losses"](trial_of(row))


def test_losses_that_trade_places_trade_weights_unless_order_matters(row):
    if row.order_matters:
        with pytest.raises(AssertionError, match="order_matters=True"):
            CHECKS["order"](trial_of(row))
    else:
        CHECKS["order"](trial_of(row))


def test_nothing_is_promoted_in_silence(row):
    CHECKS["promotion"](trial_of(row))


def test_what_does_not_fit_is_an_error(row):
    CHECKS["errors"](trial_of(row))


def test_no_check_is_left_out():
    source = inspect.getsource(inspect.getmodule(test_no_check_is_left_out))
    assert all(f'CHECKS["{name}"]' in source for name in CHECKS)


def test_a_checkpoint_continues_bit_for_bit(row, tmp_path):
    trial = trial_of(row)
    weighting, step, params = trial.weighting, trial.step, trial.params
    _, _, state = trial.stay(3)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        losses = jax.eval_shape(trial.loss_fn, params, trial.batches[0])
        like = jax.eval_shape(weighting.init, losses)
        restored = checkpointer.restore(tmp_path / "state", like)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for x in trial.batches[3:5]:
        _, grads, state = step(params, state, x)
        _, again, restored = step(params, restored, x)
    chex.assert_trees_all_equal(again, grads)
    chex.assert_trees_all_equal(unkeyed(restored), unkeyed(state))


# One row for each way through the engine: pmap takes the same steps as shard_map.
PMAPPED = [
    ROWS[name]
    for name in ("equal", "famo", "gradnorm", "lr_annealing", "ntk", "pcgrad", "grap")
]
AUTO = (jax.sharding.AxisType.Auto,)
MESH = jax.make_mesh((8,), ("d",), axis_types=AUTO) if jax.device_count() >= 8 else None


@pytest.mark.skipif(MESH is None, reason="needs eight (virtual) devices")
def test_eight_devices_equal_one(row):
    trial = trial_of(row)
    f, one, options = trial.loss_fn, trial.step, {}
    if not set(trial.weighting.needs) <= {"losses", "ntk_diagonal"}:
        f = trial.heads
        options = {"gradients": yoto.of_representation(trial.encoder)}
        one = jax.jit(trial.value_and_grad(f, **options))
    many = trial.value_and_grad(f, axis_name="d", **options)
    ways: dict[str, Any] = {"shard_map": on_shards(many)}
    if row in PMAPPED:
        ways["pmap"] = on_replicas(many)
    # Placed as they come out: otherwise the second step is another program.
    everywhere = jax.sharding.NamedSharding(MESH, jax.P())
    params, first = jax.device_put((trial.params, trial.init()), everywhere)
    expected, got = trial.init(), dict.fromkeys(ways, first)
    for x in trial.batches[:2]:
        losses, grads, expected = one(trial.params, expected, x)
        for name, way in ways.items():
            out = way(params, got[name], x)
            got[name] = jax.device_put(out[2], everywhere)
            assert_close(out, (losses, grads, expected), rtol=1e-4)


def on_replicas(step):
    replicated = jax.pmap(step, axis_name="d", in_axes=(None, None, 0))
    return lambda params, state, x: jax.tree.map(
        lambda y: y[5], replicated(params, state, x.reshape(8, 2, 4))
    )


def on_shards(step):
    in_specs = jax.P(), jax.P(), jax.P("d")
    return jax.jit(jax.shard_map(step, mesh=MESH, in_specs=in_specs, out_specs=jax.P()))


# The registry tells the truth.

methods = pytest.mark.parametrize(
    "row", [ROWS[name] for name in METHODS], ids=list(METHODS), indirect=True
)


def after_updates(trial, count=4, change=lambda seed, batch: None):
    """Weights (K,) after some updates, with batches that are changed on the way."""
    state = trial.init()
    for seed in range(count):
        change(seed, batch := trial.batch(seed))
        weights, state = trial.tell(batch, state)
    return np.stack(jax.tree.leaves(weights))


def turn_first(batch):
    """Against the first gradient no combination of the others goes any more."""
    gramian = batch.statistics["gramian"]
    gramian[0] *= -1
    gramian[:, 0] *= -1


@methods
def test_weights_depend_on_what_a_method_needs_and_on_nothing_else(row):
    method, trial = row.method, trial_of(row)
    assert trial.weighting.needs == (method.needs or ("losses",))
    prepare = turn_first if method.name == "grap_closed_form" else lambda batch: None
    plain = after_updates(trial, change=lambda seed, batch: prepare(batch))
    for what in {"losses", *method.needs}:

        def change(seed, batch, what=what):
            prepare(batch)
            x = batch.losses if what == "losses" else batch.statistics[what]
            factors = np.exp(np.random.default_rng(seed).normal(size=len(x)))
            x *= factors
            if x.ndim > 1:
                x *= factors[:, None]

        changed = not np.array_equal(after_updates(trial, change=change), plain)
        assert changed == (what in method.needs), what


@methods
def test_losses_that_a_method_does_not_accept_are_skipped(row):
    accepts, trial = row.method.accepts, trial_of(row)
    for value, accepted in ((0.0, accepts != "positive"), (-1.0, accepts == "any")):
        batch, state = trial.batch(0), trial.init()
        batch.losses[1] = value
        _, state = trial.tell(batch, state)
        assert (int(state.num_skipped) == 0) == accepted
        if not accepted:
            losses = dict(zip("abc", batch.losses.tolist(), strict=True))
            seen = jax.tree.map(jnp.float32, batch.statistics)
            with pytest.raises(ValueError, match=f"loss 'b' is {value:.4g}"):
                trial.weighting.update(losses, trial.init(), **seen)


@methods
def test_the_sum_of_weights_is_as_the_registry_says(row):
    sums = [after_updates(trial_of(row), count).sum() for count in (2, 4)]
    known = {"1": 1, "K": 3}
    found = [name for name, total in known.items() if np.allclose(sums, total)]
    assert (found or ["free"]) == [row.method.sum_of_weights]


@methods
def test_weights_are_negative_where_the_registry_says_so(row):
    method = row.method
    if method.properties:  # which are tested by themselves
        positive = "non-negative weights" in method.properties
        assert method.negative_weights == (not positive)
        return
    trial = trial_of(row)
    if method.name == "auto_lambda":  # It takes long to get there at its own pace.
        trial = Trial(method.example("a", optimizer=optax.sgd(1.0)), about="a")
    state, least = trial.init(), np.inf
    for seed in range(19):
        weights, state = trial.tell(trial.batch(seed), state)
        least = min(least, *map(float, jax.tree.leaves(weights)))
    assert (least < 0) == method.negative_weights


@methods
def test_signature_state_and_papers_are_as_the_registry_says(row):
    method = row.method
    parameters = inspect.signature(method.factory).parameters.values()
    required = [p.name for p in parameters if p.default is p.empty]
    assert required == ([method.requires] if method.requires else [])
    options = {"form": "log"} if method.name == "stch" else {}
    inner = method.example("a", **options).init({"a": 1.0, "b": 1.0}).inner
    assert (method.state is None) == (inner == ()) == (method.remembers == "nothing")
    if method.state is not None:
        assert type(inner) is getattr(weightings, method.state)
    text = " ".join(inspect.getdoc(method.factory).split())
    assert method.papers
    for paper in method.papers:
        assert f"`{paper.title} <{paper.url}>`_, {paper.year}" in text
        assert paper.author in text.split("References:")[1]


@methods
def test_properties_agree_with_what_else_the_registry_says(row):
    method = row.method
    gramian = method.needs == ("gramian",) and method.requires is None
    assert bool(method.properties) == (gramian or method.name == "equal")
    if method.properties:
        permutes = "permutation equivariant" in method.properties
        assert permutes == (not method.order_matters)


def test_methods_that_need_two_losses_say_so():
    for method in METHODS.values():
        if method.smallest_count > 1:
            with pytest.raises(ValueError, match="besides the downstream one"):
                method.example("a").init({"a": 1.0})


def test_what_the_registry_names_is_there_and_nothing_else():
    stated = {method.state for method in METHODS.values()} - {None}
    stated |= {wrapper.state for wrapper in _registry.WRAPPERS}
    helpers = {helper for method in METHODS.values() for helper in method.helpers}
    wrappers = {wrapper.name for wrapper in _registry.WRAPPERS}
    own = {"Method", "Paper", "methods"}
    assert {*weightings.__all__} == {*METHODS} | stated | helpers | wrappers | own
    assert wrappers == {*WRAPPED} - {"all wrapped"}
    for wrapper in _registry.WRAPPERS:
        state = WRAPPED[wrapper.name]("a").init({"a": 1.0, "b": 1.0})
        assert type(state) is getattr(weightings, wrapper.state)
    with pytest.raises(TypeError):
        METHODS["mine"] = METHODS["famo"]


def test_the_files_of_methods_are_those_of_the_registry():
    folder = pathlib.Path(weightings.__file__).parent
    shared = {"__init__", "_averages", "_bounds", "_inner_optimizer", "_registry"}
    shared |= {"_grap_statistics"}
    found = {path.stem for path in folder.glob("*.py")} - shared
    assert found == {*_registry.HOMES.values()} - shared


def test_type_checkers_see_the_names_of_the_registry():
    source = inspect.getsource(weightings)
    lines = re.findall(
        r"from yoto_jax\.weightings\.(\w+) import \(?\s*(\w+) as \2\b", source
    )
    seen = {name: module for module, name in lines if module != "_registry"}
    wanted = {
        f"from yoto_jax.weightings.{module} import {name} as {name}"
        for name, module in _registry.HOMES.items()
        if seen.get(name) != module
    }
    assert not wanted, "to go under TYPE_CHECKING in yoto_jax/weightings/__init__.py"
    assert seen == dict(_registry.HOMES)
