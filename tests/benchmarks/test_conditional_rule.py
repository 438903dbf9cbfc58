"""One conditional model of a task, and the weights that are chosen for it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.harness import conditional as rules
from benchmarks.harness.conditional import Chosen, Conditional
from benchmarks.harness.runs import CHOOSING, Run, Runs
from benchmarks.harness.training import _compile, prepare
from benchmarks.harness.variations import Softmax
from tests.benchmarks.test_experiment import LANES, NAMES, STEPS, TASK

pytestmark = pytest.mark.usefixtures("quick_compilation")

BOUNDS = ((0.1, 10.0), (0.05, 20.0))
TRAINED = Conditional(BOUNDS, groups=3)
ALL = {
    "validation": Chosen(TRAINED),
    "narrowed": Chosen(TRAINED, narrowing=True),
    "yoto": Chosen(TRAINED, "yoto"),
    "grap": Chosen(TRAINED, "grap"),
    "gradient": Chosen(TRAINED, "gradient"),
}


def split(batch):
    """Without what is not an array over examples."""
    return batch._replace(held_out=jnp.full(len(batch.x), batch.held_out))


CUT = dataclasses.replace(TASK, draw=lambda data, key: split(TASK.draw(data, key)))


@pytest.fixture(scope="module")
def carry():
    """The model, trained in all lanes with different seeds."""
    configs, seeds = TRAINED.configure([{}] * LANES), jnp.arange(LANES)
    program = prepare(CUT, TRAINED, configs, LANES)
    carry = program.init(seeds, configs)
    for _ in range(program.chunks):
        carry, _ = program.advance(carry, CUT.data, seeds, configs)
    return carry


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    runs = Runs(CUT, ALL, folder, resume=False, planned=LANES * len(ALL))
    return {
        name: runs.finish([Run(name, seed) for seed in range(LANES)], name)
        for name in ALL
    }


def test_without_a_range_it_is_training_with_constant_weights():
    fixed = Conditional(((0.5, 0.5), (2.0, 2.0)))
    softmax = Softmax()
    models = []
    for rule, config in (
        (fixed, {}),
        (softmax, {"ratios": (0.5, 2.0), "learn": False}),
    ):
        arrays, seeds = rule.configure([config] * LANES), jnp.arange(LANES)
        program = prepare(TASK, rule, arrays, LANES)
        carry = program.init(seeds, arrays)
        for _ in range(program.chunks):
            carry, _ = program.advance(carry, TASK.data, seeds, arrays)
        models.append(carry.model)
    expected = models[1]
    for name, leaf in models[0]["net"].items():
        np.testing.assert_allclose(leaf, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_the_chosen_weights_have_sum_1_and_are_in_the_support(finished, name):
    for done in finished[name]:
        weights = np.array([done.values[f"weight:{n}", None] for n in NAMES])
        np.testing.assert_allclose(weights.sum(), 1, rtol=1e-4)
        for ratio, (low, high) in zip(weights[1:] / weights[0], BOUNDS, strict=True):
            assert low * 0.999 <= ratio <= high * 1.001
        assert done.values[CHOOSING, None] >= 0
        assert len(done.history["step"]) == STEPS


def test_validation_takes_the_best_of_the_grid(carry):
    chosen = ALL["validation"].best(CUT, carry)
    support = TRAINED.support(CUT)
    grid = support.grid(5)
    for lane in range(LANES):
        trained = jax.tree.map(lambda x, lane=lane: x[lane], carry.model)
        scores = []
        for i in range(25):
            weights = {name: grid[name][i] for name in NAMES}
            model = TRAINED.model(CUT, trained, weights)
            one = jax.tree.map(lambda x: x[None], model)
            scores.append(CUT.validate(one)[0])
        best = int(np.argmax(scores))
        for name in NAMES:
            np.testing.assert_allclose(chosen[name][lane], grid[name][best], rtol=1e-5)


def test_narrowing_halves_the_ranges_around_the_best(carry):
    rule = ALL["narrowed"]
    assert rule.after(CUT, carry, 5, 10) is carry  # not due
    assert ALL["validation"].after(CUT, carry, 4, 10) is carry
    narrowed = rule.after(CUT, carry, 4, 10).rule
    best = rule.best(CUT, carry)
    names = narrowed.names
    for k, name in enumerate(names):
        low, high = np.log(narrowed.low[:, k]), np.log(narrowed.high[:, k])
        if name == "fit":
            np.testing.assert_allclose(low, high)
            continue
        bounds = np.log(dict(zip(NAMES[1:], BOUNDS, strict=True))[name])
        np.testing.assert_allclose(high - low, 0.5 * np.diff(bounds)[0], rtol=1e-4)
        assert np.all(low >= bounds[0] - 1e-4)
        assert np.all(high <= bounds[1] + 1e-4)
        at = np.log(best[name])
        assert np.all((low - 1e-4 <= at) & (at <= high + 1e-4))


def test_the_held_out_gradient_leads_to_a_better_held_out_objective(carry):
    seeds = jnp.arange(LANES)
    models, _ = ALL["gradient"].finish(CUT, carry, seeds)
    middle = {"fit": jnp.ones(LANES)} | {
        name: jnp.full(LANES, float(np.sqrt(low * high)))
        for name, (low, high) in zip(NAMES[1:], BOUNDS, strict=True)
    }
    before = rules._all_models(TRAINED, CUT, carry.model, middle)
    x, y = CUT.data[1]

    def held_out(models):
        def of_one(model):
            batch = split(experiment_batch(x, y))
            return CUT.downstream(model, CUT.encode(model, batch), batch)

        return jax.vmap(of_one)(models)

    assert np.all(held_out(models) < held_out(before))


def experiment_batch(x, y):
    kind = type(TASK.draw(TASK.data, jax.random.key(0)))
    return kind(x, y, jnp.float32(1))


def test_all_ways_to_choose_share_the_programs_of_training(finished):
    del finished
    before = _compile.cache_info()
    configs = TRAINED.configure([{}] * LANES)
    for rule in ALL.values():
        prepare(CUT, rule, configs, LANES)
    after = _compile.cache_info()
    assert after.misses == before.misses


def test_the_same_run_again_is_the_same(finished, tmp_path):
    runs = Runs(CUT, ALL, tmp_path, resume=False, planned=LANES)
    again = runs.finish([Run("yoto", seed) for seed in range(LANES)], "again")
    for first, second in zip(finished["yoto"], again, strict=True):
        values = dict(first.values), dict(second.values)
        for each in values:
            each.pop((CHOOSING, None))
        assert values[0] == values[1]
