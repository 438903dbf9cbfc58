"""The pretraining benchmark: VICReg, the views, fair searches, complete records."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from matplotlib.image import imsave

import yoto_jax as yoto
from benchmarks.harness.options import Options, UsageError
from benchmarks.harness.results import read_json, select, values
from benchmarks.tasks.pretraining import methods, report, task
from benchmarks.tasks.pretraining import run as pretraining

SEEDS, STEPS = 2, 4
METHODS = ("grap", "equal", "random")

pytestmark = pytest.mark.usefixtures("any_rank", "quick_compilation")


@pytest.fixture(scope="module")
def digits():
    return task.load(None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    options = Options(
        "pretraining", METHODS, seeds=SEEDS, steps=STEPS, preset="quick", out=folder
    )
    with jax.numpy_rank_promotion("allow"):
        pretraining.main(options)
    return folder


@pytest.fixture(scope="module")
def result(folder):
    return read_json(folder / "pretraining.json")


# Losses.


def vicreg_in_numpy(a, b):
    """The formulas of the paper, with the mean squared error of its code."""
    width, losses = a.shape[1], {}
    losses["invariance"] = ((a - b) ** 2).mean()
    hinge = [
        np.maximum(0, 1 - np.sqrt(np.var(x, axis=0, ddof=1) + 1e-4)) for x in (a, b)
    ]
    losses["variance"] = np.mean(hinge)
    losses["covariance"] = 0.0
    for x in (a, b):
        matrix = np.cov(x, rowvar=False)
        off = matrix[~np.eye(width, dtype=bool)]
        losses["covariance"] += (off**2).sum() / width
    return losses


def test_the_losses_are_those_of_vicreg():
    z = np.random.default_rng(0).normal(0, 0.8, (24, 5))
    identity = {"projector": [{"w": jnp.eye(5), "b": jnp.zeros(5)}]}
    losses = task.vicreg(identity, jnp.asarray(z, jnp.float32))
    expected = vicreg_in_numpy(z[:12], z[12:])
    assert losses.keys() == expected.keys() == set(task.LOSSES)
    for name, value in expected.items():
        np.testing.assert_allclose(losses[name], value, rtol=1e-5)


def test_equal_views_of_white_noise_have_no_loss():
    x = np.random.default_rng(0).normal(size=(64, 4))
    x = np.linalg.qr(x - x.mean(axis=0))[0] * 16  # uncorrelated, deviation above 1
    identity = {"projector": [{"w": jnp.eye(4), "b": jnp.zeros(4)}]}
    losses = task.vicreg(identity, jnp.asarray(np.concatenate([x, x]), jnp.float32))
    np.testing.assert_allclose(list(losses.values()), 0, atol=1e-9)


def test_images_without_label_do_not_enter_the_classification(digits):
    setup, _ = digits
    model = task.init_model(jax.random.key(0), setup, (8, 8, 1), 10)
    z = jax.random.normal(jax.random.key(1), (12, setup.widths[-1]))
    labels = jnp.array([3, task.UNLABELLED, 1, task.UNLABELLED, task.UNLABELLED, 2])

    def loss(z, model):
        return task.classification(model, z, labels)

    w = jax.random.normal(jax.random.key(2), (setup.widths[-1], 10))
    model = model | {"classifier": {"w": w, "b": jnp.zeros(10)}}
    known = np.tile(np.asarray(labels) != task.UNLABELLED, 2)
    changed = jnp.concatenate([labels, labels])
    standardised = (z - z.mean(axis=0)) / jnp.sqrt(z.var(axis=0) + 1e-4)
    log_shares = jax.nn.log_softmax(standardised @ w)[np.flatnonzero(known)]
    expected = -np.mean(
        np.take_along_axis(
            np.asarray(log_shares), np.asarray(changed)[known][:, None], axis=1
        )
    )
    decay = 0.5 * task.DECAY * float(jnp.sum(w**2))
    np.testing.assert_allclose(loss(z, model), expected + decay, rtol=1e-5)


# Data and views.


def test_the_test_half_is_apart_and_few_labels_are_known(digits):
    _, data = digits
    assert len(data.labels) + len(data.test_labels) == 1797
    assert len(data.labelled) == len(data.labels) // 10
    assert (data.known != task.UNLABELLED).sum() == len(data.labelled)
    assert set(data.labels[data.labelled]) == set(range(10))
    both = np.concatenate([data.images, data.test_images]).reshape(1797, -1)
    assert len(np.unique(both, axis=0)) == 1797


def test_a_view_of_no_reach_is_the_image(digits):
    _, data = digits
    still = task.Views(
        zoom=1, shift=0, contrast=1, brightness=0, noise=0, blur=0, cutout=0
    )
    images = jnp.asarray(data.images[:20])
    unchanged = task.view(jax.random.key(0), images, still)
    np.testing.assert_allclose(unchanged, images, atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        {"zoom": 1.3},
        {"shift": 0.2},
        {"contrast": 2.0},
        {"brightness": 0.3},
        {"tint": 0.3},
        {"noise": 0.3},
        {"blur": 1.0},
        {"cutout": 0.5},
        {"flip": True},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_change_of_a_view_changes_images(change, digits):
    _, data = digits
    still = {
        "zoom": 1,
        "shift": 0,
        "contrast": 1,
        "brightness": 0,
        "noise": 0,
        "blur": 0,
        "cutout": 0,
    }
    images = jnp.asarray(data.images[:20])
    views = task.Views(**(still | change))
    changed = task.view(jax.random.key(0), images, views)
    assert changed.shape == images.shape
    assert jnp.mean(jnp.abs(changed - images)) > 0.005
    assert (changed >= 0).all()
    assert (changed <= 1).all()


def test_every_batch_has_labelled_images(digits):
    setup, data = digits
    images, known = jnp.asarray(data.images), jnp.asarray(data.known)
    draw = jax.jit(lambda key: task.draw_batch(setup, images, known, key))
    for seed in range(3):
        batch = draw(jax.random.key(seed))
        assert batch.views.shape == (2 * setup.batch, 8, 8, 1)
        assert (batch.labels[: setup.labelled] != task.UNLABELLED).all()
        assert (batch.labels[setup.labelled :] == task.UNLABELLED).any()


@pytest.fixture
def street(tmp_path):
    """Scenes whose left half is sky (class 0) and whose right half is road (3)."""
    rng = np.random.default_rng(0)
    annotation = np.zeros((48, 64, 3), np.uint8)
    annotation[:, 32:] = 3
    for part in ("train", "val"):
        for kind in (part, f"{part}annot"):
            (tmp_path / kind).mkdir()
        for i in range(2):
            noise = rng.integers(0, 50, (48, 64, 3), dtype=np.uint8)
            image = noise + np.where(annotation == 0, 200, 0).astype(np.uint8)
            imsave(tmp_path / part / f"{i}.png", image)
            with_void = annotation.copy()
            with_void[:8] = 11
            imsave(tmp_path / f"{part}annot" / f"{i}.png", with_void)
    return tmp_path


def test_patches_have_the_class_of_their_middle(street, monkeypatch):
    monkeypatch.setattr(task, "_PATCHES", {"train": 10, "val": 5})
    setup, data = task.load(street)
    assert setup is task.CAMVID
    assert data.images.shape == (20, 16, 16, 3)
    assert data.test_images.shape == (10, 16, 16, 3)
    np.testing.assert_array_equal(np.bincount(data.labels), [10, 10])
    # The sky is bright, the road dark; the middle of a patch begins at its pixel 6.
    bright = data.images[:, 8, 6].mean(axis=-1) > 0.5
    np.testing.assert_array_equal(bright, data.labels == 0)


def test_a_folder_with_too_little_is_refused(street):
    with pytest.raises(UsageError, match="too few labelled patches"):
        task.load(street)


def test_squares_are_seen_one_by_one():
    setup = task.CAMVID
    model = task.init_model(jax.random.key(0), setup, (16, 16, 3), 7)
    images = jax.random.uniform(jax.random.key(1), (5, 16, 16, 3))
    z = task.encode(model, images, setup.patch)
    first, *rest = model["encoder"]
    kernel = first["w"].reshape(4, 4, 3, -1)
    x = jax.lax.conv_general_dilated(
        images, kernel, (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    x = jax.nn.relu(x + first["b"]).reshape(5, -1)
    x = jax.nn.relu(x @ rest[0]["w"] + rest[0]["b"]) @ rest[1]["w"] + rest[1]["b"]
    np.testing.assert_allclose(z, x, atol=1e-5)


# Training.


def step(method, digits, weights=(1.0, 1.0, 1.0)):
    """Model before and after a step, and Adam's running mean of the gradients."""
    setup, data = digits
    grid, arrays, weights = task._prepare(setup, data, method, weights, 100)
    run = grid.init(jnp.zeros((), jnp.int32), weights)
    batch = grid.draw(arrays, jax.random.key(0))
    # The learning rate of the very first step is zero.
    one_step = jax.jit(grid.step)
    run, _ = one_step(run, weights, batch)
    after, _ = one_step(run, weights, batch)
    return run.model, after.model, optax.tree.get(after.optimizer, "mu")


