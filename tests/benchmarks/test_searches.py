"""Searches for loss weights: what they propose, and what is chosen among their runs."""

import importlib
import itertools
import math

import numpy as np
import optuna
import pytest

from benchmarks.harness import searches

BOUNDS = ((0.001, 10.0), (0.01, 1.0))


def run(search, value):
    """Points that a search asks for, one list, and what it was told of them."""
    tried, told = [], []
    while points := search.ask():
        values = [value(point) for point in points]
        search.tell(values)
        tried += points
        told += values
    return tried, told


def bowl(point):
    """Best at 0.1 and 0.1, in the logarithms."""
    return -sum((math.log10(x) + 1) ** 2 for x in point)


# Points that are known beforehand.


def test_points_are_asked_for_once_and_side_by_side():
    points = [(1.0, 2.0), (3.0, 4.0)]
    search = searches.Points(points)
    assert search.budget == 2
    assert search.ask() == points
    search.tell([0.0, 1.0])
    assert search.ask() == []
    assert searches.Points([]).ask() == []


def test_random_draws_are_log_uniform_within_their_bounds():
    budget = 4000
    search = searches.random(BOUNDS, budget, seed=0)
    draws = np.array(search.ask())
    assert search.budget == budget
    assert draws.shape == (budget, 2)
    for column, (low, high) in zip(draws.T, BOUNDS, strict=True):
        assert column.min() >= low
        assert column.max() <= high
        place = np.log(column / low) / math.log(high / low)
        # The distance of Kolmogorov and Smirnov, beyond 1.95 once in a thousand seeds.
        distance = np.abs(np.sort(place) - (np.arange(budget) + 0.5) / budget).max()
        assert distance * math.sqrt(budget) < 1.95
    ranks = draws.argsort(axis=0).argsort(axis=0)
    assert abs(np.corrcoef(ranks.T)[0, 1]) < 0.06


def test_random_draws_depend_on_the_seed_alone():
    first, again, other = (searches.random(BOUNDS, 5, seed).ask() for seed in (3, 3, 4))
    assert first == again
    assert not set(first) & set(other)
    # A larger budget goes on where a smaller one ends.
    assert searches.random(BOUNDS, 9, 3).ask()[:5] == first


# Bayesian searches.


@pytest.fixture(params=searches.SAMPLERS)
def sampler(request):
    if request.param == "gp":
        pytest.importorskip("torch")
    return request.param


def test_a_bayesian_search_stays_in_its_budget_and_bounds(sampler):
    search = searches.Bayesian(sampler, BOUNDS, 7, seed=0)
    asked = []
    while points := search.ask():
        assert len(points) == 1
        search.tell([bowl(points[0])])
        asked += points
    assert len(asked) == search.budget == 7
    assert search.ask() == []
    for column, (low, high) in zip(np.array(asked).T, BOUNDS, strict=True):
        assert ((column >= low) & (column <= high)).all()


def test_a_bayesian_search_is_repeated_by_telling_it_the_same(sampler):
    tried, told = run(searches.Bayesian(sampler, BOUNDS, 8, seed=1), bowl)
    again = searches.Bayesian(sampler, BOUNDS, 8, seed=1)
    for point, value in zip(tried, told, strict=True):
        assert again.ask() == [point]
        again.tell([value])
    other, _ = run(searches.Bayesian(sampler, BOUNDS, 8, seed=2), bowl)
    assert not set(other) & set(tried)


def test_a_bayesian_search_goes_by_what_it_is_told(sampler):
    tried, told = run(searches.Bayesian(sampler, BOUNDS, 15, seed=0), bowl)
    other = searches.Bayesian(sampler, BOUNDS, 15, seed=0)
    opposite, _ = run(other, lambda point: -bowl(point))
    assert tried[:5] == opposite[:5]  # at random, to start with
    assert max(told) > min(told[:5])
    # Told the opposite it goes where this search does not.
    assert np.mean(told[5:]) > np.mean([bowl(point) for point in opposite[5:]]) + 0.5


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_a_failure(bad, sampler):
    search = searches.Bayesian(sampler, BOUNDS, 7, seed=0)
    value = lambda point: bad if len(search._study.trials) in (2, 6) else bowl(point)
    tried, _ = run(search, value)
    states = [trial.state for trial in search._study.trials]
    assert len(tried) == 7
    assert [i for i, s in enumerate(states) if s == optuna.trial.TrialState.FAIL] == [
        1,
        5,
    ]


def test_a_budget_below_the_random_start_is_kept(sampler):
    tried, _ = run(searches.Bayesian(sampler, BOUNDS, 2, seed=0), bowl)
    assert len(tried) == 2


