"""The table of all methods: what is chosen, counted and compared."""

import functools
import json
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import yoto_jax as yoto
from benchmarks.harness.options import Options, UsageError
from benchmarks.harness.training import operations, prepare
from benchmarks.harness.units import Units
from benchmarks.tasks.frontier import methods, outcomes, races, report, run, train
from benchmarks.tasks.frontier.candidates import capped, in_units
from benchmarks.tasks.frontier.problems import FROM_FOLDER, PROBLEMS, digits, make

LOOKS = 10
pytestmark = pytest.mark.usefixtures("plain_arithmetic")


@pytest.fixture
def plain_arithmetic():
    """Networks of the digits add vectors to matrices."""
    with jax.numpy_rank_promotion("allow"):
        yield


ABOUT = {"p": {"margin": 1.0, "unit": "accuracy in %", "half": "development"}}


def line(method, seed, validation, test, kind="library", runs=1.0):
    """A run whose scores rise to these, or are these [looks]."""
    scores = {"validation": validation, "test": test, "training": validation}
    rise = lambda x: [float(v) for v in np.broadcast_to(x, LOOKS)]
    looks = {name: rise(x) for name, x in scores.items()}
    looks |= {name + " averaged": [v + 0.5 for v in x] for name, x in looks.items()}
    return {
        "problem": "p",
        "method": method,
        "kind": kind,
        "ratios": [],
        "seed": seed,
        "runs": runs,
        "looks": looks,
        "weights": {},
        "seconds": 1.0,
    }


def points(seed, validation, test):
    pairs = zip(validation, test, strict=True)
    return [line("search", seed, v, t, "constant") for v, t in pairs]


LINES = [
    *points(0, [70, 80, 75], [60, 70, 90]),
    *points(1, [81, 80, 75], [66, 70, 90]),
    *points(2, [70, math.nan, 75], [60, 70, 71]),
    *[line("upgrad", s, 70, t, runs=7 / 3) for s, t in enumerate((72.0, 65.0, 71.5))],
    *[line("mgda", s, 70, 50.0 + s, runs=7 / 3) for s in range(3)],
]


# The report.


def test_the_search_is_chosen_by_validation():
    found = outcomes.outcome(LINES, "p", "search")
    assert found.tests == {0: 70, 1: 66, 2: 71}
    assert found.runs == 3


def test_differences_are_paired_and_have_student_s_bounds():
    apart = outcomes.difference(
        outcomes.outcome(LINES, "p", "upgrad"), outcomes.outcome(LINES, "p", "search")
    )
    x = np.array([2.0, -1.0, 0.5])
    error = x.std(ddof=1) / math.sqrt(3)
    assert apart.mean == pytest.approx(0.5)
    assert apart.lower == pytest.approx(0.5 - 2.919986 * error)
    assert apart.reach == pytest.approx(4.302653 * error)
    (verdict,) = [v for v in outcomes.verdicts(LINES, ABOUT) if v["method"] == "upgrad"]
    assert verdict == {
        "task": "p",
        "method": "upgrad",
        "runs": 2.33,
        "difference": 0.5,
        "lower": round(apart.lower, 3),
        "margin": 1.0,
        "seeds": 3,
    }


def test_runs_below_all_constants_are_lost():
    assert outcomes.outcome(LINES, "p", "mgda").collapsed == 3
    assert outcomes.outcome(LINES, "p", "upgrad").collapsed == 1  # 65 < 66 of seed 1


def test_a_run_that_diverged_is_the_worst_not_the_best():
    lines = [*LINES, *[line("famo", s, 70, math.nan) for s in range(3)]]
    found = outcomes.outcome(lines, "p", "famo")
    assert set(found.tests.values()) == {-math.inf}
    (verdict,) = [v for v in outcomes.verdicts(lines, ABOUT) if v["method"] == "famo"]
    assert verdict["difference"] is verdict["lower"] is None
    assert list(outcomes.standings(lines, ABOUT))[-1] == "famo"


