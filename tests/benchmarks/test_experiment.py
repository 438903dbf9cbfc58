"""What trains runs in lanes: its arithmetic, and that nothing is lost or repeated."""

import dataclasses
import functools
import json
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import yoto_jax as yoto
from benchmarks.harness import grids, timing
from benchmarks.harness import lanes as lane_devices
from benchmarks.harness import runs as engine
from benchmarks.harness.options import UsageError
from benchmarks.harness.rules import Weighted
from benchmarks.harness.runs import HISTORY_POINTS, Run, Runs, settings, thinned
from benchmarks.harness.training import DOWNSTREAM, Carry, Task, prepare
from benchmarks.harness.variations import Softmax, Switches
from benchmarks.tasks.digits import task as digits_task

pytestmark = pytest.mark.usefixtures("quick_compilation")

STEPS, LANES, CHUNKS = 20, 3, 10
NAMES = ("fit", "size", "other")
RATIOS = (0.5, 2.0)


# A task small enough to be differentiated by hand.


class Batch(NamedTuple):
    x: Any  # [n, 3]
    y: Any  # [n]
    held_out: Any  # 1 if it is


@functools.cache
def examples():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 24, 3)).astype(np.float32)
    y = (x @ np.float32([1.0, -1.0, 0.5]) + 0.1).astype(np.float32)
    return tuple((jnp.asarray(x[i]), jnp.asarray(y[i])) for i in range(2))


def init(key):
    keys = jax.random.split(key, 4)
    return {
        "encoder": jax.random.normal(keys[0], (3, 2)),
        "fit": jax.random.normal(keys[1], (2,)),
        "other": jax.random.normal(keys[2], (2,)),
        "steer": jax.random.normal(keys[3], (2,)),  # of the downstream loss alone
    }


def draw_from(place, data, key):
    x, y = data[place]
    chosen = jax.random.randint(key, (6,), 0, len(x))
    return Batch(x[chosen], y[chosen], jnp.float32(place))


def encode(model, batch):
    return batch.x @ model["encoder"]


def losses(model, z, batch):
    return {
        "fit": jnp.mean((z @ model["fit"] - batch.y) ** 2),
        "size": jnp.mean(z**2),
        "other": jnp.mean((z @ model["other"] - batch.x[:, 0]) ** 2),
    }


def downstream(model, z, batch):
    return jnp.mean((z @ (model["fit"] + model["steer"]) - batch.y) ** 2)


@jax.jit
def error(models):
    def of_one(model):
        return jnp.stack(
            [losses(model, x @ model["encoder"], Batch(x, y, 0))["fit"]
             for x, y in examples()]
        )  # fmt: skip

    return jax.vmap(of_one)(models)


def evaluate(models):
    seen, shifted = np.asarray(error(models)).T
    return {("error", "seen"): seen, ("error", "shifted"): shifted}


def validate(models):
    return -evaluate(models)["error", "shifted"]


TASK = Task(
    name="toy",
    settings={"steps": STEPS},
    primary="fit",
    auxiliary=("size", "other"),
    data=examples(),
    init=init,
    draw=functools.partial(draw_from, 0),
    draw_held_out=functools.partial(draw_from, 1),
    encode=encode,
    losses=losses,
    downstream=downstream,
    validate=validate,
    test=evaluate,
    steps=STEPS,
    learning_rate=0.1,
    weight_decay=0.01,
    lanes=LANES,
)
SOFTMAX = Softmax()


class Trained(NamedTuple):
    model: dict[str, np.ndarray]
    mu: Any
    losses: np.ndarray  # [steps, 3]
    weights: np.ndarray  # [steps, 3]
    state: Any


def train(rule, configs, seeds, data=TASK.data):
    """Models and curves of runs, lane by lane."""
    arrays, seeds = rule.configure(configs), jnp.asarray(seeds)
    program = prepare(TASK, rule, arrays, len(configs))
    carry, parts = program.init(seeds, arrays), []
    for _ in range(program.chunks):
        carry, seen = program.advance(carry, data, seeds, arrays)
        parts.append(seen)
    curves, weights = (np.concatenate(x) for x in zip(*parts, strict=True))
    return [
        Trained(
            jax.tree.map(lambda x: np.asarray(x[i]), carry.model),
            jax.tree.map(lambda x: np.asarray(x[i]), getattr(carry.rule, "mu", None)),
            curves[:, i],
            weights[:, i],
            jax.tree.map(lambda x: np.asarray(x[i]), carry.rule),
        )
        for i in range(len(configs))
    ]


