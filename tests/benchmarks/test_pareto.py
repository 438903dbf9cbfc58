"""The two digits are what they say, and records, table and text follow from them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_digits

from benchmarks.harness.options import Options
from benchmarks.harness.results import describe, read_json, select, values
from benchmarks.tasks.digits import task as digits
from benchmarks.tasks.pareto import methods, report, task
from benchmarks.tasks.pareto import run as pareto
from benchmarks.tasks.pareto.task import TASKS, Conditioning
from yoto_jax import conditional

SEEDS, STEPS = 2, 9
RUN = ("equal", "grid", "linear")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("any_rank", "quick_compilation"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, quick_compilation):
    """What the quick preset writes."""
    folder = tmp_path_factory.mktemp("pareto")
    options = Options(
        "pareto", RUN, seeds=SEEDS, steps=STEPS, preset="quick", out=folder
    )
    with jax.numpy_rank_promotion("allow"):
        pareto.main(options)
    return folder


@pytest.fixture(scope="module")
def result(folder):
    return read_json(folder / "pareto.json")


@pytest.fixture(scope="module")
def data():
    with jax.numpy_rank_promotion("allow"):
        return task.load(200)


# The data.


def test_no_source_digit_is_in_two_splits(data):
    parts = digits.split(load_digits().target)
    assert len(np.unique(np.concatenate(parts))) == sum(map(len, parts))
    assert len(data.train.labels) == len(parts[0])


def test_an_image_is_two_digits_in_their_places():
    images = np.arange(1.0, 129.0, dtype=np.float32).reshape(2, 8, 8) / 128
    source = task._on_canvas(digits.Split(jnp.array(images), jnp.array([3, 7])))
    draw = jax.jit(lambda key: task.draw(key, source, 64))
    batch = jax.device_get(draw(jax.random.key(0)))
    seen = set()
    for image, left, right in zip(
        batch.images, batch.labels["left"], batch.labels["right"], strict=True
    ):
        canvas = np.asarray(image).reshape(task.SIDE, task.SIDE)
        matching = []
        for place in np.ndindex(2, 2, 2, 2):
            (a, b), (c, d) = place[:2], np.add(place[2:], task.SHIFT)
            expected = np.zeros((task.SIDE, task.SIDE), np.float32)
            expected[a : a + 8, b : b + 8] = images[int(left == 7)]
            other = np.zeros_like(expected)
            other[c : c + 8, d : d + 8] = images[int(right == 7)]
            if np.array_equal(canvas, np.maximum(expected, other)):
                matching.append(place)
        assert matching
        seen.add((int(left), int(right), matching[0]))
    assert len({pair[:2] for pair in seen}) == 4  # all pairs of two digits
    assert len({pair[2] for pair in seen}) > 8  # and many pairs of places


def test_evaluations_are_the_same_every_time(data):
    again = task.load(200)
    np.testing.assert_array_equal(data.test.images, again.test.images)
    assert not np.array_equal(data.test.images, data.validation.images)


# The models.


def test_weightings_are_even_in_angle_and_short_of_the_corners():
    rays = task.rays(9)
    np.testing.assert_allclose(rays["left"] + rays["right"], 1, rtol=1e-6)
    np.testing.assert_allclose(rays["left"], rays["right"][::-1], rtol=1e-6)
    angles = np.arctan2(rays["left"], rays["right"])
    np.testing.assert_allclose(np.diff(angles), angles[1] - angles[0], rtol=1e-5)
    assert rays["left"][0] == pytest.approx(0.0477, abs=1e-4)
    assert task.rays(1)["left"] == task.rays(1)["right"] == 0.5
    # Those of a grid are among those of a conditional model.
    np.testing.assert_allclose(task.rays(25)["left"][::3], rays["left"], rtol=1e-5)


def test_a_conditional_model_starts_as_the_one_without_conditioning(data):
    key = jax.random.key(0)
    plain, conditioned = task.init(key, 0), task.init(key, 2)
    assert task.parameters(conditioned) > task.parameters(plain)
    images = data.test.images[:5]
    logits = jax.jit(task.logits)
    expected = logits(plain, images, None)
    for encoding in (jnp.zeros((1, 2)), jax.random.normal(key, (5, 2))):
        found = logits(conditioned, images, encoding)
        for name in TASKS:
            np.testing.assert_allclose(found[name], expected[name], atol=1e-6)


@jax.jit
def perturbed(params, key):
    """As after training: conditioning matters."""
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    noise = [
        0.1 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)
    ]
    return jax.tree.map(jnp.add, params, structure.unflatten(noise))


def test_objectives_are_their_formulas(data):
    key = jax.random.key(1)
    losses, objective = jax.jit(task.losses), jax.jit(task.objective, static_argnums=0)
    batch = jax.tree.map(lambda x: np.asarray(x)[:8], data.test)
    weights = {"left": jnp.array(0.3), "right": jnp.array(0.7)}
    plain = perturbed(task.init(key, 0), key)
    entropy = {k: np.asarray(v) for k, v in losses(plain, batch, None).items()}
    expected = 0.3 * entropy["left"].mean() + 0.7 * entropy["right"].mean()
    found = objective(None, plain, batch, key, weights)
    assert found == pytest.approx(expected, rel=1e-5)

    model = perturbed(task.init(key, 2), key)
    for method in ("linear", "cosmos"):
        how = methods.METHODS[method]
        drawn = how.support.sample(key, 8, groups=how.groups)
        w = np.stack([drawn[name] for name in TASKS], axis=1)
        assert (len(np.unique(w[:, 0])) == 1) == (method == "cosmos")
        by_task = losses(model, batch, conditional.encode(drawn, how.support))
        x = np.stack([by_task[name] for name in TASKS], axis=1)
        if method == "linear":
            expected = (w * x).sum(axis=1).mean()
        else:
            r, mean = w[0], x.mean(axis=0)
            cosine = r @ mean / np.linalg.norm(r) / np.linalg.norm(mean)
            expected = r @ mean - 2 * cosine
        found = objective(how, model, batch, key, {})
        assert found == pytest.approx(expected, rel=1e-4)


def test_weights_matter_to_training_and_the_start_is_shared(data):
    def train(steps):
        weights = jax.tree.map(lambda w: jnp.tile(w, SEEDS), task.rays(9))
        seeds = jnp.repeat(jnp.arange(SEEDS), 9)
        return task.train(None, seeds, weights, steps, data.train)

    start = train(0)
    kernel = start["trunk"][0]["w"]
    np.testing.assert_array_equal(kernel[0], kernel[8])
    assert not np.array_equal(kernel[0], kernel[9])  # another seed
    before, after = (task.evaluate(x, data.test)["ce"] for x in (start, train(150)))
    for seed in range(SEEDS):
        low, high = 9 * seed, 9 * seed + 8  # little and much weight on the left digit
        assert after["left"][high] < before["left"][high] - 0.2
        assert after["left"][high] < after["left"][low] - 0.2
        assert after["right"][low] < after["right"][high] - 0.2


def test_conditional_models_are_swept_over_all_weightings(data):
    key = jax.random.key(2)
    models = [perturbed(task.init(k, 2), k) for k in jax.random.split(key, SEEDS)]
    params = jax.tree.map(lambda *x: jnp.stack(x), *models)
    every = jax.tree.map(lambda *x: np.concatenate(x), task.rays(9), task.rays(25))
    found = task.sweep(params, data.test, every)
    assert found["ce"]["left"].shape == (SEEDS, 34)
    encoding = np.array([[2 * every[name][20] - 1 for name in TASKS]])
    expected = jax.jit(task.measure)(models[1], data.test, jnp.asarray(encoding))
    for metric in ("ce", "error"):
        for name in TASKS:
            value = found[metric][name][1, 20]
            np.testing.assert_allclose(value, expected[metric][name], rtol=1e-4)


# What is written.


def test_every_record_is_there(result):
    budgets = {1, methods.MODELS}
    assert {front["runs"] for front in result["fronts"]} == budgets
    assert len(result["fronts"]) == len(RUN) * len(budgets) * SEEDS
    for method in RUN:
        count = methods.weightings(method)
        counts = {count} | ({methods.MODELS} if count > 1 else set())
        found = select(
            result["records"], method=method, metric="hypervolume", domain="test"
        )
        assert len(found) == len(budgets) * SEEDS * len(counts)
        for front in select(result["fronts"], method=method):
            assert len(front["left"]) == methods.weightings(method)
    assert result["meta"]["references"] == {"ce": 2.0, "error": 1.0}


@pytest.mark.parametrize("method", RUN)
def test_numbers_follow_from_the_stored_points(result, method):
    for front in select(result["fronts"], method=method):
        points = np.array([front[name] for name in TASKS]).T
        fields = {
            "method": method,
            "compute": front["runs"],
            "seed": front["seed"],
            "domain": "test",
            "config": describe(weightings=len(points)),
        }
        of = lambda metric, f=fields: values(result["records"], metric=metric, **f)
        assert of("lowest left") == pytest.approx(points[:, 0].min(), rel=1e-3)
        # Far from trained, hardly a point is within the reference of 2.
        inside = np.all(points < 2, axis=1).sum()
        assert of("within the reference") == pytest.approx(inside, abs=1)
        wrong = np.array([front[f"{name} error"] for name in TASKS]).T
        expected = float(conditional.hypervolume(wrong, 1.0))
        assert of("hypervolume of errors") == pytest.approx(expected, rel=2e-3)
        expected = float(conditional.hypervolume(points, 2.0))
        assert of("hypervolume") == pytest.approx(expected, abs=2e-3)


def test_the_grid_has_no_gap_to_itself(result):
    gaps = values(
        result["records"], method="grid", metric="largest gap", compute=methods.MODELS
    )
    np.testing.assert_array_equal(gaps, 0)


def test_calibration_tells_true_minimisers_from_a_model_told_the_wrong_way():
    weights = task.rays(9)["left"]
    minima = {"left": (1 - weights) ** 2, "right": weights**2}
    good = pareto.calibration(minima)
    assert good["row minima on the diagonal"] == 1
    assert good["regret"] == 0
    assert good["largest violation of monotonicity"] == 0
    bad = pareto.calibration({"left": minima["right"], "right": minima["left"]})
    assert bad["row minima on the diagonal"] < 0.2
    assert bad["largest violation of monotonicity"] > 0.5


def test_table_and_conclusions_read_the_stored_result_alone(folder, result):
    table = report.table(result)
    assert len(table.rows) == 2 * len(RUN)
    assert {len(row) for row in table.rows} == {len(table.columns)}
    before = json.dumps(result)
    sentences = report.conclusions(result)
    # The competition, three times the grid, twice equal weights; linear twice.
    assert len(sentences) == 1 + 3 + 2 + 2
    assert json.dumps(result) == before
    report.figure(result, folder / "again.png")
    assert (folder / "again.png").stat().st_size > 10_000


def test_conclusions_say_what_the_numbers_say(result):
    def doctored(ahead):
        values = {"linear": 2.0, "grid": 1.0} if ahead else {"linear": 1.0, "grid": 2.0}
        records = [
            r | {"value": values.get(r["method"], 0.5) + 0.001 * (r["seed"] or 0)}
            if r["metric"] == "hypervolume"
            else r
            for r in result["records"]
        ]
        sentences = report.conclusions(result | {"records": records})
        against = [text for text in sentences if "of the grid with" in text]
        assert len(against) == 3
        return [
            text.split("linear ")[1].split("(")[1].split(")")[0] for text in against
        ]

    assert doctored(ahead=True) == ["ahead"] * 3
    assert doctored(ahead=False) == ["behind"] * 3


def test_without_the_grid_there_is_nothing_to_compare(result):
    alone = {
        name: [r for r in result[name] if r["method"] != "grid"]
        for name in ("records", "fronts")
    }
    sentences = report.conclusions(result | alone)
    assert len(sentences) == 2 + 2
    assert not any("grid" in sentence for sentence in sentences)


def test_draws_are_per_example_group_or_batch():
    for how, draws in ((None, 32), (4, 4), (1, 1)):
        conditioning = Conditioning(1.0, how, conditional.weighted_sum, False)
        weights = conditioning.support.sample(jax.random.key(0), 32, groups=how)
        assert len(np.unique(weights["left"])) == draws