def test_ranks_are_among_the_rows_of_all_problems_whose_constants_differ():
    about = dict.fromkeys(("p", "q", "alike"), ABOUT["p"])
    scores = {"p": {"a": 5.0, "b": 3.0, "c": 9.0}, "q": {"a": 2.0, "b": 1.0}}
    lines = [
        line(method, seed, 70, test) | {"problem": problem}
        for seed in range(3)
        for problem, tests in (scores | {"alike": {"a": 0.0}}).items()
        for method, test in tests.items()
    ]
    for problem, worst in (("p", 0.0), ("q", 0.0), ("alike", 4.0)):
        for seed in range(3):
            both = points(seed, [80, 70], [4.0, worst])
            lines += [x | {"problem": problem} for x in both]
    standings = outcomes.standings(lines, about)
    found = {name: rank for name, rank in standings.items() if rank}
    # On p: a 5, search 4, b 3; on q: search 4, a 2, b 1.
    assert {name: rank.mean for name, rank in found.items()} == {
        "search": 1.5,
        "a": 1.5,
        "b": 3.0,
    }
    assert found["a"].reach == pytest.approx(12.706205 * 0.5)
    assert found["b"].reach == 0.0
    # "c" has no rank, for one problem does not have it, though it is the best on p.
    assert list(standings) == ["search", "a", "b", "c"]
    result = {"meta": {"problems": about, "stage": 3}, "runs": lines}
    table = report.table(result)
    assert [row[-1] for row in table.rows][-2:] == ["3.0 ± 0.0", ""]
    assert "all problems but alike (there no constants differ" in table.caption


def test_contenders_reach_the_best_mean():
    chosen = outcomes.contenders(LINES, "p")
    assert "upgrad" in chosen
    assert "search" in chosen
    assert "mgda" not in chosen


def test_separation_is_of_points_chosen_without_the_test():
    apart = outcomes.separation(LINES, "p")
    # 70 - 60, 66 - 90; what diverged validates worst: 71 - 70.
    assert apart.mean == pytest.approx((10 - 24 + 1) / 3)


def test_the_ceiling_is_told_apart_and_is_no_method():
    lines = [*LINES, *[line("ceiling", s, 99, 75.0) for s in range(3)]]
    apart = outcomes.ceiling(lines, "p")
    assert apart.mean == pytest.approx(75 - (70 + 66 + 71) / 3)
    assert outcomes.ceiling(LINES, "p").seeds == 0
    assert outcomes.methods_of(lines) == outcomes.methods_of(LINES)
    assert outcomes.contenders(lines, "p") == outcomes.contenders(LINES, "p")
    assert outcomes.verdicts(lines, ABOUT) == outcomes.verdicts(LINES, ABOUT)
    result = {"meta": {"problems": ABOUT, "stage": 3}, "runs": lines}
    (row,) = report.summary(result).rows
    assert row[-1].startswith("+6.0 ± ")
    (row,) = report.summary(result | {"runs": LINES}).rows
    assert row[-1] == ""


def test_what_averaging_is_worth():
    assert outcomes.averaging(LINES, "p").mean == pytest.approx(0.5)


def test_tables_sentences_and_figure_of_what_is_stored(tmp_path):
    records = outcomes.records_of(LINES, ABOUT)
    text = json.dumps(
        {
            "meta": {"problems": ABOUT, "stage": 3},
            "records": records,
            "runs": LINES,
            "verdicts": outcomes.verdicts(LINES, ABOUT),
        }
    )
    result = json.loads(text)
    rows = {row[0]: row for row in report.table(result).rows}
    assert rows["search"][2] == "69.0"
    assert rows["`upgrad`"][2].startswith("+0.5 ± ")
    assert "(3 lost)" in rows["`mgda`"][2]
    (row,) = report.summary(result).rows
    assert row[:3] == ["p", "development", "3"]
    assert report.conclusions(result)
    report.figure(result, tmp_path / "frontier.png")
    for name in ("frontier.png", "frontier_runs.png"):
        assert (tmp_path / name).stat().st_size > 10_000
    short, stopped = report.tables(result).values()
    assert [row[0] for row in short.rows][-1] == "search"
    assert len(stopped.columns) == 1  # No problem has all searches.
    assert (tmp_path / "frontier.png").stat().st_size > 5000


