"""Learned learning rates: every program is the optimizer that it is called."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import yoto_jax as yoto
from benchmarks import __main__ as command_line
from benchmarks.harness.results import read_json
from benchmarks.tasks.learning_rate import report, run, task
from benchmarks.tasks.learning_rate.guards import Guard, guarded
from benchmarks.tasks.learning_rate.methods import ARMS

pytestmark = pytest.mark.usefixtures("any_rank", "quick_compilation")

CURVATURES = jnp.array([1.0, 0.3, 0.02])
STEPS = 30


def follow(tx, steps=STEPS):
    """Parameters and logarithms of the factor, on noisy gradients."""

    def step(carry, key):
        w, state = carry
        slope = CURVATURES * w + 0.1 * jax.random.normal(key, w.shape)
        updates, state = tx.update(slope, state, w)
        carry = optax.apply_updates(w, updates), state
        return carry, (carry[0], state.log_scale)

    start = jnp.array([1.0, -2.0, 3.0])
    keys = jax.random.split(jax.random.key(0), steps)
    return jax.jit(lambda: jax.lax.scan(step, (start, tx.init(start)), keys))()[1]


def test_without_a_guard_it_is_the_library():
    expected = follow(yoto.by_hypergradient(optax.adam(1e-3), 0.3))
    found = follow(guarded(optax.adam(1e-3), Guard(rate=0.3)))
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
    assert expected[1][-1] > 1


def test_guards_do_what_they_say():
    inner = optax.adam(0.5)
    plain = follow(guarded(inner, Guard(rate=0.3)))[1]
    assert plain.min() < -0.5
    floor = follow(guarded(inner, Guard(rate=0.3, low=0.0)))[1]
    assert floor.min() == 0
    band = follow(guarded(inner, Guard(rate=0.3, band=1.0)))[1]
    assert not jnp.any(band)
    halved = np.diff(follow(guarded(inner, Guard(rate=0.3, halve=0.3)))[1])
    assert np.isclose(halved, -np.log(2)).any()
    assert np.all(np.isclose(halved, -np.log(2)) | (halved > -0.1))
    mean = follow(guarded(inner, Guard(rate=0.3, decay=0.9)))[1]
    assert np.abs(np.diff(mean)).max() < np.abs(np.diff(plain)).max()
    late = follow(guarded(inner, Guard(rate=0.3, start=-2.0)))[1]
    assert late[0] == -2


def test_lanes_are_runs_of_optax():
    """One lane of each program against a plain loop on the same batches."""
    problem, noise = task.make("digits", "quick")
    falling = task.schedule(1.0, 20)
    rate = lambda peak: lambda count: peak * falling(count + 1)
    adamw = lambda rate: optax.adamw(rate, weight_decay=1e-4)
    made = {
        "cosine": adamw(rate(3e-3)),
        "hyper": yoto.by_hypergradient(adamw(3e-3), 0.03),
        "mechanize": optax.contrib.mechanize(adamw(rate(3e-3))),
        "prodigy": optax.contrib.prodigy(rate(1.0), weight_decay=1e-4),
        "dadapt": optax.contrib.dadapt_adamw(rate(1.0), weight_decay=1e-4),
    }
    names, groups = run.lanes_of(made, 3e-3)
    assert noise
    outcome = task.train("digits", "quick", groups, range(2), 20, 20)
    one = problem.task
    data = one.of_seed(one.data, jnp.int32(1))
    for method, tx in made.items():
        model = one.init(jax.random.key(1))
        mu = yoto.init_loss_logits(dict.fromkeys(one.names, 0.0), one.primary)
        tx = optax.partition(
            {"model": tx, "loss_logits": yoto.adamw(task.LOGITS_RATE)},
            yoto.label_loss_logits,
        )

        def step(carry, number, tx=tx):
            params, state = carry
            key = jax.random.fold_in(jax.random.key(1), number)
            batch = one.draw(data, key)

            def objective(params):
                losses, _ = one.losses_of(params["model"], batch)
                return yoto.composite_loss(losses, params["mu"]), sum(losses.values())

            grads, total = jax.grad(objective, has_aux=True)(params)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), total

        params = {"model": model, "mu": mu}
        carry = params, tx.init(params)
        _, totals = jax.jit(lambda c, s=step: jax.lax.scan(s, c, jnp.arange(20)))(carry)
        lane = names.index((method, "learned", 1.0))
        np.testing.assert_allclose(outcome.loss[1, lane], totals, rtol=1e-3)


def test_blocks_of_seeds_become_one_line_for_each_lane():
    assert run.blocks(10, None) == [range(10)]
    assert run.blocks(7, 3) == [range(0, 3), range(3, 6), range(6, 7)]
    one = {"problem": "mnist1d", "factor": 0.1, "test": [1.0, 2.0], "log_scale": [0.5]}
    two = one | {"test": [3.0], "log_scale": [-0.5]}
    both = one | {"test": [1.0, 2.0, 3.0], "log_scale": [0.5, -0.5]}
    assert run.joined([[one, two], [two, two]])[0] == both
    with pytest.raises(ValueError, match="shorter"):
        run.joined([[one, two], [two]])


def test_the_quick_preset_writes_what_its_report_reads(tmp_path):
    size = "--preset quick --seeds 2 --methods constant,hyper,prodigy,band"
    command_line.main(f"learning_rate {size} --out {tmp_path}".split())
    result = read_json(tmp_path / "learning_rate.json")
    rows = {row[0]: row[1:] for row in report.table(result).rows}
    assert len(rows) == 4
    assert all(rows["constant rate"])
    assert [bool(cell) for cell in rows["`prodigy` and cosine"]] == [
        False,
        False,
        True,
        False,
    ] * 2
    assert len(report.conclusions(result)) == 2 * len(ARMS)
    assert (tmp_path / "learning_rate.png").stat().st_size > 1000
