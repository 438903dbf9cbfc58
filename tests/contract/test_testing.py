"""The checks for writers of weightings catch weightings that break a promise."""

import ast
import itertools
import pathlib
import sys

import jax
import jax.numpy as jnp
import pytest

import yoto_jax as yoto
from yoto_jax import testing
from yoto_jax.testing import Trial, check_weighting, checks

pytestmark = pytest.mark.usefixtures("quick_compilation")

BASE = yoto.make_weighting(
    lambda spec: spec.full(1.0),
    lambda losses, mean, spec: (losses / spec.sum(losses), 0.9 * mean + 0.1 * losses),
)


def caught(weighting, check, message):
    """The check fails with this message, and ``check_weighting`` fails too."""
    with pytest.raises(AssertionError, match=message):
        checks()[check](Trial(weighting))
    with pytest.raises(AssertionError):
        check_weighting(weighting)


def updating(change):
    """A weighting whose weights and state are changed after each update."""

    def update(losses, state, **kwargs):
        weights, new = BASE.update(losses, state, **kwargs)
        return change(weights, new, losses, state)

    def with_present(losses, state, *, present=None, **seen):
        return update(losses, state, present=present, **seen)

    return BASE._replace(update=with_present)


def test_a_weighting_that_keeps_all_promises_passes():
    check_weighting(BASE)
    check_weighting(BASE, losses=[0.0, {"deep": 0.0}])


def test_nan_that_is_not_guarded():
    def update(losses, state, *, present=None):
        _, new = BASE.update(losses, state, present=present)
        total = sum(jax.tree.leaves(losses))
        weights = jax.tree.map(lambda x: x / total, losses)
        return weights, new._replace(loss_weights=weights)

    weighting = BASE._replace(update=update)
    caught(weighting, "bad batches", "must leave the state as it was but for num_skip")
    caught(weighting, "bad numbers", "a loss of nan must leave the state as it was")


def test_skipped_batches_that_are_not_counted():
    weighting = updating(
        lambda weights, new, losses, old: (
            weights,
            new._replace(num_skipped=old.num_skipped),
        )
    )
    caught(weighting, "bad batches", "at 'num_skipped'|at '.*num_skipped'")


def test_a_state_whose_dtype_changes():
    weighting = updating(
        lambda weights, new, losses, old: (
            weights,
            new._replace(num_updates=new.num_updates.astype(jnp.float32)),
        )
    )
    caught(weighting, "training", "one trace is enough|must keep its types")


def test_a_step_that_is_compiled_anew():
    """The state turns weakly typed: as wrong as another dtype, and as hard to see."""

    def init(losses):
        state = BASE.init(losses)
        return state._replace(inner=jax.lax.full_like(state.inner, 1.0))

    def change(weights, new, losses, old):
        weak = jnp.asarray(1.0) * 1.0
        assert weak.weak_type
        return weights, new._replace(
            loss_weights=jax.tree.map(lambda w: weak, new.loss_weights)
        )

    weighting = updating(change)._replace(init=init)
    caught(weighting, "training", "one trace is enough for all steps, 2 were made")


def test_weights_of_another_structure():
    weighting = updating(
        lambda weights, new, losses, old: (
            weights,
            new._replace(loss_weights=jnp.stack(jax.tree.leaves(weights))),
        )
    )
    with pytest.raises((AssertionError, TypeError, ValueError)):
        check_weighting(weighting)


def test_a_state_that_does_not_say_the_weights():
    weighting = yoto.LossWeighting(
        lambda losses: {"count": jnp.int32(0)},
        lambda losses, state, *, present=None: (losses, state),
    )
    caught(weighting, "state", "loss_weights of the state are missing")


def test_a_state_that_is_not_made_of_arrays():
    weighting = BASE._replace(init=lambda losses: BASE.init(losses)._replace(inner=1.0))
    caught(weighting, "state", "must hold arrays alone, 'inner' is a float")


def test_an_absent_loss_that_leaves_a_trace():
    def update(losses, state, *, present=None):
        _, new = BASE.update(losses, state)  # as if all were there
        weights = new.loss_weights
        if present is not None:
            weights = jax.tree.map(lambda w, p: jnp.where(p, w, 0), weights, present)
        return weights, new

    weighting = BASE._replace(update=update)
    caught(weighting, "absent losses", "an absent loss of nan leaves a trace: state")


def test_an_absent_loss_whose_row_decays():
    def update(losses, state, *, present=None):
        weights, new = BASE.update(losses, state, present=present)
        return weights, new._replace(inner=0.9 * new.inner)

    weighting = BASE._replace(update=update)
    caught(weighting, "absent losses", "the row of an absent loss in the state")


def test_an_absent_loss_that_has_a_weight():
    weighting = updating(lambda weights, new, losses, old: (new.loss_weights, new))
    caught(weighting, "absent losses", "the weight of an absent loss must be 0")


def test_a_sum_over_absent_losses():
    weighting = yoto.make_weighting(
        lambda spec: (), lambda losses, inner, spec: (losses / losses.sum(), inner)
    )
    caught(weighting, "fewer losses", "must be those for the others alone")