def test_without_a_search_there_is_nothing_to_compare_with(tmp_path, monkeypatch):
    def train_nothing(problem, rule, configs, seeds):
        found = [line("", seed, 70, 60.0 + seed) for seed in seeds]
        return [{"looks": x["looks"], "seconds": 1.0} for x in found]

    monkeypatch.setattr(run, "train", train_nothing)
    options = Options(
        "frontier",
        methods=("equal",),
        preset="quick",
        out=tmp_path,
        extra={"problems": "helmholtz"},
    )
    run.main(options)
    for name in ("frontier.png", "frontier_runs.png"):
        assert (tmp_path / name).stat().st_size > 5000
    result = json.loads((tmp_path / "frontier.json").read_text())
    table = report.table(result)
    assert [list(row) for row in table.rows] == [["equal", "1", "[61.0]", ""]]
    assert "No search of helmholtz to compare with" in table.caption
    (row,) = report.summary(result).rows
    assert row == ["helmholtz", "held out", "0", "", "", "", ""]
    assert report.conclusions(result) == ["helmholtz: no search to compare with."]


def test_a_search_that_stops_early(tmp_path):
    def told(method, seed, validation, test):
        pairs = zip(validation, test, strict=True)
        return [line(method, seed, v, t, "constant") for v, t in pairs]

    up = np.arange(15.0)
    lines = [
        *[x for seed in range(3) for x in told("search", seed, up, 50 + up)],
        *[x for seed in range(2) for x in told("search, TPE", seed, -up, 60 - up)],
        *told("search, GP", 0, up, 55 + up),
        *told("search, GP", 1, up, 53 + up),
    ]
    result = {"meta": {"problems": ABOUT, "stage": 3}, "runs": lines}
    table = report.stopped(result)
    rows = {row[0]: [cell.split(" ± ")[0] for cell in row[1:]] for row in table.rows}
    assert rows["search, TPE"] == ["-4.0"] * 4  # the first point, 60, beside 64
    assert rows["search, GP"] == ["-8.0", "-6.0", "-2.0", "+4.0"]
    # Of n of fifteen, the best is expected at n / (n + 1) of the way.
    behind = [16 * n / (n + 1) - 1 - 14 for n in report.STOPS]
    assert rows["search"] == [f"{x:+.1f}" for x in behind[:-1]] + ["+0.0"]
    assert table.caption.endswith("Seeds of each: p 3, 2, 2.")
    about = ABOUT | {"q": ABOUT["p"]}  # where no search was made
    table = report.table({"meta": {"problems": about, "stage": 3}, "runs": lines})
    costs = {row[0]: row[1] for row in table.rows}
    assert [costs[name] for name in ("search", *outcomes.BAYESIAN)] == ["15"] * 3
    report.figure(result, tmp_path / "frontier.png")
    assert (tmp_path / "frontier_runs.png").stat().st_size > 10_000


def test_of_what_is_stored_come_the_same_reports():
    rng = np.random.default_rng(0)
    arms = [*outcomes.SHARES, "nash_mtl", "aligned_mtl", "mgda", "ceiling"]
    searched = [*["search"] * 15, *[*outcomes.BAYESIAN] * 15]
    lines = [
        line(method, seed, *rng.uniform(50, 90, (2, LOOKS)))
        for seed in range(3)
        for method in (*searched, *arms)
    ]
    thin = [outcomes.kept(x) for x in lines]
    assert [outcomes.kept(x) for x in thin] == thin
    assert 2 * len(json.dumps(thin)) < len(json.dumps(lines))
    whole, stored = (
        {"meta": {"problems": ABOUT, "stage": 3}, "runs": runs}
        for runs in (lines, thin)
    )
    for made in (report.table, report.tables, report.summary, report.conclusions):
        assert made(whole) == made(stored)
    for made in (outcomes.records_of, outcomes.verdicts, outcomes.standings):
        assert made(lines, ABOUT) == made(thin, ABOUT)
    assert outcomes.contenders(lines, "p") == outcomes.contenders(thin, "p")


# Races.