def moved(before, after):
    return {
        part: any(
            bool(jnp.any(x != y))
            for x, y in zip(
                jax.tree.leaves(before[part]), jax.tree.leaves(after[part]), strict=True
            )
        )
        for part in before
    }


def test_constant_weights_train_all_but_the_classifier(digits):
    before, after, _ = step(task.FIXED, digits)
    assert moved(before, after) == {
        "encoder": True,
        "projector": True,
        "classifier": False,
    }


def test_constant_weights_are_those_of_the_losses_with_their_names(digits):
    setup, data = digits
    weights = np.tile(task.PUBLISHED, (SEEDS, 1, 1))
    outcome = task.train(setup, data, task.FIXED, weights, STEPS, "test")
    for name, weight in zip(task.LOSSES, task.PUBLISHED, strict=True):
        assert outcome.weights[name].shape == (SEEDS, 1, STEPS)
        assert (outcome.weights[name] == weight).all()


def test_the_downstream_loss_trains_its_classifier_and_nothing_else(digits):
    def constant(_):
        weights = dict.fromkeys(task.LOSSES, 1.0) | {task.DOWNSTREAM: 0.0}
        return yoto.weightings.static(weights)._replace(downstream=task.DOWNSTREAM)

    aligned = task.Method(constant, shared=True, downstream=True)
    before, after, gradients = step(aligned, digits)
    _, _, gradients_without = step(task.FIXED, digits)
    assert all(moved(before, after).values())
    # Of Adam the running mean of gradients: it divides by their size, where rounding
    # errors become as large as gradients are.
    for part in ("encoder", "projector"):
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6),
            gradients[part],
            gradients_without[part],
        )