def train_one(config, seed=0):
    """One run, in the middle of others that are different."""
    other = {
        "ratios": (1.0, 1.0),
        "factors": np.ones(np.size(config.get("factors", 1))),
    }
    return train(SOFTMAX, [other, {"ratios": RATIOS} | config, other], [5, seed, 6])[1]


def batches(seed):
    keys = [jax.random.fold_in(jax.random.key(seed), t) for t in range(STEPS)]
    return [TASK.draw(TASK.data, key) for key in keys]


# The softmax rule is the library's optimizers.


def by_library(optimizer, seed=0, ratios=RATIOS):
    """Model, logits, and weights over time, with an optimizer of both together."""
    mu = yoto.init_loss_logits(
        dict.fromkeys(NAMES, 0.0),
        "fit",
        epsilon=dict(zip(NAMES[1:], ratios, strict=True)),
    )
    params = {"model": init(jax.random.key(seed)), "mu": mu}
    drawn = jax.tree.map(lambda *x: jnp.stack(x), *batches(seed))

    def objective(params, batch):
        model = params["model"]
        return yoto.composite_loss(
            losses(model, encode(model, batch), batch), params["mu"]
        )

    def step(carry, batch):
        params, state = carry
        weights = yoto.loss_weights(params["mu"])
        updates, state = optimizer.update(
            jax.grad(objective)(params, batch), state, params
        )
        seen = jnp.stack([weights[name] for name in NAMES])
        return (optax.apply_updates(params, updates), state), seen

    (params, _), weights = jax.jit(functools.partial(jax.lax.scan, step))(
        (params, optimizer.init(params)), drawn
    )
    return params, np.asarray(weights)


def constant_logits():
    return optax.partition(
        {
            "model": optax.adamw(TASK.schedule, weight_decay=TASK.weight_decay),
            "loss_logits": optax.set_to_zero(),
        },
        yoto.label_loss_logits,
    )


def logits_by_momentum(rho):
    return optax.partition(
        {
            "model": optax.adamw(TASK.schedule, weight_decay=TASK.weight_decay),
            "loss_logits": yoto.sgdw(TASK.schedule, hyperparameter_decay=rho),
        },
        yoto.label_loss_logits,
    )


def adamw(**options):
    return yoto.adamw(TASK.schedule, weight_decay=TASK.weight_decay, **options)


@pytest.mark.parametrize(
    ("config", "optimizer"),
    [
        ({}, lambda: adamw()),
        ({"rho": 0.3}, lambda: adamw(hyperparameter_decay=0.3)),
        ({"rho": 0.0}, lambda: adamw(hyperparameter_decay=0.0)),
        ({"auxiliary": True}, lambda: adamw(entropy="auxiliary")),
        ({"learn": False}, constant_logits),
        ({"sgd": True, "rho": 0.5}, lambda: logits_by_momentum(0.5)),
    ],
    ids=["default", "weak", "no decay", "auxiliary", "constant", "sgd"],
)
def test_the_softmax_rule_is_the_optimizer_of_the_library(config, optimizer):
    ours = train_one(config)
    params, weights = by_library(optimizer())
    np.testing.assert_allclose(ours.weights, weights, atol=1e-6)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6),
        (ours.model, ours.mu),
        (params["model"], params["mu"]),
    )


# Every variation, written out.


def gradients_by_hand(model, batch):
    """Losses [3] and their gradients, in float64."""
    x, y = np.float64(batch.x), np.float64(batch.y)
    z, n = x @ model["encoder"], len(x)
    zero = {name: np.zeros_like(value) for name, value in model.items()}

    def squares(head, target):
        residual = z @ model[head] - target
        slope = 2 / n * residual
        return np.mean(residual**2), zero | {
            head: z.T @ slope,
            "encoder": x.T @ np.outer(slope, model[head]),
        }

    size = np.mean(z**2), zero | {"encoder": x.T @ (2 * z / z.size)}
    values, slopes = zip(
        squares("fit", y), size, squares("other", x[:, 0]), strict=True
    )
    return np.array(values), slopes


class AdamInNumpy:
    def __init__(self):
        self.m = self.v = self.t = 0

    def __call__(self, g):
        self.t += 1
        self.m = 0.9 * self.m + 0.1 * g
        self.v = 0.999 * self.v + 0.001 * g**2
        m, v = self.m / (1 - 0.9**self.t), self.v / (1 - 0.999**self.t)
        return m / (np.sqrt(v) + 1e-8)