def test_a_method_made_for_so_many_losses_passes():
    weighting = yoto.make_weighting(
        lambda spec: spec.vector("scales", [1.0, 2.0, 3.0]),
        lambda losses, scales, spec: (losses * scales, scales),
    )
    checks()["fewer losses"](Trial(weighting))


def test_an_update_that_knows_no_absent_losses():
    weighting = BASE._replace(update=lambda losses, state: BASE.update(losses, state))
    caught(weighting, "absent losses", "update must take present=")


def test_a_weighting_that_draws_on_the_host():
    numbers = itertools.count(1)
    weighting = updating(
        lambda weights, new, losses, old: (
            weights,
            new._replace(inner=new.inner + 0 * next(numbers)),
        )
    )
    checks()["training"](Trial(weighting))  # one trace, one number: nothing to see
    drawn = updating(
        lambda weights, new, losses, old: (
            weights,
            new._replace(inner=new.inner + next(numbers)),
        )
    )
    with pytest.raises(AssertionError, match="a step without jit"):
        checks()["eager"](Trial(drawn))


def test_half_precision_that_stays():
    weighting = yoto.LossWeighting(
        lambda losses: BASE.init(losses)._replace(
            loss_weights=jax.tree.map(
                lambda x: jnp.ones((), jnp.result_type(x)), losses
            )
        ),
        lambda losses, state, *, present=None: (state.loss_weights, state),
    )
    message = "weights of losses in bfloat16 must be float32, '.*' is bfloat16"
    caught(weighting, "precision", message)
    caught(weighting, "promotion", message)


def test_weights_by_position():
    weighting = yoto.make_weighting(
        lambda spec: (),
        lambda losses, inner, spec: (jnp.cumsum(spec.full(1.0)), inner),
    )
    caught(weighting, "order", "losses that trade places")
    check_weighting(weighting, order_matters=True)


def test_an_error_that_names_nothing():
    def update(losses, state, *, present=None):
        if jax.tree.structure(losses) != jax.tree.structure(state.loss_weights):
            raise ValueError("wrong")
        return BASE.update(losses, state, present=present)

    weighting = BASE._replace(update=update)
    caught(weighting, "errors", "error for other losses must name .stranger.: wrong")


def test_no_error_at_all():
    def update(losses, state, *, present=None):
        known = set(losses) == set("abc")
        losses = losses if known else dict.fromkeys("abc", jnp.float32(1.0))
        return BASE.update(losses, state, present=present)

    weighting = BASE._replace(update=update)
    caught(weighting, "errors", "losses must be a ValueError or a TypeError, none")


def test_statistics_of_the_users_own():
    weighting = yoto.make_weighting(
        lambda spec: (),
        lambda losses, inner, spec, *, costs: (1 / (1 + costs), inner),
        needs=("costs",),
    )
    check_weighting(weighting)
    told = Trial(weighting, statistics={"costs": lambda params, x: jnp.arange(3.0)})
    losses, _, state = told.stay(1)
    assert state.loss_weights == pytest.approx(dict(a=1.0, b=1 / 2, c=1 / 3))
    assert losses.keys() == set("abc")


def test_a_weighting_that_is_never_due():
    weighting = BASE._replace(due=lambda state: jnp.asarray(False))
    with pytest.raises(AssertionError, match="due\\(state\\) was False 200 times"):
        checks()["bad numbers"](Trial(weighting))


def test_it_imports_neither_pytest_nor_chex():
    for path in pathlib.Path(testing.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [node.module]
            known = {"jax", "numpy", "optax", "yoto_jax", *sys.stdlib_module_names}
            assert {name.split(".")[0] for name in modules} <= known
            assert not isinstance(node, ast.Assert)  # python -O would drop it


def test_what_update_returns_is_checked():
    losses = {"a": 1.0, "b": 2.0}
    wrong = {
        r"weights of shape \(2,\), got \(7,\)": lambda x, i, s: (jnp.ones(7), i),
        r"weights of shape \(2,\), got \(\)": lambda x, i, s: (jnp.float32(1), i),
        "keep structure and shapes of its inner": lambda x, i, s: (x, jnp.ones(2)),
    }
    for message, update in wrong.items():
        weighting = yoto.make_weighting(lambda spec: jnp.zeros(()), update)
        with pytest.raises(ValueError, match=message):
            weighting.update(losses, weighting.init(losses))


def test_what_make_weighting_is_given_is_checked():
    with pytest.raises(TypeError, match="tuple of names, such as"):
        yoto.make_weighting(lambda s: (), lambda x, i, s: (x, i), needs="norms")
    weighting = yoto.make_weighting(lambda s: 0, lambda x, i, s: (x, i + 1))
    assert not weighting.init((1.0, 2.0)).inner.weak_type
    with pytest.raises(TypeError, match="weighting must be a LossWeighting"):
        testing.check_weighting(yoto.weightings.grap)