# Records, and what is made of them.


def test_every_method_has_every_seed_and_metric(result):
    for method in METHODS:
        runs = pretraining.DRAWS["quick"] + 4 if method == "random" else 1
        for metric in (*methods.METRICS, "validation"):
            records = select(result["records"], method=method, metric=metric)
            assert sorted(r["seed"] for r in records) == sorted(
                list(range(SEEDS)) * runs
            )
            assert all(0 <= r["value"] <= 1 for r in records)


def test_validation_chooses_and_a_search_pays_for_all_its_runs(result):
    draws = pretraining.DRAWS["quick"]
    for seed in range(SEEDS):
        of_seed = select(result["records"], method="random", seed=seed)
        runs = [r for r in of_seed if "=" in r["config"]]
        validation = values(runs, metric="validation")
        chosen = select(of_seed, config=pretraining.VALIDATED)
        assert {r["compute"] for r in chosen} == {draws}
        best = int(np.argmax(validation))
        for metric in methods.METRICS:
            expected = values(runs, metric=metric)[best]
            assert values(chosen, metric=metric) == expected


def test_seeds_of_a_random_search_draw_apart():
    first, second = (pretraining.random_weights(seed, 5) for seed in range(2))
    assert (first[:, 0] == 1).all()
    assert (first[:, 1:] != second[:, 1:]).all()
    assert (first > 0.009).all()
    assert (first < 101).all()


def test_cost_is_relative_to_a_run_with_constant_weights(result):
    ratios = {
        method: values(result["records"], method=method, metric="step_ratio")
        for method in METHODS
    }
    assert ratios["equal"] == ratios["random"] == 1
    assert ratios["grap"] > 0


def test_tables_and_sentences_follow_from_the_records(result):
    table = report.table(result)
    names = [row[0] for row in table.rows]
    assert names[:3] == ["GraP", "equal weights", "random, best by validation"]
    assert len(names) == 6
    assert all(len(row) == len(table.columns) for row in table.rows)
    assert len(report.summary(result).columns) == 5
    assert len(report.conclusions(result)) == 3
    better = json.loads(json.dumps(result))
    for record in better["records"]:
        if record["method"] == "grap" and record["metric"] == methods.PROBE:
            record["value"] = 1.0 + 0.001 * record["seed"]
    assert "ahead (95 %)" in report.conclusions(better)[1]


def test_best_of_n_of_all_is_the_validated_best(result):
    curve = report.best_of_n(result, "random")
    chosen = select(result["records"], method="random", config=pretraining.VALIDATED)
    expected = values(chosen, metric=methods.PROBE).mean()
    np.testing.assert_allclose(curve[-1], expected, rtol=1e-6)


def test_figure_is_redrawn_from_the_file(folder, result):
    written = (folder / "pretraining.png").read_bytes()
    report.figure(result, folder / "again.png")
    assert (folder / "again.png").read_bytes() == written


def test_meta_names_no_folder_of_this_machine(folder, result):
    assert str(folder.parent) not in json.dumps(result["meta"])
    assert result["meta"]["data"] == "digits"