def test_a_race_drops_lanes_by_what_was_known_at_the_cut():
    early = line("a", 0, np.linspace(50, 60, LOOKS), 60)
    late = line("b", 0, np.linspace(40, 90, LOOKS), 90)
    never = line("c", 0, np.full(LOOKS, math.nan), 99, runs=3.0)
    race = races.Race((), 3, ((0.2, 1),))
    finish = races.run(race, [early, late, never], "validation")
    assert finish.line is early
    assert finish.runs == pytest.approx(0.2 * (1 + 1 + 3) + 0.8)
    race = races.Race((), 3, ((0.2, 2), (0.5, 1)))
    assert races.run(race, [early, late, never], "validation").line is late


def test_a_race_needs_all_of_its_arms():
    race = races.Race(("upgrad", "mgda"), 0, ((0.5, 1),))
    lines = [x for x in LINES if not (x["method"] == "mgda" and x["seed"] == 1)]
    assert set(outcomes.raced(lines, "p", race).tests) == {0, 2}


# Runs.


@pytest.mark.usefixtures("quick_compilation")
def test_the_average_of_parameters_leaves_the_training_alone():
    problem = digits.make("quick")
    rule = methods.SOFTMAX
    config = rule.configure([methods.fixed((1.0, 1.0))] * 2)
    seeds = jnp.arange(2)
    plain = prepare(problem.task, rule, config, 2)
    averaged = train.Averaged(rule)
    other = prepare(problem.task, averaged, config, 2)
    carry, watched = plain.init(seeds, config), other.init(seeds, config)
    for _ in range(plain.chunks):
        carry, _ = plain.advance(carry, problem.task.data, seeds, config)
        watched, _ = other.advance(watched, problem.task.data, seeds, config)
    close = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, carry.model, watched.model)
    # Two per cent of a quick run are less than a step: the model before the last one.
    assert train.HORIZON * problem.task.steps < 1
    near = lambda x, y: np.testing.assert_allclose(x, y, atol=0.1)
    jax.tree.map(near, averaged.average(watched), watched.model)


def test_a_table_grows_from_a_stored_result(tmp_path):
    name = "digits"
    problem = make(name, "quick")
    about = run.description(name, problem)
    lines = [line("equal", s, 1, 2) | {"problem": name} for s in range(3)]
    result = {"meta": {"problems": {name: about}}, "records": [], "runs": lines}
    (tmp_path / "frontier.json").write_text(json.dumps(result))
    options = Options("frontier", preset="quick", out=tmp_path, resume=True)
    assert run.stored(name, problem, options) == lines
    units = Units(options, "frontier-digits")
    work = run.Work(name, problem, units, run.stored(name, problem, options))
    assert work.do("equal", range(3)) == lines  # and nothing is trained
    assert run.Work(name, problem, units, [], collect=True).do("equal", range(3)) == []
    assert run.stored(name, make(name, "cpu"), options) == []


def test_a_problem_of_a_folder_keeps_no_path(street_images, tmp_path):
    extra = {"problems": "camvid"}
    methods = ("equal", "search")
    options = Options(
        "frontier",
        methods,
        seeds=1,
        preset="quick",
        data=street_images,
        out=tmp_path,
        extra=extra,
    )
    run.main(options)
    (units,) = tmp_path.glob("*.units.jsonl")
    result = (tmp_path / "frontier.json").read_text()
    for text in (units.read_text(), result):
        assert str(street_images.parent) not in text
        assert street_images.name in text
    assert list(json.loads(result)["meta"]["problems"]) == ["camvid"]


