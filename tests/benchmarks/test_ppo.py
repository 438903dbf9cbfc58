"""PPO, on an environment of five squares in a row that needs no other package."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import yoto_jax as yoto
from benchmarks.harness.options import Options, UsageError
from benchmarks.harness.results import read_json, values
from benchmarks.tasks.ppo import report, run, task
from benchmarks.tasks.ppo.methods import CONSTANTS, LOSSES

pytestmark = pytest.mark.usefixtures("any_rank", "quick_compilation")

SQUARES, TIME = 5, 12


def observe(place):
    return jax.nn.one_hot(place, SQUARES)


def reset(key):
    del key
    state = (jnp.int32(1), jnp.int32(0))
    return observe(state[0]), state


def step(key, state, action):
    place, time = state
    place = jnp.clip(place + 2 * action - 1, 0, SQUARES - 1)
    terminated, truncated = place == SQUARES - 1, time + 1 >= TIME
    over = terminated | truncated
    first, start = reset(key)
    after = (jnp.where(over, start[0], place), jnp.where(over, start[1], time + 1))
    return task.Transition(
        jnp.where(over, first, observe(place)),
        jnp.where(terminated, 1.0, -0.05),
        terminated,
        truncated & ~terminated,
        observe(place),
    ), after


CORRIDOR = task.Environment(reset, step, 2)
SIZE = task.Size(30, 4, 16, 2, 2, 8, 1e-2)


def train(weighting, size=SIZE, seeds=1):
    one = functools.partial(task.train, CORRIDOR, size, weighting)
    return jax.jit(jax.vmap(one))(jnp.arange(seeds))


def test_advantages_are_sums_of_discounted_surprises():
    rng = np.random.default_rng(0)
    shape = (6, 2)
    value, following, reward = (rng.normal(size=shape) for _ in range(3))
    over = rng.uniform(size=shape) < 0.3
    none = np.zeros(shape)
    observed = np.zeros((*shape, 3))
    batch = task.batch_of(
        task.Seen(observed, none, none, value, following, reward, over, none)
    )
    surprise = reward + 0.99 * following - value
    expected = np.zeros(shape)
    for i in range(2):
        for t in range(6):
            factor = 1.0
            for s in range(t, 6):
                expected[t, i] += factor * surprise[s, i]
                if over[s, i]:
                    break
                factor *= 0.99 * 0.95
    np.testing.assert_allclose(batch.advantage, expected.ravel(), atol=1e-5)
    np.testing.assert_allclose(batch.target, (expected + value).ravel(), atol=1e-5)
    assert batch.observation.shape == (12, 3)


def test_what_follows_an_end_is_worth_nothing_and_what_follows_the_time_limit_is():
    model = task.init_model(jax.random.key(0), SQUARES, 2, 8)
    at = lambda place, time: task.Run(
        model,
        None,
        None,
        (jnp.array([place]), jnp.array([time])),
        observe(jnp.array([place])),
        jnp.zeros(1),
    )
    right = model["policy"] | {"w": jnp.zeros((8, 2)), "b": jnp.array([-50.0, 50.0])}
    model["policy"] = right
    _, ended = task.step(CORRIDOR, at(SQUARES - 2, 0), jax.random.key(0))
    assert ended.over[0]
    assert ended.following[0] == 0
    _, late = task.step(CORRIDOR, at(1, TIME - 1), jax.random.key(0))
    _, value = task.predict(model, observe(2))
    assert late.over[0]
    np.testing.assert_allclose(late.following[0], value, rtol=1e-6)


def test_losses_of_the_policy_that_acted():
    model = task.init_model(jax.random.key(0), SQUARES, 2, 8)
    seen = observe(jnp.arange(4))
    log_p, value = task.predict(model, seen)
    action = jnp.array([0, 1, 1, 0])
    chosen = log_p[jnp.arange(4), action]
    batch = task.Batch(seen, action, chosen, jnp.arange(4.0), value + 2.0)
    losses = task.loss_fn(model, batch)
    np.testing.assert_allclose(losses["policy"], 0, atol=1e-6)  # of mean 0
    np.testing.assert_allclose(losses["value"], 2.0, rtol=1e-6)
    np.testing.assert_allclose(losses["entropy"], -np.log(2), rtol=1e-3)
    # Its slope is the policy gradient, with normalised advantages.
    normal = (np.arange(4) - 1.5) / np.arange(4).std()
    slope = jax.grad(lambda m: task.loss_fn(m, batch)["policy"])(model)["policy"]["b"]
    p = np.exp(np.asarray(log_p))
    expected = -np.mean(normal[:, None] * (np.eye(2)[action] - p), axis=0)
    np.testing.assert_allclose(slope, expected, atol=1e-5)


def test_it_learns_to_walk():
    made = run.weightings()
    _, curves = train(made["value .05"], seeds=2)
    first = curves.total[:, :3].sum(1) / curves.episodes[:, :3].sum(1)
    last = curves.total[:, -3:].sum(1) / curves.episodes[:, -3:].sum(1)
    assert (last > 0.85).all()  # The shortest way has 0.9.
    assert (first < 0.7).all()


def test_constants_keep_their_weights_and_methods_for_errors_refuse():
    made, short = run.weightings(), SIZE._replace(updates=2)
    finished, curves = train(made["published"], short)
    np.testing.assert_allclose(curves.weights[0, -1], CONSTANTS["published"], rtol=1e-6)
    assert finished.weights.num_skipped == 0
    finished, _ = train(made["famo"], short)
    assert finished.weights.num_skipped == 2 * SIZE.epochs * SIZE.parts
    assert "grap" not in made
    assert "causal" not in made
    assert {"upgrad", "grad_norm_balance", "yoto", "share .1"} <= set(made)


def test_from_the_command_to_the_page(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(task, "gym", lambda name: CORRIDOR)
    monkeypatch.setattr(run, "ENVIRONMENTS", ("corridor",))
    options = Options(
        "ppo", methods=("published", "famo"), seeds=2, preset="quick", out=tmp_path
    )
    run.main(options)
    assert "Refuse losses that are not positive: famo." in capsys.readouterr().out
    result = read_json(tmp_path / "ppo.json")
    for method, skipped in (("published", 0.0), ("famo", 1.0)):
        found = values(result["records"], method=method, metric="skipped")
        np.testing.assert_array_equal(found, skipped)
        for metric in ("return", *(f"weight:{name}" for name in LOSSES)):
            assert len(values(result["records"], method=method, metric=metric)) == 2
    rows = report.table(result).rows
    assert [row[0] for row in rows] == ["published", "`famo`"]
    assert (tmp_path / "ppo.png").is_file()
    monkeypatch.setattr(run, "run", lambda *_: pytest.fail("it is there already"))
    run.main(Options(**vars(options) | {"resume": True}))


def test_without_gymnax_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gymnax", None)
    with pytest.raises(UsageError, match=r"pip install 'yoto_jax\[rl\]'"):
        task.gym("CartPole-v1")


def test_static_weights_of_zero_switch_a_loss_off():
    weighting = yoto.weightings.static({"policy": 1.0, "value": 0.0, "entropy": 0.0})
    finished, _ = train(weighting, SIZE._replace(updates=1))
    start = task.init_model(jax.random.key(0), SQUARES, 2, SIZE.width)
    moved = lambda part: bool(jnp.any(finished.model[part]["w"][0] != start[part]["w"]))
    assert moved("policy")
    assert not moved("value")
