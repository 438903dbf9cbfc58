"""Problems of the frontier: digits under shift, signals, scenes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler

import yoto_jax as yoto
from benchmarks.data import mnist1d as data
from benchmarks.data.camvid import CLASSES, VOID
from benchmarks.harness.options import UsageError
from benchmarks.harness.rules import Weighted
from benchmarks.harness.training import DOWNSTREAM, Carry, prepare
from benchmarks.harness.variations import Softmax
from benchmarks.tasks.frontier import methods, splits
from benchmarks.tasks.frontier.problem import SEEDS, TEST, TRAINING, VALIDATION
from benchmarks.tasks.frontier.problems import (
    camvid,
    depth,
    digits,
    missing_labels,
    mnist1d,
    pretraining,
    segmentation,
)
from benchmarks.tasks.frontier.train import train
from benchmarks.tasks.pretraining import task as pretraining_task
from benchmarks.tasks.segmentation import task as segmentation_task

pytestmark = pytest.mark.usefixtures("quick_compilation")

SCENES = {"segmentation": segmentation, "depth": depth}
IMAGES = {**SCENES, "camvid": camvid}
PROBLEMS = {
    "digits": digits,
    "mnist1d": mnist1d,
    "missing_labels": missing_labels,
    "pretraining": pretraining,
    **IMAGES,
}
every_problem = pytest.mark.parametrize("name", PROBLEMS)


@pytest.fixture(autouse=True)
def promotion():
    """The network of the digits adds vectors to matrices."""
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def quick(street_images):
    """Makes a problem in its quick preset."""

    def made(name):
        folder = (street_images,) if name == "camvid" else ()
        return PROBLEMS[name].make("quick", *folder)

    return made


@pytest.fixture
def unchanged_views(monkeypatch):
    """Signals and digits as they are in the pool."""
    monkeypatch.setattr(mnist1d, "view", lambda key, x: x)
    monkeypatch.setattr(pretraining_task, "view", lambda key, x, views: x)


# MNIST-1D.


def test_signals_are_those_of_their_seed():
    first, again, other = (data.generate(50, seed) for seed in (0, 0, 1))
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(first.x, other.x)
    assert first.x.shape == first.clean.shape == (50, 40)
    assert first.x.dtype == np.float32
    assert np.bincount(first.label).tolist() == [5] * 10
    assert first.position.min() >= 0
    assert first.position.max() <= 1
    assert np.all(np.abs(first.size - 1) <= 0.2)


def test_signals_are_standardised_and_hold_their_clean_ones():
    signals = data.generate(2000, 0)
    np.testing.assert_allclose([signals.x.mean(), signals.x.std()], [0, 1], atol=1e-5)
    # Inside a shape nothing but the slope and a little noise is added.
    inside = np.abs(signals.clean) > 0.5
    x, clean = signals.x[inside], signals.clean[inside]
    assert np.corrcoef(x, clean)[0, 1] > 0.8


def test_a_shape_begins_at_its_position():
    signals = data.generate(500, 0)
    early = signals.position < 0.5  # None goes round the end.
    first = np.argmax(np.abs(signals.clean[early]) > 1e-6, axis=1)
    expected = signals.position[early] * 47 * 39 / 71
    assert np.all(first >= expected)
    assert np.all(first <= expected + 2)


# Splits.


@every_problem
def test_splits_are_disjoint_and_those_of_their_seed(quick, name):
    task = quick(name).task
    rows = task.data.rows
    for seed in range(SEEDS):
        own = np.concatenate([np.asarray(part[seed]) for part in rows])
        assert len(np.unique(own)) == len(own)
    assert len({tuple(np.sort(part)) for part in np.asarray(rows.test)}) == SEEDS
    own = task.of_seed(task.data, jnp.int32(3))
    np.testing.assert_array_equal(own.rows.train, rows.train[3])
    assert jax.tree.leaves(own.pool)[0] is jax.tree.leaves(task.data.pool)[0]


@pytest.mark.parametrize("name", [name for name in PROBLEMS if name not in IMAGES])
@pytest.mark.usefixtures("unchanged_views")
def test_batches_come_from_the_rows_of_their_seed(quick, name):
    task = quick(name).task
    own = task.of_seed(task.data, jnp.int32(1))
    for draw, rows in (
        (task.draw, own.rows.train),
        (task.draw_held_out, own.rows.validation),
    ):
        batch = jax.jit(draw)(own, jax.random.key(0))
        batch = batch.signals if name == "missing_labels" else batch
        pool = own.pool.signals if name == "missing_labels" else own.pool
        drawn, all_rows = np.asarray(batch[0]), np.asarray(pool[0][rows])
        flat = lambda x: {tuple(row) for row in x.reshape(len(x), -1)}
        assert flat(drawn) <= flat(all_rows)


@every_problem
def test_together_trains_on_validation_data_too(quick, name):
    task = quick(name).task
    both = splits.together(task)
    rows, own = task.data.rows, both.data.rows
    assert set(np.asarray(own.train[2]).tolist()) == {
        *np.asarray(rows.train[2]).tolist(),
        *np.asarray(rows.validation[2]).tolist(),
    }
    np.testing.assert_array_equal(own.test, rows.test)
    data = both.of_seed(both.data, jnp.int32(2))
    jax.eval_shape(both.draw, data, jax.random.key(0))


@pytest.mark.usefixtures("unchanged_views")
def test_together_all_validation_signals_have_their_labels():
    task = splits.together(mnist1d.make("quick").task)
    own = task.of_seed(task.data, jnp.int32(0))
    draw = jax.jit(task.draw)
    seen = {
        tuple(x) for i in range(100) for x in np.asarray(draw(own, jax.random.key(i)).x)
    }
    known = np.concatenate([own.rows.validation, own.rows.train[50:200]])
    assert seen <= {tuple(x) for x in np.asarray(own.pool.x[known])}
    assert seen & {tuple(x) for x in np.asarray(own.pool.x[own.rows.validation])}

    task = splits.together(missing_labels.make("quick").task)
    own = task.of_seed(task.data, jnp.int32(0))
    only = own._replace(rows=own.rows._replace(train=own.rows.validation))
    batch = jax.jit(task.draw)(only, jax.random.key(0))
    assert all(np.all(mask) for mask in batch.masks.values())
    others = own._replace(rows=own.rows._replace(train=own.rows.train[50:]))
    batch = jax.jit(task.draw)(others, jax.random.key(0))
    assert not np.all(batch.masks["class"])


def test_views_are_moved_scaled_and_sheared():
    task = mnist1d.make("quick").task
    own = task.of_seed(task.data, jnp.int32(0))
    still = jax.jit(lambda key, x: mnist1d.view(key, 0 * x + 1))
    view = np.asarray(still(jax.random.key(0), own.pool.x[:50]))
    slopes = np.diff(view, axis=1)
    np.testing.assert_allclose(slopes, slopes[:, :1] + np.zeros((50, 39)), atol=1e-5)
    assert np.all(np.abs(view.mean(axis=1) - 1) <= mnist1d._SIZE + 1e-5)
    batch = jax.jit(task.draw)(own, jax.random.key(0))
    n = len(batch.label)
    assert batch.x.shape == (n, 40)
    assert batch.views.shape == (2, n, 40)
    assert not np.allclose(*batch.views)


# Training.

RULES = {
    "softmax": Softmax(),
    "upgrad": Weighted(lambda task: yoto.weightings.upgrad()),
}


def configured(task, rule):
    constant = {"ratios": (1.0,) * len(task.auxiliary), "learn": False}
    return constant if rule == "softmax" else {}


@every_problem
@pytest.mark.parametrize("rule", RULES)
def test_a_step_is_finite(quick, name, rule):
    task = quick(name).task
    config = jax.tree.map(
        lambda x: x[0], RULES[rule].configure([configured(task, rule)])
    )

    @jax.jit
    def step(seed):
        model = task.init(jax.random.key(seed))
        state = RULES[rule].init(task, config)
        carry = Carry(jnp.int32(5), model, task.optimizer().init(model), state)
        own = task.of_seed(task.data, seed)
        made = RULES[rule].step(task, own, carry, config, jax.random.key(seed))
        return made.losses, made.weights, made.grads

    losses, weights, grads = made = step(jnp.int32(2))
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(made))
    assert set(losses) == set(weights) == set(task.names)
    assert all(np.any(x != 0) for x in jax.tree.leaves(grads["encoder"]))


def test_seeds_train_side_by_side_as_alone():
    """Lanes share the pool, and each has the rows of its seed."""
    task = digits.make("quick").task

    def trained(seeds):
        rule = RULES["softmax"]
        config = rule.configure([configured(task, "softmax")] * len(seeds))
        program = prepare(task, rule, config, len(seeds), length=2)
        carry = program.init(seeds, config)
        carry, _ = program.advance(carry, task.data, seeds, config)
        return np.asarray(carry.model["classifier"][0]["w"])

    both, alone = trained(jnp.arange(2)), trained(jnp.arange(1, 2))
    np.testing.assert_allclose(both[1], alone[0], rtol=1e-4, atol=1e-6)
    assert not np.allclose(both[0], both[1])


@every_problem
def test_scores_are_percentages_of_each_lane(quick, name):
    problem = quick(name)
    seeds = jnp.array([0, 4])
    init = jax.jit(jax.vmap(problem.task.init))
    models = init(jax.random.split(jax.random.key(0), 2))
    scores = problem.scores(models, seeds)
    assert set(scores) == {TRAINING, VALIDATION, TEST}
    for of_lanes in scores.values():
        assert of_lanes.shape == (2,)
        assert np.all((of_lanes >= 0) & (of_lanes <= 100))
    second = problem.scores(jax.tree.map(lambda x: x[1:], models), seeds[1:])
    assert second[TEST] == scores[TEST][1]
    assert len(problem.bounds) == len(problem.task.auxiliary)


def test_accuracy_counts_the_rows_of_the_seed():
    labels = jnp.arange(10) % 2
    rows = (
        jnp.tile(jnp.array([[0, 2, 4, 6]]), (SEEDS, 1))
        .at[1]
        .set(jnp.array([0, 1, 2, 4]))
    )
    always_even = lambda model, x: jnp.tile(jnp.array([[1.0, 0.0]]), (len(x), 1))
    found = splits.accuracy(
        always_even, jnp.zeros(2), labels[:, None], labels, rows, jnp.array([0, 1])
    )
    assert found.tolist() == [100, 75]


# Scenes and streets.

SEGMENTED = {
    "segmentation": set(range(len(segmentation.CLASSES))),
    "camvid": {0, 3, VOID},  # what the streets of the tests show
}


def spoilt(images, rows):
    """The images, all but some without a number in them."""
    keep = jnp.zeros(len(images), bool).at[rows].set(True)
    return jnp.where(keep[:, None, None, None], images, jnp.nan)


def is_finite(*arrays):
    return all(bool(jnp.all(jnp.isfinite(x))) for x in arrays)


@pytest.mark.parametrize(("name", "classes"), SEGMENTED.items())
def test_batches_of_segmentation_are_labelled_and_styled_by_images_of_their_own(
    quick, name, classes
):
    task = quick(name).task
    own = task.of_seed(task.data, jnp.int32(1))
    labelled, lent = jnp.split(own.rows.train, 2)
    day, conditions = own.pool

    def drawn(draw, rows, targets):
        days = day._replace(images=spoilt(day.images, rows))
        styles = jnp.stack([spoilt(x, targets) for x in conditions])
        batch = jax.jit(draw)(
            own._replace(pool=own.pool._replace(day=days, conditions=styles)),
            jax.random.key(0),
        )
        return batch.images, batch.styled

    assert is_finite(*drawn(task.draw, labelled, lent))
    assert is_finite(*drawn(task.draw_held_out, own.rows.validation, lent))
    assert not is_finite(*drawn(task.draw, lent, lent))
    assert not is_finite(*drawn(task.draw, labelled, labelled))
    assert conditions.shape == (3, *day.images.shape)
    assert set(np.unique(day.labels)) == classes


def test_neighbours_in_a_film_are_in_the_same_part():
    rows = camvid._rows(468, 12)
    assert [part.shape for part in rows] == [(SEEDS, 276), (SEEDS, 72), (SEEDS, 120)]
    for part in rows:
        stretches = np.asarray(part).reshape(SEEDS, -1, 12)
        np.testing.assert_array_equal(stretches[..., 0] % 12, 0)
        np.testing.assert_array_equal(np.diff(stretches), 1)
    with pytest.raises(UsageError, match="camvid needs 96 images: there are 95"):
        camvid._rows(95, 12)


def test_a_folder_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no such folder"):
        camvid.make("quick", tmp_path)


def test_all_classes_of_the_streets_are_scored(quick):
    """What is never right has no share, and void counts for nothing."""
    task = quick("camvid").task
    model = segmentation_task.Model(
        segmentation_task.SegmentationNet(8, 1, len(CLASSES)), VOID
    )
    own = task.of_seed(task.data, jnp.int32(0))
    params = jax.jit(task.init)(jax.random.key(0))
    last = params["decoder"]["Dense_1"]
    bias = jnp.full((16, len(CLASSES)), -1.0).at[:, 5].set(1.0).ravel()
    always = {"kernel": 0 * last["kernel"], "bias": bias}  # a tree everywhere
    params = params | {"decoder": params["decoder"] | {"Dense_1": always}}
    assert segmentation._measure(model, params, own)[TEST] == 0
    trees = own.pool.day._replace(labels=jnp.full_like(own.pool.day.labels, 5))
    half = trees._replace(labels=trees.labels.at[:, :, :6].set(10))
    for day, expected in ((trees, 100), (half, 25)):
        measured = segmentation._measure(
            model, params, own._replace(pool=own.pool._replace(day=day))
        )
        assert measured[TEST] == pytest.approx(expected)


def test_batches_of_depth_come_from_the_rows_of_their_seed():
    task = depth.make("quick").task
    own = task.of_seed(task.data, jnp.int32(1))
    seen = own.pool.seen

    def drawn(draw, rows):
        some = seen._replace(images=spoilt(seen.images, rows))
        pool = own.pool._replace(seen=some)
        return jax.jit(draw)(own._replace(pool=pool), jax.random.key(0)).images

    assert is_finite(drawn(task.draw, own.rows.train))
    assert is_finite(drawn(task.draw_held_out, own.rows.validation))
    assert not is_finite(drawn(task.draw, own.rows.validation))
    assert [len(x.images) for x in own.pool.unseen] == [len(seen.images)] * 3


@pytest.mark.parametrize("name", IMAGES)
def test_scenes_are_trained_on_in_the_quick_preset(quick, name):
    problem = quick(name)
    (line,) = train(
        problem, RULES["softmax"], [configured(problem.task, "softmax")], [0]
    )
    looks = line["looks"]
    assert len(looks[TEST]) == 10
    assert len(set(looks[TEST])) > 1
    assert set(line["weights"]) == set(problem.task.names)


# Missing labels.


@pytest.fixture(scope="module")
def masked():
    """A task, a model, and batches of which each lacks all labels of one loss."""
    task = missing_labels.make("quick").task
    own = task.of_seed(task.data, jnp.int32(0))
    batch = jax.jit(task.draw_held_out)(own, jax.random.key(0))
    model = jax.jit(task.init)(jax.random.key(1))
    none = jnp.zeros_like(batch.masks["class"])
    lacking = {
        name: batch._replace(masks={**batch.masks, name: none}) for name in task.names
    }
    return task, own, model, lacking


def test_absent_labels_are_absent_losses(masked):
    task, _, model, lacking = masked
    losses_of = jax.jit(task.losses_of)
    for name, batch in lacking.items():
        losses, present = losses_of(model, batch)
        assert {n for n in task.names if not present[n]} == {name}
        assert losses[name] == 0
        assert all(losses[n] > 0 for n in task.names if n != name)


def test_labels_are_there_at_their_rates():
    task = missing_labels.make("cpu").task
    masks = task.data.pool.masks
    for name, rate in missing_labels.RATES.items():
        assert abs(np.mean(masks[name]) - rate) < 0.02
    own = task.of_seed(task.data, jnp.int32(0))
    keys = jax.random.split(jax.random.key(0), 20)
    drawn = jax.vmap(lambda key: task.draw(own, key).masks["size"])(keys)
    assert set(np.any(np.asarray(drawn), axis=1).tolist()) == {True, False}


class Stepper:
    """Steps of one rule on batches that are given, compiled once."""

    def __init__(self, masked, rule, config):
        task, own, model, _ = masked
        self.config = jax.tree.map(lambda x: x[0], rule.configure([config]))
        state = rule.init(task, self.config)
        self.carry = Carry(jnp.int32(5), model, task.optimizer().init(model), state)

        def step(carry, batch, config):
            given = dataclasses.replace(task, draw=lambda data, key: batch)
            return rule.step(given, own, carry, config, jax.random.key(0))

        self.step = jax.jit(step)

    def __call__(self, batch, state=None):
        carry = self.carry if state is None else self.carry._replace(rule=state)
        return self.step(carry, batch, self.config)


@pytest.mark.parametrize("learn", [False, True])
def test_softmax_weights_without_labels(masked, learn):
    """A constant weight stays what it is, a learned one goes to the others."""
    task, _, model, lacking = masked
    ratios = (2.0, 0.5, 4.0)
    step = Stepper(masked, Softmax(), {"ratios": ratios, "learn": learn})
    total = sum(ratios) + (1 - learn)

    @jax.grad
    def expected(model):
        losses, _ = task.losses_of(model, lacking["class"])
        both = zip(ratios, task.auxiliary, strict=True)
        return sum(r * losses[name] for r, name in both) / total

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        step(lacking["class"]).grads,
        jax.jit(expected)(model),
    )
    before, after = step.carry.rule.mu.logits, step(lacking["size"]).state.mu.logits
    moved = {n: bool(after[n] != before[n]) for n in task.auxiliary}
    assert moved == {n: n != "size" and learn == 1 for n in task.auxiliary}


def test_losses_are_divided_by_means_of_where_they_were(masked):
    task, _, _, lacking = masked
    step = Stepper(masked, Softmax(), {"ratios": (1.0,) * 3, "normalize": True})
    first = step(lacking["size"])
    second = step(lacking["class"], first.state)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(first.grads))
    before, after = (
        dict(zip(task.names, made.state.means, strict=True)) for made in (first, second)
    )
    assert before["size"] == 0
    assert after["size"] == second.losses["size"]
    assert after["class"] == before["class"] > 0


def test_steered_rules_take_absent_losses(masked):
    lacking = masked[-1]
    grap = Weighted(lambda task: yoto.weightings.grap(DOWNSTREAM), steered=True)
    made = Stepper(masked, grap, {})(lacking["size"])
    assert made.losses["size"] == 0
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(made.grads))
    assert all(np.all(np.asarray(x) == 0) for x in jax.tree.leaves(made.grads["size"]))


# Pretraining.


def test_the_classifier_of_few_labels_is_ridge_regression():
    rng = np.random.default_rng(0)
    known, z = rng.normal(2, 3, (30, 5)), rng.normal(2, 3, (20, 5))
    labels = rng.integers(0, 9, 30)  # a class has none
    told = pretraining.classify(jnp.float32(known), jnp.asarray(labels), jnp.float32(z))
    scaler = StandardScaler().fit(known)
    ridge = Ridge(alpha=30 * pretraining.RIDGE)
    ridge.fit(scaler.transform(known), np.eye(10)[labels])
    np.testing.assert_allclose(told, ridge.predict(scaler.transform(z)), atol=1e-3)


def test_features_that_collapsed_tell_the_usual_class():
    labels = jnp.array([3, 3, 1])
    told = pretraining.classify(jnp.ones((3, 4)), labels, jnp.ones((2, 4)))
    np.testing.assert_allclose(told, [[0, 1 / 3, 0, 2 / 3, *[0] * 6]] * 2, atol=1e-6)


def test_only_few_labels_are_known_to_the_scores():
    problem = pretraining.make("quick")
    task = problem.task
    own = task.of_seed(task.data, jnp.int32(0))
    known = pretraining.labelled(own.rows.train)
    assert len(known) == round(len(own.rows.train) / 10)
    model = jax.jit(task.init)(jax.random.key(0))
    measure = jax.jit(pretraining._measure)
    images, labels = own.pool

    def score(changed):
        return measure(model, own._replace(pool=own.pool._replace(labels=changed)))

    right = score(labels)
    # If the others had the labels that it tells them, it would be right everywhere.
    others = jnp.ones_like(labels, bool).at[known].set(False)
    z = pretraining._features(model, images)
    told = jnp.argmax(pretraining.classify(z[known], labels[known], z), axis=-1)
    all_right = score(jnp.where(others, told, labels))
    for name in (VALIDATION, TEST):
        assert all_right[name] == pytest.approx(100)
    assert right[TEST] < 100


def test_no_loss_sees_a_label_and_the_downstream_one_does():
    task = pretraining.make("quick").task
    own = task.of_seed(task.data, jnp.int32(0))
    batch = jax.jit(task.draw_held_out)(own, jax.random.key(0))
    other = batch._replace(labels=(batch.labels + jnp.arange(len(batch.labels))) % 10)
    model = jax.jit(task.init)(jax.random.key(0))
    losses = jax.jit(task.losses_of_batch)
    assert losses(model, batch) == losses(model, other)

    @jax.jit
    def downstream(model, batch):
        return task.downstream(model, task.encode(model, batch), batch)

    assert downstream(model, batch) < downstream(model, other)
    grads = jax.jit(jax.grad(downstream))(model, batch)
    assert all(np.any(x) and is_finite(x) for x in jax.tree.leaves(grads["encoder"]))
    assert not any(np.any(x) for x in jax.tree.leaves(grads["projector"]))


def test_pretraining_is_trained_and_steered_in_the_quick_preset():
    problem = pretraining.make("quick")
    entry = methods.entries(problem.task)["grap"]
    (line,) = train(problem, entry.rule, [{}], [0])
    assert len(set(line["looks"][TEST])) > 1
    assert np.isfinite(list(line["weights"].values())).all()