def slope_of_regulariser(mu, c):
    """That of the negated entropy, and of the softplus, as in the paper."""
    relative = np.exp(mu if c.auxiliary else np.concatenate([[0.0], mu]))
    shares = relative / relative.sum()
    entropy = -np.sum(shares * np.log(shares))
    of_entropy = (shares * (np.log(shares) + entropy))[-len(mu) :]
    return c.entropy * of_entropy + c.softplus / (1 + np.exp(-mu))


def by_hand(config, seed=0):
    c = Switches(**{"ratios": RATIOS} | config)
    model = {k: np.float64(v) for k, v in init(jax.random.key(seed)).items()}
    mu, momentum, means = np.log(c.ratios), np.zeros(2), None
    of_model, of_mu = {name: AdamInNumpy() for name in model}, AdamInNumpy()
    curves, used = [], []
    for t, batch in enumerate(batches(seed)):
        raw, slopes = gradients_by_hand(model, batch)
        factors = np.broadcast_to(c.factors, (3,))
        raw = raw * factors
        means = raw if t == 0 else c.decay * means + (1 - c.decay) * raw
        scale = means if c.normalize else np.ones(3)
        weights = np.exp(np.concatenate([[0.0], mu]))
        if c.exponential:
            h = weights[1:] * raw[1:] / scale[1:]
        else:
            weights /= weights.sum()
            h = weights[1:] * (raw / scale - weights @ (raw / scale))[1:]
        alpha = float(TASK.schedule(t))
        decay = c.rho * slope_of_regulariser(mu, c)
        if c.coupled:
            h = h + alpha * decay
        momentum = 0.9 * momentum + alpha * h
        by_adam = alpha * of_mu(h)
        move = (momentum if c.sgd else by_adam) + (0 if c.coupled else alpha * decay)
        curves.append(raw)
        used.append(weights)
        mu = mu - c.learn * c.rate * move
        for name, value in model.items():
            g = sum(
                w * f / s * slope[name]
                for w, f, s, slope in zip(weights, factors, scale, slopes, strict=True)
            )
            step = of_model[name](g) + TASK.weight_decay * value
            model[name] = value - alpha * step
    return model, mu, np.array(curves), np.array(used), means


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"coupled": True, "sgd": True},
        {"coupled": True},
        {"sgd": True, "rho": 0.5},
        {"exponential": True, "rho": 0.5},
        {"entropy": False},
        {"softplus": False},
        {"auxiliary": True, "rho": 3.0},
        {"rate": 10.0, "rho": 0.5},
        {"normalize": True},
        {"normalize": True, "decay": 1.0},
        {"normalize": True, "decay": 0.5, "learn": False},
        {"factors": (1.0, 1000.0, 0.1), "rho": 0.5},
        {"factors": (3.0, 1000.0, 0.1), "normalize": True},
    ],
    ids=lambda config: " ".join(f"{k}={v}" for k, v in config.items()) or "default",
)
def test_every_variation_is_its_formula(config):
    ours = train_one(config)
    model, mu, curves, weights, means = by_hand(config)
    # In float32 Adam divides by the size of gradients where they are rounding errors.
    np.testing.assert_allclose(ours.losses, curves, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(ours.weights, weights, rtol=1e-4)
    logits = dict(zip(sorted(TASK.auxiliary), ours.mu.learned, strict=True))
    expected = dict(zip(TASK.auxiliary, mu, strict=True))
    for name in TASK.auxiliary:
        np.testing.assert_allclose(logits[name], expected[name], atol=1e-4)
    np.testing.assert_allclose(ours.state.means, means, rtol=1e-4)
    for name, value in model.items():
        np.testing.assert_allclose(ours.model[name], value, atol=2e-5)


@pytest.mark.parametrize("config", [{"learn": 0.0}, {"rho": True}])
def test_a_switch_is_on_or_off_and_a_number_is_neither(config):
    with pytest.raises(TypeError, match=f"{next(iter(config))} cannot be"):
        SOFTMAX.configure([{"ratios": RATIOS} | config])


def test_exponential_weights_are_relative_to_the_primary_loss():
    ours = train_one({"exponential": True})
    np.testing.assert_array_equal(ours.weights[:, 0], 1)
    np.testing.assert_allclose(ours.weights[0], (1.0, *RATIOS), rtol=1e-6)


def test_losses_divided_by_their_means_forget_a_common_factor():
    plain = train_one({"normalize": True, "factors": (1.0, 1.0, 1.0)})
    times = train_one({"normalize": True, "factors": (64.0, 1 / 128, 1024.0)})
    np.testing.assert_allclose(times.weights, plain.weights, atol=1e-6)


def test_the_schedule_warms_up_and_ends_at_a_hundredth():
    rates = np.array([TASK.schedule(t) for t in range(STEPS + 2)])
    assert rates[0] == 0
    assert rates.argmax() == STEPS // 20 + 1
    np.testing.assert_allclose(rates.max(), TASK.learning_rate, rtol=1e-6)
    np.testing.assert_allclose(rates[-1], TASK.learning_rate / 100, rtol=1e-5)
    assert (np.diff(rates[2:-1]) < 0).all()


def test_a_rule_without_configuration_takes_none():
    with pytest.raises(ValueError, match="no configuration"):
        PLAIN.configure([{}, {"rho": 1.0}])


# Lanes.

PLAIN = Weighted(lambda task: yoto.weightings.famo())
EVERY = 5


def aligned(task):
    return yoto.weightings.every(yoto.weightings.softmax_alignment(DOWNSTREAM), EVERY)


STEERED = Weighted(aligned, steered=True)
RULES = {"softmax": SOFTMAX, "plain": PLAIN, "steered": STEERED}


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize("name", RULES)
def test_a_run_does_not_depend_on_its_lane_nor_on_its_neighbours(name):
    rule = RULES[name]
    config = {"ratios": RATIOS, "rho": 2.0} if name == "softmax" else {}
    other = {"ratios": (1e-30, 1e3), "learn": False} if name == "softmax" else {}
    groups = [
        train(rule, [config if lane == at else other for lane in range(LANES)],
              [0 if lane == at else 7 + at for lane in range(LANES)])[at]
        for at in range(LANES)
    ]  # fmt: skip
    for group in groups[1:]:
        assert_same(group, groups[0])


def test_the_model_of_one_run_is_that_of_its_lane():
    run = Run("softmax", 3, settings(ratios=RATIOS, rho=2.0))
    assert_same(
        engine.train(TASK, SOFTMAX, run),
        train(SOFTMAX, [dict(run.config)] * LANES, [9, 3, 8])[1].model,
    )


# Rules that are steered by held-out data.


def test_a_steered_rule_weighs_the_losses_and_the_downstream_one_trains_nothing():
    model, key = init(jax.random.key(0)), jax.random.key(1)
    state = STEERED.init(TASK, 0)
    carry = Carry(jnp.zeros((), jnp.int32), model, (), state)
    made = jax.jit(lambda data: STEERED.step(TASK, data, carry, 0, key))(TASK.data)
    model = {k: np.float64(v) for k, v in model.items()}
    batch = TASK.draw(TASK.data, key)
    values, slopes = gradients_by_hand(model, batch)
    weights = [made.weights[name] for name in NAMES]
    np.testing.assert_allclose(weights, 1 / 3, rtol=1e-6)
    curves = [made.losses[name] for name in NAMES]
    np.testing.assert_allclose(curves, values, rtol=1e-5)
    for name in ("encoder", "fit", "other"):
        expected = sum(
            w * slope[name] for w, slope in zip(weights, slopes, strict=True)
        )
        np.testing.assert_allclose(made.grads[name], expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(made.grads["steer"], 0)


def test_held_out_data_steer_when_weights_are_due():
    (x, y), (held_out, target) = TASK.data
    seeds = range(LANES)
    one = train(STEERED, [{}] * LANES, seeds)[0].weights
    away = ((x, y), (held_out, -target))
    other = train(STEERED, [{}] * LANES, seeds, away)[0].weights
    np.testing.assert_allclose(one.sum(axis=1), 1, rtol=1e-6)
    assert np.abs(one[-1] - other[-1]).max() > 1e-4
    # The first update tells the weights of the second; in between they are held.
    changes = 1 + np.flatnonzero(np.abs(np.diff(one, axis=0)).max(axis=1) > 0)
    np.testing.assert_array_equal(changes, range(EVERY, STEPS, EVERY))


def test_held_out_data_train_nothing_where_weights_are_not_due():
    """Held-out data that are not finite are seen by the steps that look at them."""
    (x, y), (held_out, target) = TASK.data
    broken = ((x, y), (held_out, jnp.full_like(target, jnp.nan)))
    (run, *_) = train(STEERED, [{}] * LANES, range(LANES), broken)
    np.testing.assert_allclose(run.weights, 1 / 3, rtol=1e-6)
    assert all(np.isfinite(x).all() for x in run.model.values())
    assert optax.tree.get(run.state, "num_skipped") == STEPS


def test_held_out_data_are_differentiated_only_when_weights_are_due():
    seen = []

    @jax.custom_vjp
    def watched(z, held_out):
        return z

    def forward(z, held_out):
        return z, held_out

    def backward(held_out, g):
        jax.debug.callback(lambda x: seen.append(float(x)), held_out)
        return g, jnp.zeros_like(held_out)

    watched.defvjp(forward, backward)
    task = dataclasses.replace(
        TASK,
        downstream=lambda model, z, batch: downstream(
            model, watched(z, batch.held_out), batch
        ),
    )
    config = STEERED.configure([{}])
    program = prepare(task, STEERED, config, 1, STEPS)
    seeds = jnp.arange(1)
    program.advance(program.init(seeds, config), task.data, seeds, config)
    jax.effects_barrier()
    assert seen.count(1.0) == STEPS // EVERY


# Files.


@pytest.fixture(scope="module")
def wanted():
    learned = [
        Run("softmax", seed, settings(ratios=RATIOS, rho=rho))
        for seed in range(2)
        for rho in (1.0, 3.0)
    ]
    return [*learned, *(Run("steered", seed) for seed in range(2))]


GROUPS = 3  # four runs and two, in lanes of three


def runs_in(folder, *, resume=True, task=TASK):
    return Runs(task, RULES, folder, resume=resume, planned=6)


def kept(finished):
    """All that does not depend on the clock."""
    return [(done.values, done.history) for done in finished]


@pytest.fixture(scope="module")
def undisturbed(wanted, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    finished = runs_in(folder, resume=False).finish(wanted, "test")
    assert not (folder / "toy.partial.npz").exists()
    return kept(finished), (folder / "toy.runs.jsonl").read_bytes()


class Interrupted:
    """Stops after so many calls of ``advance`` or of ``_save``, and counts them."""

    def __init__(self, patch):
        self.advances = self.saves = 0
        self.stop_before_advance = self.stop_before_save = None
        self.stop_after_save = None
        prepare, save = engine.prepare, Runs._save
        patch.setattr(engine, "SAVE_SECONDS", 0.0)

        def prepared(*args):
            program = prepare(*args)

            def advance(*args):
                if self.advances == self.stop_before_advance:
                    raise KeyboardInterrupt
                self.advances += 1
                return program.advance(*args)

            return program._replace(advance=advance)

        def saved(runs, *args):
            if self.saves == self.stop_before_save:
                raise KeyboardInterrupt
            save(runs, *args)
            self.saves += 1
            if self.saves == self.stop_after_save:
                raise KeyboardInterrupt

        patch.setattr(engine, "prepare", prepared)
        patch.setattr(Runs, "_save", saved)

    def never(self):
        self.stop_before_advance = self.stop_before_save = None
        self.stop_after_save = None


@pytest.fixture
def interrupted(monkeypatch):
    return Interrupted(monkeypatch)


def stop(folder, wanted):
    with pytest.raises(KeyboardInterrupt):
        runs_in(folder, resume=False).finish(wanted, "test")


@pytest.mark.parametrize("chunk", range(GROUPS * CHUNKS))
def test_a_run_stopped_between_chunks_goes_on(
    chunk, wanted, undisturbed, interrupted, tmp_path
):
    interrupted.stop_before_advance = chunk
    stop(tmp_path, wanted)
    interrupted.never()
    assert kept(runs_in(tmp_path).finish(wanted, "test")) == undisturbed[0]
    assert interrupted.advances == GROUPS * CHUNKS
    assert sorted(path.name for path in tmp_path.iterdir()) == ["toy.runs.jsonl"]


@pytest.mark.parametrize("save", [0, 1, 4, CHUNKS - 2, CHUNKS - 1, 2 * CHUNKS])
@pytest.mark.parametrize("when", ["before", "after", "amid"])
def test_a_run_stopped_around_saving_goes_on(
    when, save, wanted, undisturbed, interrupted, tmp_path, monkeypatch
):
    interrupted.stop_before_save = save if when == "before" else None
    interrupted.stop_after_save = save + 1 if when == "after" else None
    with monkeypatch.context() as patch:
        if when == "amid":
            savez = np.savez

            def half(file, **arrays):
                savez(file, **arrays)
                if interrupted.saves == save:
                    file.truncate(file.tell() // 2)
                    raise KeyboardInterrupt

            patch.setattr(engine.np, "savez", half)
        stop(tmp_path, wanted)
    interrupted.never()
    assert kept(runs_in(tmp_path).finish(wanted, "test")) == undisturbed[0]
    lost = 0 if when == "after" else 1
    assert interrupted.advances == GROUPS * CHUNKS + lost


def test_a_line_that_was_being_written_is_trained_again(
    wanted, undisturbed, interrupted, tmp_path
):
    expected, content = undisturbed
    *lines, last = content.splitlines(keepends=True)
    before = sum(map(len, lines))
    path = tmp_path / "toy.runs.jsonl"
    for written in (0, 1, len(last) // 3, len(last) - 2, len(last) - 1):
        path.write_bytes(content[: before + written])
        runs = runs_in(tmp_path)
        assert runs.resumed == len(wanted) - 1
        assert path.read_bytes() == b"".join(lines)
        interrupted.advances = 0
        assert kept(runs.finish(wanted, "test")) == expected
        assert interrupted.advances == CHUNKS
        assert kept(runs_in(tmp_path).finish(wanted, "test")) == expected


def test_finished_runs_are_read_and_nothing_is_trained_or_compiled(
    wanted, undisturbed, tmp_path, monkeypatch
):
    expected, content = undisturbed
    (tmp_path / "toy.runs.jsonl").write_bytes(content)
    monkeypatch.setattr(engine, "prepare", None)
    assert kept(runs_in(tmp_path).finish(wanted[::-1], "test")) == expected[::-1]
    assert (tmp_path / "toy.runs.jsonl").read_bytes() == content


def test_only_missing_runs_are_trained(wanted, undisturbed, interrupted, tmp_path):
    runs = runs_in(tmp_path, resume=False)
    runs.finish(wanted[1:2], "test")
    assert interrupted.advances == CHUNKS
    runs.finish(wanted[:2], "test")
    assert interrupted.advances == 2 * CHUNKS
    assert kept(runs.finish(wanted[:2], "test")) == undisturbed[0][:2]
    lines = (tmp_path / "toy.runs.jsonl").read_text().splitlines()[1:]
    # What filled the lanes is not among them.
    assert [json.loads(line)["run"] for line in lines] == [
        wanted[1].key,
        wanted[0].key,
    ]


def test_every_metric_loss_and_weight_is_kept(undisturbed):
    for values, history in undisturbed[0]:
        assert values.keys() == {
            ("error", "seen"),
            ("error", "shifted"),
            ("validation", None),
            *((f"{what}:{n}", None) for what in ("loss", "weight") for n in NAMES),
        }
        assert len(history["step"]) == STEPS
        assert history["losses"].keys() == history["weights"].keys() == set(NAMES)
        for name in NAMES:
            assert values[f"loss:{name}", None] == history["losses"][name][-1]
            assert values[f"weight:{name}", None] == history["weights"][name][-1]


def test_without_resuming_all_starts_afresh(wanted, undisturbed, interrupted, tmp_path):
    interrupted.stop_before_advance = CHUNKS + 3
    stop(tmp_path, wanted)
    assert (tmp_path / "toy.partial.npz").exists()
    runs = runs_in(tmp_path, resume=False)
    assert runs.resumed == 0
    assert not (tmp_path / "toy.partial.npz").exists()
    assert len((tmp_path / "toy.runs.jsonl").read_text().splitlines()) == 1


def test_what_was_saved_of_another_group_is_not_used(
    wanted, undisturbed, interrupted, tmp_path
):
    interrupted.stop_before_advance = 5
    stop(tmp_path, wanted)
    interrupted.never()
    interrupted.advances = 0
    finished = runs_in(tmp_path).finish(wanted[:3][::-1], "test")
    assert kept(finished) == undisturbed[0][:3][::-1]
    assert interrupted.advances == CHUNKS


def spoil(path, how):
    """Make a file that was saved unusable."""
    if how == "truncated":
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        return
    if how == "foreign":
        path.write_text("something else")
        return
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    if how == "fewer arrays":
        del arrays["leaf 3"]
    elif how == "other shape":
        arrays["leaf 3"] = arrays["leaf 3"][..., None]
    elif how == "other dtype":
        arrays["leaf 3"] = arrays["leaf 3"].astype(np.int32)
    else:
        arrays["header"] = "other settings"
    np.savez(path, **arrays)


@pytest.mark.parametrize(
    "how",
    ["truncated", "foreign", "fewer arrays", "other shape", "other dtype", "header"],
)
def test_what_cannot_be_used_is_trained_again(
    how, wanted, undisturbed, interrupted, tmp_path
):
    interrupted.stop_before_advance = 5
    stop(tmp_path, wanted)
    interrupted.never()
    interrupted.advances = 0
    spoil(tmp_path / "toy.partial.npz", how)
    finished = runs_in(tmp_path).finish(wanted[:3], "test")
    assert kept(finished) == undisturbed[0][:3]
    assert interrupted.advances == CHUNKS


def test_a_weighting_with_a_random_key_goes_on(interrupted, tmp_path):
    rules = {"random": Weighted(lambda task: yoto.weightings.random(key=3))}
    wanted = [Run("random", seed) for seed in range(2)]
    start = lambda folder, resume: Runs(
        TASK, rules, folder, resume=resume, planned=2
    ).finish(wanted, "test")
    expected = kept(start(tmp_path / "undisturbed", False))
    interrupted.stop_before_advance = CHUNKS + 4
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path, False)
    interrupted.never()
    assert kept(start(tmp_path, True)) == expected
    assert interrupted.advances == 2 * CHUNKS


@pytest.mark.parametrize("left", [0, 5, -1])
def test_a_file_that_was_hardly_begun_is_none(
    left, wanted, undisturbed, interrupted, tmp_path
):
    header = undisturbed[1].splitlines()[0] + b"\n"
    path = tmp_path / "toy.runs.jsonl"
    path.write_bytes(header[:left])
    assert runs_in(tmp_path).resumed == 0
    assert path.read_bytes() == header


def test_resuming_never_empties_the_file(wanted, undisturbed, tmp_path, monkeypatch):
    path = tmp_path / "toy.runs.jsonl"
    path.write_bytes(undisturbed[1] + b'{"run"')
    monkeypatch.setattr(type(path), "write_bytes", None)
    monkeypatch.setattr(type(path), "write_text", None)
    assert runs_in(tmp_path).resumed == len(wanted)
    assert path.read_bytes() == undisturbed[1]


def test_resuming_with_other_settings_is_refused(undisturbed, tmp_path):
    path = tmp_path / "toy.runs.jsonl"
    path.write_bytes(undisturbed[1])
    longer = dataclasses.replace(TASK, settings={"steps": 2 * STEPS})
    with pytest.raises(UsageError, match="other settings") as refused:
        runs_in(tmp_path, task=longer)
    assert str(path) in str(refused.value)
    assert f'"steps": {STEPS}' in str(refused.value)
    assert path.read_bytes() == undisturbed[1]


def test_resuming_where_there_is_nothing_starts(wanted, undisturbed, tmp_path):
    runs = runs_in(tmp_path / "new")
    assert runs.resumed == 0
    assert kept(runs.finish(wanted[:1], "test")) == undisturbed[0][:1]


def test_a_run_that_diverges_is_kept_as_it_is(tmp_path):
    run = Run("softmax", 0, settings(ratios=(float("inf"), 1.0), learn=False))
    (done,) = runs_in(tmp_path, resume=False).finish([run], "test")
    assert np.isnan(done.values["validation", None])
    (again,) = runs_in(tmp_path).finish([run], "test")
    assert repr(again) == repr(done)


def test_curves_are_averaged_over_stretches():
    losses = np.arange(2.0 * 130).reshape(130, 2)
    thin = thinned(("a", "b"), losses, 2 * losses)
    steps = np.array(thin["step"])
    assert len(steps) == HISTORY_POINTS
    assert (np.diff(steps) > 0).all()
    np.testing.assert_allclose(thin["losses"]["b"], 2 * steps + 1, rtol=1e-4)
    np.testing.assert_allclose(thin["weights"]["a"], 4 * steps, rtol=1e-4)


# Several devices.


EIGHT = dataclasses.replace(TASK, lanes=8)
COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute")


@pytest.fixture(scope="module")
def many():
    """Learned weights in eight lanes, one for each device; and a few, steered."""
    learned = [
        Run("softmax", seed, settings(ratios=RATIOS, rho=rho))
        for seed in range(2)
        for rho in (0.5, 1.0, 2.0, 3.0)
    ]
    return [*learned, *(Run("steered", seed) for seed in range(2))]


def on(devices, folder, *, resume=False):
    return Runs(EIGHT, RULES, folder, resume=resume, planned=10, devices=devices)


@pytest.fixture(scope="module")
def unrounded():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "rounded", float)
        yield


@pytest.fixture(scope="module")
def alone(many, unrounded, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    return on(jax.devices()[:1], folder).finish(many, "test")


def assert_close(finished, expected):
    for one, other in zip(finished, expected, strict=True):
        assert one.values.keys() == other.values.keys()
        for key, value in one.values.items():
            np.testing.assert_allclose(value, other.values[key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rule", ["softmax", "steered"])
def test_lanes_on_eight_devices_exchange_nothing(rule, many):
    of_rule = [dict(run.config) for run in many if run.rule == rule]
    configs = RULES[rule].configure((4 * of_rule)[:8])
    program = prepare(EIGHT, RULES[rule], configs, 8, None, jax.devices())
    for spread in (program.init, program.advance):
        code = spread.compiled.as_text()
        assert "num_partitions=8" in code
        assert not [name for name in COLLECTIVES if name in code]
    seeds = jnp.arange(8)
    carry = program.init(seeds, configs)
    carry, seen = program.advance(carry, TASK.data, seeds, configs)
    for leaf in jax.tree.leaves((carry, seen)):
        assert len(leaf.sharding.device_set) == 8
        assert not leaf.sharding.is_fully_replicated


def test_eight_devices_train_as_one_does(many, alone, tmp_path):
    assert_close(on(jax.devices(), tmp_path).finish(many, "test"), alone)


@pytest.mark.parametrize(("first", "then"), [(8, 1), (1, 8)])
def test_what_some_devices_began_others_go_on_with(
    first, then, many, alone, interrupted, tmp_path
):
    interrupted.stop_before_advance = CHUNKS + 4
    with pytest.raises(KeyboardInterrupt):
        on(jax.devices()[:first], tmp_path).finish(many[:8][::-1] + many[8:], "test")
    interrupted.never()
    finished = on(jax.devices()[:then], tmp_path, resume=True).finish(many, "test")
    assert_close(finished, alone)
    assert interrupted.advances == 2 * CHUNKS


def test_the_digits_on_eight_devices(any_rank):
    data = digits_task.load().train
    configurations = digits_task.fixed(jnp.array(digits_task.GRID[:4]), 2)
    optimizer = lambda rho: optax.sgd(0.1)
    train = functools.partial(
        digits_task.train, data, optimizer, configurations, 5, "test"
    )
    spread, alone = train(jax.devices()), train(jax.devices()[:1])
    for one, other in ((spread.losses, alone.losses), (spread.model, alone.model)):
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5),
            one,
            other,
        )
    assert lane_devices.mesh(jax.devices(), 2, 4).devices.shape == (2, 4)
    program, _ = grids.prepare(
        digits_task._Grid(optimizer), data, configurations, 1, jax.devices()
    )
    text = program.advance.compiled.as_text()
    assert not [name for name in COLLECTIVES if name in text]


def test_lanes_use_as_many_devices_as_divide_them():
    devices = jax.devices()
    used = lambda *lanes: (m := lane_devices.mesh(devices, *lanes)) and m.devices.shape
    assert used(8) == (8,)
    assert used(12) == (6,)
    assert used(7) == (7,)
    assert math.prod(used(3, 9)) == 3
    assert used(2, 4) == (2, 4)
    assert used(11) is None
    assert lane_devices.mesh(devices[:1], 8) is None


def test_virtual_devices_of_a_cpu_have_to_be_asked_for():
    assert lane_devices.default_devices() == tuple(jax.local_devices()[:1])
    config = SOFTMAX.configure([{"ratios": RATIOS}] * 8)
    program = prepare(EIGHT, SOFTMAX, config, 8)
    assert not isinstance(program.advance, lane_devices.Spread)


# Cost.


def test_costs_are_ratios_for_every_round():
    rules = {"softmax": (SOFTMAX, {"ratios": RATIOS}), "plain": (PLAIN, {})}
    ratios = timing.step_ratios(TASK, rules, "plain", 4)
    assert ratios.keys() == rules.keys()
    assert all(ratio.shape == (4,) and (ratio > 0).all() for ratio in ratios.values())
    np.testing.assert_array_equal(ratios["plain"], 1)
    speed = timing.sweep_speed(TASK, SOFTMAX, {"ratios": RATIOS}, 2, 4)
    assert speed.shape == (4,)
    assert (speed > 0).all()