def test_gp_is_there_if_torch_is():
    try:
        importlib.import_module("torch")
        found = True
    except ImportError:
        found = False
    assert searches.has_gp() == found


# What is chosen.


def test_selections_take_the_validated_best_and_describe_the_search():
    validation = [0.1, 0.9, 0.5, 0.3]
    test = [4.0, 1.0, 2.0, 3.0]
    assert searches.selections(validation, test) == {
        searches.VALIDATED: 1,
        searches.ORACLE: 0,
        searches.MEDIAN: 2,
        searches.WORST: 1,
    }


def test_the_test_does_not_choose_the_validated_best():
    validation = [0.1, 0.9, 0.5]
    for test in itertools.permutations([1.0, 2.0, 3.0]):
        assert searches.selections(validation, test)[searches.VALIDATED] == 1


def test_the_first_of_equals_by_validation_is_chosen():
    chosen = searches.selections([0.5, 0.9, 0.9], [3.0, 1.0, 2.0])
    assert chosen[searches.VALIDATED] == 1


def test_nan_is_never_chosen_as_the_best():
    nan = math.nan
    chosen = searches.selections([nan, -5.0, nan], [1.0, nan, 0.5])
    assert chosen[searches.VALIDATED] == 1
    assert chosen[searches.ORACLE] == 0
    assert chosen[searches.WORST] == 1
    chosen = searches.selections([-math.inf, nan], [-math.inf, nan])
    assert chosen[searches.VALIDATED] == 0
    assert chosen[searches.WORST] == 1


def test_one_run_is_all_of_them():
    assert set(searches.selections([0.5], [1.0]).values()) == {0}


def by_choosing(validation, test):
    """Over all choices of n runs, the mean of the validated best's test value."""
    total = range(len(test))
    return [
        np.mean(
            [
                test[max(chosen, key=lambda i: validation[i])]
                for chosen in itertools.combinations(total, n + 1)
            ]
        )
        for n in total
    ]


@pytest.mark.parametrize("total", [1, 2, 6])
def test_the_best_of_n_is_the_mean_over_all_choices(total):
    rng = np.random.default_rng(total)
    validation, test = rng.normal(size=(2, total))
    curve = searches.best_of_n(validation, test)
    np.testing.assert_allclose(curve, by_choosing(validation, test), rtol=1e-12)
    np.testing.assert_allclose(curve[0], test.mean(), rtol=1e-12)
    np.testing.assert_allclose(curve[-1], test[np.argmax(validation)], rtol=1e-12)


def test_the_best_of_n_takes_the_first_of_equals():
    validation, test = [0.5, 0.9, 0.9, 0.1], [1.0, 2.0, 3.0, 4.0]
    curve = searches.best_of_n(validation, test)
    np.testing.assert_allclose(curve, by_choosing(validation, test), rtol=1e-12)
    assert curve[-1] == 2


def test_the_best_of_n_rises_where_validation_ranks_as_the_test_does():
    values = np.random.default_rng(0).normal(size=15)
    assert (np.diff(searches.best_of_n(values, values)) > 0).all()


def test_a_run_whose_validation_is_nan_is_the_last_choice():
    curve = searches.best_of_n([math.nan, 0.5, 0.1], [9.0, 1.0, 2.0])
    np.testing.assert_allclose(curve, [4.0, (1 + 1 + 2) / 3, 1.0])


def test_the_best_so_far_is_the_validated_best_of_the_first_runs():
    validation, test = [math.nan, 0.5, 0.1, 0.5, 0.7], [9.0, 1.0, 2.0, 3.0, 0.5]
    found = searches.best_so_far(validation, test)
    np.testing.assert_array_equal(found, [9.0, 1.0, 1.0, 1.0, 0.5])


@pytest.mark.parametrize(
    ("difference", "sign"),
    [
        ([1.0, 1.1, 0.9], 1),
        ([-1.0, -1.1, -0.9], -1),
        ([1.0, -1.1, 0.9], 0),
        ([2.0, 2.0], 1),
        ([0.0, 0.0], 0),
        ([5.0], 0),
        ([1.0, math.nan], 0),
    ],
)
def test_a_difference_counts_if_its_interval_leaves_0_out(difference, sign):
    assert searches.verdict(np.array(difference)) == sign


def test_the_interval_is_students():
    spread = np.array([-1.0, 0.0, 1.0])  # standard error: 1 / sqrt(3)
    assert searches.verdict(spread + 4.30 / math.sqrt(3)) == 0
    assert searches.verdict(spread + 4.31 / math.sqrt(3)) == 1
