"""What a race costs, told before it starts."""

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from yoto_jax import racing


def test_cost_is_the_sum_over_the_rungs():
    race = racing.plan(2000, arms=15, cuts=[(0.2, 3), (0.5, 1)])
    assert [tuple(rung) for rung in race.rungs] == [
        (0, 400, 15, 3),
        (400, 1000, 3, 1),
        (1000, 2000, 1, 1),
    ]
    assert race.runs == pytest.approx(15 * 0.2 + 3 * 0.3 + 0.5)
    assert (race.arms, race.steps) == (15, 2000)


def test_one_arm_is_one_run():
    race = racing.plan(100, arms=1, cuts=[])
    assert race.runs == 1
    assert race == racing.successive_halving(100, arms=1)


def test_a_race_without_cuts_is_decided_at_the_end():
    (rung,) = racing.plan(100, arms=4, cuts=[]).rungs
    assert (rung.lanes, rung.keep, rung.steps) == (4, 1, 100)


@pytest.mark.parametrize("arms", [2, 3, 8, 9, 16, 27, 100])
@pytest.mark.parametrize("eta", [2.0, 3.0, 4.0])
def test_halving_keeps_the_floor_of_the_papers(arms, eta):
    race = racing.successive_halving(10_000, arms=arms, eta=eta)
    lanes = [rung.lanes for rung in race.rungs]
    assert lanes[0] == arms
    assert lanes[-1] == race.rungs[-1].keep == 1
    for i, number in enumerate(lanes[1:], 1):
        assert number == max(1, int(arms / eta**i + 1e-9))
    # As many steps of all lanes in each rung but for those that went on.
    stops = np.array([rung.stop for rung in race.rungs])
    np.testing.assert_allclose(stops[1:] / stops[:-1], eta, rtol=0.02)
    assert [rung.start for rung in race.rungs[1:]] == stops[:-1].tolist()
    assert stops[-1] == 10_000


def test_a_late_first_cut_leaves_several_lanes_to_the_end():
    race = racing.successive_halving(100, arms=9, first=0.5)
    assert [(r.stop, r.lanes, r.keep) for r in race.rungs] == [(50, 9, 3), (100, 3, 1)]


def test_after_tells_what_is_left():
    race = racing.plan(100, arms=4, cuts=[(0.2, 2), (0.5, 1)])
    assert race.after(0) == race.rungs
    cut, *rest = race.after(20)  # The cut after the first rung is left to do.
    assert (cut.steps, cut.lanes, cut.keep) == (0, 4, 2)
    assert tuple(rest) == race.rungs[1:]
    first, second = race.after(35)
    assert (first.start, first.stop, first.lanes, first.keep) == (35, 50, 2, 1)
    assert second == race.rungs[2]
    assert [rung.steps for rung in race.after(100)] == [0]
    assert [race.lanes_at(step) for step in (0, 20, 21, 50, 51, 100)] == [
        4,
        4,
        2,
        2,
        1,
        1,
    ]


def test_halving_says_what_it_lacks():
    with pytest.raises(ValueError, match="27 arms and eta 3.0 ask for cuts"):
        racing.successive_halving(5, 27)
    with pytest.raises(ValueError, match="above 1 and finite"):
        racing.successive_halving(5, 27, eta=float("inf"))


def test_bytes_of_all_lanes():
    race = racing.plan(10, arms=3, cuts=[(0.5, 1)])
    lane = {
        "w": jnp.zeros((4, 5)),
        "half": jax.ShapeDtypeStruct((6,), jnp.bfloat16),
        "key": jax.random.key(0),
    }
    assert race.lanes_bytes(lane) == 3 * (80 + 12 + 8)
    lanes = racing.start({"w": lane["w"]}, 3)
    assert race.lanes_bytes({"w": lane["w"]}) == lanes["w"].nbytes


LANES = {"w": jnp.zeros(2)}


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: racing.plan(0, 2, []), ValueError, "steps must be at least 1, got 0"),
        (lambda: racing.plan(9, 0, []), ValueError, "arms must be at least 1, got 0"),
        (lambda: racing.plan(9.5, 2, []), TypeError, "steps must be an integer"),
        (lambda: racing.plan(9, 2, [(1.5, 1)]), ValueError, r"in \(0, 1\), got 1.5"),
        (lambda: racing.plan(9, 2, [(0.5, 2)]), ValueError, "keeps 2 of 2"),
        (lambda: racing.plan(9, 2, [(0.5, 0)]), ValueError, "keep must be at least 1"),
        (
            lambda: racing.plan(9, 4, [(0.5, 2), (0.5, 1)]),
            ValueError,
            "at least a step apart",
        ),
        (
            lambda: racing.plan(9, 4, [(0.99, 2)]),
            ValueError,
            "leaves no step of 9 after it",
        ),
        (lambda: racing.plan(9, 3, [(0.01, 1)]), ValueError, "is at step 0 of 9"),
        (
            lambda: racing.plan(9, 3, cast("Any", (0.2, 1))),
            TypeError,
            r"must be pairs \(share, keep\)",
        ),
        (
            lambda: racing.keep(LANES, {"score": [1.0, 2.0]}, 1),
            TypeError,
            "got a dict",
        ),
        (
            lambda: racing.successive_halving(9, 3, eta=1.0),
            ValueError,
            "eta must be above 1",
        ),
        (
            lambda: racing.successive_halving(9, 3, first=1.0),
            ValueError,
            r"first must be in \(0, 1\)",
        ),
        (
            lambda: racing.plan(9, 3, []).after(-1),
            ValueError,
            "step must be at least 0",
        ),
        (lambda: racing.start(LANES, 2.0), TypeError, "arms must be an integer"),
        (
            lambda: racing.keep(LANES, [1.0, 2.0], 1.0),
            TypeError,
            "number must be an in",
        ),
        (
            lambda: racing.keep(LANES, [1.0, 2.0], True),
            TypeError,
            "number must be an in",
        ),
        (lambda: racing.keep(LANES, [1.0, 2.0], 3), ValueError, "from 1 to 2, got 3"),
        (
            lambda: racing.plan(9, 3, []).after(10),
            ValueError,
            "step must be at most 9",
        ),
    ],
)
def test_misuse(make, error, message):
    with pytest.raises(error, match=message):
        make()