def test_the_ceiling_trains_the_best_point_of_each_seed(tmp_path, monkeypatch):
    asked = []

    def train_nothing(problem, rule, configs, seeds):
        asked.append((problem.task.data.rows.train.shape[1], configs, seeds))
        return [{"looks": {}} for _ in seeds]

    monkeypatch.setattr(run, "train", train_nothing)
    name, problem = "digits", make("digits", "quick")
    known = [
        line("search", seed, validation, 1) | {"ratios": [ratio, 1.0]}
        for seed, validation, ratio in [(0, 5, 2.0), (0, 7, 3.0), (1, 7, 4.0)]
    ]
    known = [x | {"problem": name} for x in known]
    options = Options("frontier", preset="quick", out=tmp_path)
    work = run.Work(name, problem, Units(options, "frontier-digits"), known)
    lines = work.do("ceiling", range(2))
    assert [(x["method"], x["seed"]) for x in lines] == [("ceiling", 0), ("ceiling", 1)]
    ((rows, configs, seeds),) = asked
    own = problem.task.data.rows
    assert rows == own.train.shape[1] + own.validation.shape[1]
    assert configs == [methods.fixed((3.0, 1.0)), methods.fixed((4.0, 1.0))]
    assert seeds == [0, 1]


def test_seeds_that_are_stored_are_not_trained_again(tmp_path, monkeypatch):
    asked = []

    def train_nothing(problem, rule, configs, seeds):
        asked.append(seeds)
        return [{"looks": {}} for _ in seeds]

    monkeypatch.setattr(run, "train", train_nothing)
    known = [line("equal", seed, 5, 1) | {"problem": "digits"} for seed in (0, 2)]
    options = Options("frontier", preset="quick", out=tmp_path)
    units = Units(options, "frontier-digits")
    work = run.Work("digits", make("digits", "quick"), units, known)
    lines = work.do("equal", range(4))
    assert [x["seed"] for x in lines] == [0, 2, 1, 3]
    assert asked == [[1, 3]]


def test_a_stored_gaussian_process_stays_without_pytorch(monkeypatch):
    monkeypatch.setattr(run.searches, "has_gp", lambda: False)
    problem = digits.make("quick")
    assert "search, GP" not in run.rows(problem)
    assert "search, GP" in run.rows(problem, {"search, GP"})


def test_a_bayesian_search_is_told_validation_scores(tmp_path, monkeypatch):
    asked = []

    def score(problem, rule, configs, seeds):
        asked.append(configs)
        found = [
            line("", s, -abs(np.log(c["ratios"][0])), 5.0)
            for c, s in zip(configs, seeds, strict=True)
        ]
        return [{"looks": x["looks"]} for x in found]

    monkeypatch.setattr(run, "train", score)
    name, method = "digits", "search, TPE"
    options = Options("frontier", preset="quick", out=tmp_path, resume=True)
    work = lambda: run.Work(name, make(name, "quick"), Units(options, name), [])
    lines = work().do(method, range(2))
    assert len(asked) == methods.BUDGET
    assert [x["seed"] for x in lines] == [0, 1] * methods.BUDGET
    assert len({tuple(x["ratios"]) for x in lines}) == len(lines)
    assert work().do(method, range(2)) == lines  # and asks for the same again
    assert len(asked) == methods.BUDGET
    found = outcomes.outcome(lines, name, method)
    assert found.tests == {0: 5.0, 1: 5.0}
    assert found.runs == methods.BUDGET
    none = run.Work(
        name, make(name, "quick"), Units(options, "other"), [], collect=True
    )
    assert none.do(method, range(2)) == []


def test_only_problems_with_data_have_a_ceiling():
    assert "ceiling" in run.rows(make("digits", "quick"))
    assert "ceiling" not in run.rows(make("helmholtz", "quick"))


def test_unknown_problems_and_options_are_refused(tmp_path):
    assert run.chosen(None) == tuple(n for n in PROBLEMS if n not in FROM_FOLDER)
    assert run.chosen(None, tmp_path) == tuple(PROBLEMS)
    assert set(run.QUICK_PROBLEMS) < set(run.chosen(None))
    assert set(run.QUICK) < set(run.rows(digits.make("quick")))
    assert run.chosen("camvid,digits", tmp_path) == ("digits", "camvid")
    assert run.chosen("helmholtz,digits") == ("digits", "helmholtz")
    with pytest.raises(UsageError, match="unknown problem 'x'"):
        run.chosen("x")
    with pytest.raises(UsageError, match="camvid needs a folder of images"):
        run.chosen("camvid,digits")
    with pytest.raises(UsageError, match="digits: no data folder is read"):
        run.chosen("digits", tmp_path)
    with pytest.raises(UsageError, match="data for 10 seeds at most"):
        run.main(Options("frontier", seeds=11, out=tmp_path))


def test_every_weighting_of_the_library_is_a_row_or_has_a_reason():
    rows = run.rows(digits.make("quick"))
    assert len(rows) == len(set(rows))
    known = {*rows, *methods.LEFT_OUT}
    assert set(yoto.weightings.methods()) <= known
    assert not set(methods.LEFT_OUT) & set(rows) - {"equal"}


def test_costs_are_passes():
    task = digits.make("quick").task
    entries = methods.entries(task)
    assert entries["dwa"].runs == 1
    assert entries["upgrad"].runs == pytest.approx(7 / 3)
    assert entries["grap"].runs == pytest.approx(1 + 9 / 3 / 10)


@pytest.mark.slow
def test_momenta_are_the_optimizer_of_the_library_on_one_loss_a_step():
    task = digits.make("quick").task
    rule = train.Averaged(methods.entries(task)["m_config"].rule)
    config = rule.configure([{}])
    program = prepare(task, rule, config, lanes=1)
    found = program.init(jnp.arange(1), config)
    for _ in range(program.chunks):
        found, _ = program.advance(found, task.data, jnp.arange(1), config)
    names = sorted(task.names)
    momenta = yoto.aggregate_momenta(yoto.weightings.config(), len(names))
    model = task.init(jax.random.key(0))
    state = momenta.init(model)
    data = task.of_seed(task.data, jnp.zeros((), jnp.int32))

    @functools.partial(jax.jit, static_argnums=3)
    def advance(model, state, step, turn):
        batch = task.draw(data, jax.random.fold_in(jax.random.key(0), step))
        of_one = lambda model: task.losses_of(model, batch)[0][names[turn]]
        slope = jax.grad(of_one)(model)
        updates, state = momenta.update(slope, state, model, loss=turn)
        decayed = lambda x, u: x - task.schedule(step) * (u + task.weight_decay * x)
        return jax.tree.map(decayed, model, updates), state

    for step in range(task.steps):
        model, state = advance(model, state, step, step % len(names))
    for ours, theirs in zip(
        jax.tree.leaves(found.model), jax.tree.leaves(model), strict=True
    ):
        np.testing.assert_allclose(ours[0], theirs, rtol=1e-3, atol=1e-4)


# Links of a chain.

NOISY = SimpleNamespace(
    names=("p", "a"),
    init=lambda key: jnp.ones(3),
    draw=lambda data, key: jax.random.normal(key, (4, 3)),
    losses_of_batch=lambda w, x: {
        "p": jnp.mean((x @ w - 1) ** 2),
        "a": jnp.sum(jnp.abs(w - x)),
    },
)
KEY = jax.random.key(1)


def one_step(rule):
    state = rule.init(NOISY, {})
    carry = SimpleNamespace(model=jnp.ones(3), rule=state)
    return jax.jit(lambda: rule.step(NOISY, None, carry, {}, KEY))()


def gradients(key):
    rows = jax.jacobian(NOISY.losses_of_batch)(jnp.ones(3), NOISY.draw(None, key))
    return np.stack([rows["a"], rows["p"]])


def test_grad_drop_keeps_one_sign_of_each_entry():
    rows = gradients(KEY)
    kept = np.asarray(one_step(methods.COMBINED["grad_drop"]).grads)
    above, below = np.maximum(rows, 0).sum(0), np.minimum(rows, 0).sum(0)
    assert np.all(np.isclose(kept, above) | np.isclose(kept, below))


def test_adatask_adds_the_steps_of_adam_of_each_loss():
    adatask = methods.COMBINED["adatask"]
    step = one_step(adatask)
    np.testing.assert_allclose(step.grads, np.sign(gradients(KEY)).sum(0), rtol=1e-4)
    assert step.weights == {"a": 1.0, "p": 1.0}


@pytest.mark.parametrize("name", ["modo", "sdmgrad"])
def test_two_batches_have_the_mean_gradients_and_their_product(name):
    first, second = gradients(KEY), gradients(jax.random.fold_in(KEY, 2))
    step = one_step(methods.COMBINED[name])
    weighting = getattr(yoto.weightings, name)()
    losses = {"a": 0.0, "p": 0.0}
    weights, _ = weighting.update(
        losses, weighting.init(losses), cross_gramian=jnp.asarray(first @ second.T)
    )
    w = np.array([weights["a"], weights["p"]])
    np.testing.assert_allclose(list(step.weights.values()), w, rtol=1e-5)
    np.testing.assert_allclose(step.grads, w @ (first + second) / 2, rtol=1e-5)


def test_a_loss_that_one_of_two_batches_lacks_is_absent():
    def masked(w, x):
        losses = {"p": jnp.mean((x @ w - 1) ** 2), "a": jnp.sum(jnp.abs(w - x))}
        return yoto.MaskedLosses(losses, {"p": True, "a": x[0, 0] == first[0, 0]})

    first = NOISY.draw(None, KEY)
    rule = methods.COMBINED["modo"]
    task = SimpleNamespace(**vars(NOISY) | {"losses_of_batch": masked})
    carry = SimpleNamespace(model=jnp.ones(3), rule=rule.init(task, {}))
    step = rule.step(task, None, carry, {}, KEY)
    mean = (gradients(KEY) + gradients(jax.random.fold_in(KEY, 2)))[1] / 2
    np.testing.assert_allclose(step.grads, mean * step.weights["p"], rtol=1e-5)


# Candidates.

LOSSES = {"a": 3.0, "b": 1.0, "p": 2.0}
NORMS = jnp.array([30.0, 0.1, 2.0])


def test_capped_gradients_are_as_long_as_the_primary_s_at_most():
    weighting = capped(yoto.weightings.equal(), "p", most=0.5)
    weights, state = weighting.update(LOSSES, weighting.init(LOSSES), norms=NORMS)
    third = 1 / 3
    np.testing.assert_allclose(
        [weights[name] for name in "abp"], [third * 0.5 * 2 / 30, third, third], 1e-5
    )
    used = state.inner.loss_weights
    assert used["a"] == weights["a"]


def test_in_units_the_unit_of_a_loss_does_not_matter():
    weighting = in_units(yoto.weightings.yoto("p", epsilon=1.0), "p")
    scale = jnp.array([1e3, 1.0, 1.0])
    state = other = weighting.init(LOSSES)
    for _ in range(3):
        weights, state = weighting.update(LOSSES, state, norms=NORMS)
        scaled, other = weighting.update(
            LOSSES | {"a": 3e3}, other, norms=NORMS * scale
        )
    np.testing.assert_allclose(weights["a"], 1e3 * scaled["a"], rtol=1e-5)
    np.testing.assert_allclose(weights["b"], scaled["b"], rtol=1e-5)


def test_in_units_equal_weights_make_equal_lengths():
    weighting = in_units(yoto.weightings.equal(), "p", warmup=2)
    state = weighting.init(LOSSES)
    for factor in (1.0, 3.0, 100.0):  # the last one is after the warm-up
        weights, state = weighting.update(LOSSES, state, norms=factor * NORMS)
    lengths = [float(w) * n for w, n in zip(weights.values(), NORMS, strict=True)]
    np.testing.assert_allclose(lengths, lengths[0], rtol=1e-5)
    np.testing.assert_allclose(state.norms, 2 * NORMS, rtol=1e-5)


def test_a_method_that_looks_seldom_costs_little():
    task = digits.make("quick").task
    entry = methods.entries(task)["nash_mtl, every 10"]
    assert entry.runs == pytest.approx(1 + (7 / 3 - 1) / 10)


def test_gradients_of_features_cost_little_by_the_operations_of_the_step():
    task = digits.make("quick").task
    entries = methods.entries(task)
    assert entries["nash_mtl, of features"].runs is None
    plain = operations(task, methods.SOFTMAX, methods.fixed((1.0, 1.0)))
    features = operations(task, entries["nash_mtl, of features"].rule, {})
    parameters = operations(task, entries["nash_mtl"].rule, {})
    assert 1 < features / plain < 1.1
    assert parameters / plain == pytest.approx(7 / 3, rel=0.1)
