"""Many processes, one search: killed workers lose nothing, and nothing is done twice.

The objective is cheap, so that it is the sharing that is tested.
"""

import collections
import json
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState

from benchmarks import __main__ as command_line
from benchmarks.harness.options import Options, UsageError
from benchmarks.harness.results import read_json, select
from benchmarks.harness.searches import VALIDATED
from benchmarks.tasks.digits import task
from benchmarks.tasks.sweep import report
from benchmarks.tasks.sweep import run as sweep
from benchmarks.tasks.sweep import worker as shared
from benchmarks.tasks.sweep.worker import Plan
from tests.benchmarks.sweeping import NAME, QUICK, product, serve

BOUNDS = [(0.01, 100.0), (0.1, 10.0)]
STORAGES = ("sqlite", "journal")


def url_of(folder, storage="sqlite"):
    if storage == "journal":
        return f"journal:{folder / 'journal.log'}"
    return f"sqlite:///{folder / 'sweep.db'}"


@pytest.fixture
def url(tmp_path):
    """A journal: quick to set up."""
    return url_of(tmp_path, "journal")


@pytest.fixture(params=STORAGES)
def any_url(request, tmp_path):
    return url_of(tmp_path, request.param)


def begin(url, budget):
    shared.start(url, NAME, Plan(budget, BOUNDS, {}))
    return shared.load(url, NAME)


def trials_of(url):
    return shared.load(url, NAME).get_trials()


def complete(trials):
    return [t for t in trials if t.state == TrialState.COMPLETE]


# One worker.


def test_a_worker_completes_the_budget_and_stops(any_url):
    study = begin(any_url, 7)
    shared.work(any_url, NAME, product, QUICK)
    shared.work(any_url, NAME, lambda point: pytest.fail("the search is over"), QUICK)
    trials = trials_of(any_url)
    assert [t.state for t in trials] == [TrialState.COMPLETE] * 7
    for trial in trials:
        for ratio, (low, high) in zip(trial.params.values(), BOUNDS, strict=True):
            assert low <= ratio <= high
        assert trial.user_attrs["point"] == list(trial.params.values())
        assert trial.value == trial.params["ratio 0"] * trial.params["ratio 1"]
    assert study.best_value == max(product(tuple(t.params.values()))[0] for t in trials)


def test_the_plan_is_stored_and_another_one_refused(url):
    plan = Plan(3, [(0.1, 1.0)], {"steps": 5})
    assert not shared.exists(url, NAME)
    shared.start(url, NAME, plan)
    assert shared.exists(url, NAME)
    shared.start(url, NAME, plan)
    assert shared.plan_of(shared.load(url, NAME)) == plan
    with pytest.raises(ValueError, match="'steps': 5.* is stored.*'steps': 6"):
        shared.start(url, NAME, plan._replace(settings={"steps": 6}))


def test_what_is_not_finite_is_the_worst(url):
    begin(url, 3)
    values = iter([1.0, float("nan"), 2.0])
    shared.work(url, NAME, lambda point: (next(values), {}), QUICK)
    assert [t.value for t in trials_of(url)] == [1.0, -float("inf"), 2.0]


def test_an_error_gives_the_trial_back_at_once(url):
    begin(url, 3)

    def fails(point):
        raise ZeroDivisionError

    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            shared.work(url, NAME, fails, QUICK)
    seen = []
    shared.work(url, NAME, lambda point: (seen.append(point), product(point))[1], QUICK)
    trials = trials_of(url)
    lost = tuple(trials[0].params.values())
    assert seen[0] == lost
    assert len(seen) == len(complete(trials)) == 3
    assert [t.system_attrs.get(shared.HISTORY) for t in trials[:3]] == [
        None,
        [0],
        [0, 1],
    ]


def test_what_fails_every_time_is_given_up(url):
    begin(url, 2)
    tried = collections.Counter()

    def fails_at_first(point):
        first = next(iter(tried), point)
        tried[point] += 1
        if point == first:
            raise ZeroDivisionError
        return product(point)

    for _ in range(shared.ATTEMPTS):
        with pytest.raises(ZeroDivisionError):
            shared.work(url, NAME, fails_at_first, QUICK)
    shared.work(url, NAME, fails_at_first, QUICK)
    assert max(tried.values()) == shared.ATTEMPTS
    assert len(complete(trials_of(url))) == 2


def test_seeds_of_workers_differ(url):
    begin(url, 2)
    firsts = []

    def one(point):
        firsts.append(point)
        raise KeyboardInterrupt

    for _ in range(2):
        study = shared.load(url, NAME)
        for trial in shared.owed(study.get_trials()):  # So that it is not repeated.
            shared._repeat(study, trial)
            taken = study.ask()
            taken.set_user_attr(shared.SURPLUS, True)
            shared._fail(study, taken.number)
        with pytest.raises(KeyboardInterrupt):
            shared.work(url, NAME, one, QUICK)
    assert firsts[0] != firsts[1]


# Who is gone, and who is too many.


def test_a_worker_that_is_held_for_gone_has_its_value_dropped(any_url):
    begin(any_url, 2)
    study = shared.load(any_url, NAME)
    slow = iter([True, False, False])

    def objective(point):
        if next(slow):
            shared._fail(study, 0)
        return product(point)

    shared.work(any_url, NAME, objective, QUICK)
    trials = trials_of(any_url)
    assert trials[0].state == TrialState.FAIL
    assert trials[0].value is None
    assert trials[1].params == trials[0].params
    assert len(complete(trials)) == 2


def test_a_trial_without_a_first_sign_of_life_is_found(url):
    study = begin(url, 2)
    study.ask()  # by a worker that was killed at once
    shared.work(url, NAME, product, QUICK._replace(grace=0.2))
    trials = trials_of(url)
    assert trials[0].state == TrialState.FAIL
    assert len(complete(trials)) == 2
    assert [0] in [t.system_attrs.get(shared.HISTORY) for t in trials]


def test_what_is_known_to_be_lost_is_given_back_at_once(url):
    study = begin(url, 2)
    mine, other = study.ask(), study.ask()
    mine.set_user_attr(shared.WORKER, "a")
    other.set_user_attr(shared.WORKER, "b")
    shared.give_back(study, "a")
    assert [t.number for t in shared.owed(study.get_trials())] == [mine.number]


def test_only_those_who_stay_silent_are_gone():
    study = optuna.create_study()
    silent, alive = study.ask(), study.ask()
    watch = shared.Watch(grace=0.1)
    for count in range(3):
        alive.set_user_attr(shared.BEAT, count)
        gone = watch.gone(study.get_trials())
        assert [t.number for t in gone] == ([silent.number] if count == 2 else [])
        time.sleep(0.06)


def test_of_two_who_took_the_last_trial_the_later_one_gives_it_back(url):
    study = begin(url, 2)
    numbers = [study.ask().number for _ in range(3)]
    trials = study.get_trials()
    surplus = [shared.is_surplus(n, trials, 2) for n in numbers]
    assert surplus == [False, False, True]


def test_a_trial_to_be_repeated_keeps_its_place():
    study = optuna.create_study()
    taken = [study.ask() for _ in range(3)]
    shared._fail(study, taken[0].number)
    # Number 2 may not take the place of number 0, before and after it is queued.
    assert shared.is_surplus(2, study.get_trials(), 2)
    (lost,) = shared.owed(study.get_trials())
    shared._repeat(study, lost)
    assert not shared.owed(study.get_trials())
    assert shared.is_surplus(2, study.get_trials(), 2)
    assert not shared.is_surplus(3, study.get_trials(), 2)


def test_of_two_repetitions_of_a_trial_one_is_evaluated():
    study = optuna.create_study()
    shared._fail(study, study.ask().number)
    (lost,) = shared.owed(study.get_trials())
    for _ in range(2):
        shared._repeat(study, lost)
    trials = study.get_trials()
    assert [shared.is_surplus(n, trials, 5) for n in (1, 2)] == [False, True]


def test_what_waits_is_taken_once_even_in_sqlite(tmp_path):
    url = url_of(tmp_path)
    study = begin(url, 100)
    for _ in range(20):
        study.enqueue_trial({})
    taken = []

    def take():
        own = shared.load(url, NAME)
        for _ in range(5):
            taken.append(own.ask().number)

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == list(range(20))


# Processes.


@pytest.mark.parametrize(
    ("how", "storage"), [(signal.SIGKILL, "sqlite"), (signal.SIGTERM, "journal")]
)
def test_the_trial_of_a_killed_worker_is_tried_again(how, storage, tmp_path):
    budget, url = 12, url_of(tmp_path, storage)
    begin(url, budget)
    spawn = multiprocessing.get_context("spawn")
    workers = [spawn.Process(target=serve, args=(url, tmp_path)) for _ in range(3)]
    for worker in workers:
        worker.start()
    try:
        pid = tmp_path / "pid"
        while not (pid.is_file() and pid.read_text()):
            time.sleep(0.01)
        os.kill(int(pid.read_text()), how)
        for worker in workers:
            worker.join(50)
        codes = collections.Counter(worker.exitcode for worker in workers)
    finally:
        for worker in workers:
            worker.kill()
    expected = -signal.SIGKILL if how == signal.SIGKILL else 128 + signal.SIGTERM
    assert codes == {expected: 1, 0: 2}
    trials = [t for t in trials_of(url) if shared.SURPLUS not in t.user_attrs]
    (lost,) = [t for t in trials if t.state == TrialState.FAIL]
    done = complete(trials)
    assert len(done) == budget == len(trials) - 1
    (again,) = [t for t in trials if t.system_attrs.get(shared.HISTORY)]
    assert again.system_attrs[shared.HISTORY] == [lost.number]
    assert again.params == lost.params
    assert again.state == TrialState.COMPLETE
    assert again.user_attrs[shared.WORKER] != lost.user_attrs[shared.WORKER]
    assert len({tuple(t.params.values()) for t in done}) == budget
    study = shared.load(url, NAME)
    assert study.best_value == max(product(tuple(t.params.values()))[0] for t in done)


# The benchmark.


def test_a_worker_is_killed_in_the_middle_of_its_trial(tmp_path):
    study = begin(url_of(tmp_path), 9)
    for _ in range(2):
        study.tell(study.ask(), 1.0)
        assert sweep._in_the_middle(study) is None  # nobody is at work
    study.ask().set_user_attr(shared.WORKER, "late")
    started = time.time()
    while (found := sweep._in_the_middle(study)) is None:
        assert time.time() - started < 20
    assert found == "late"


def measured(point):
    """As the digits are, but quicker."""
    domains = ("clean", "validation clean", "validation stylised", *task.UNSEEN)
    values = {("accuracy", d): np.full((2, 1), 1 / (1 + sum(point))) for d in domains}
    config = task.describe_ratios(point)
    records = [
        record
        for seed in range(2)
        for record in task.run_records("tpe", config, seed, 0, values)
    ]
    return 1 / (1 + sum(point)), {sweep.RECORDS: records}


@pytest.fixture
def alone(monkeypatch):
    """One worker, in this process, instead of several."""
    work = lambda url, workers, kill: shared.work(url, sweep.STUDY, measured, QUICK)
    monkeypatch.setattr(sweep, "supervise", work)


def options(folder, *, resume=False, **extra):
    return Options(
        "sweep", seeds=2, preset="quick", out=folder, resume=resume, extra=extra
    )


@pytest.mark.parametrize("storage", [None, "journal"])
def test_the_result_follows_from_the_trials(storage, alone, tmp_path):
    extra = {"storage": url_of(tmp_path, storage)} if storage else {}
    sweep.main(options(tmp_path, budget=5, workers=1, **extra))
    result = read_json(tmp_path / "sweep.json")
    assert str(tmp_path.parent) not in json.dumps(result["meta"])
    assert (tmp_path / "sweep.png").is_file()
    url = extra.get("storage") or f"sqlite:///{tmp_path / 'sweep.db'}"
    best = shared.load(url, sweep.STUDY).best_trial
    (row,) = [r for r in report.table(result).rows if r[0] == VALIDATED]
    assert row[5] == str(best.number)
    assert row[1:3] == [f"{ratio:.3g}" for ratio in best.params.values()]
    assert len(result["trials"]) == 5
    assert "5 of 5 trials are complete" in report.conclusions(result)[0]


def test_a_search_is_gone_on_with_only_if_asked(alone, tmp_path, monkeypatch):
    sweep.main(options(tmp_path, budget=3))
    first = read_json(tmp_path / "sweep.json")
    with pytest.raises(UsageError, match="sweep.db holds a search already: .*--resume"):
        sweep.main(options(tmp_path, budget=3))
    with pytest.raises(UsageError, match="other settings: .*budget=3.*budget=4"):
        sweep.main(options(tmp_path, resume=True, budget=4))
    sweep.main(options(tmp_path, resume=True, budget=3))
    again = read_json(tmp_path / "sweep.json")
    assert again["records"] == first["records"]
    assert again["meta"]["trials_before"] == 3


def test_options_of_one_benchmark_alone(monkeypatch):
    seen = []
    monkeypatch.setattr(sweep, "main", seen.append)
    line = "sweep --workers 2 --join --storage journal:x --seeds 1"
    command_line.main(line.split())
    (given,) = seen
    expected = {"workers": 2, "budget": None, "storage": "journal:x", "join": True}
    expected["kill"] = None
    assert given.extra == expected
    assert "--workers 2 --storage journal:x --join --out out" in given.command
    with pytest.raises(SystemExit):
        command_line.main(["toy", "--workers", "2"])


def test_there_has_to_be_a_search_to_join(alone, tmp_path):
    with pytest.raises(UsageError, match="has no search to join"):
        sweep.main(options(tmp_path, join=True, storage=url_of(tmp_path)))


def test_who_joins_works_and_writes_nothing(alone, tmp_path):
    url = url_of(tmp_path)
    sweep.begin(options(tmp_path, budget=2), url)
    sweep.main(options(tmp_path / "elsewhere", join=True, storage=url))
    assert len(complete(shared.load(url, sweep.STUDY).get_trials())) == 2
    assert not (tmp_path / "elsewhere").exists()


def test_no_password_is_written_down():
    url = "postgresql+psycopg://me:secret@host/db?password=secret"
    assert "secret" not in sweep.shown(url)
    assert "host/db" in sweep.shown(url)
    with pytest.raises(UsageError, match="neither the URL of a database.*nor journal"):
        sweep.storage_of(options(Path(), storage="sweep.db"))


@pytest.mark.usefixtures("quick_compilation", "any_rank")
def test_a_trial_trains_the_digits():
    value, more = sweep.objective_of(steps=2, seeds=1, batch=task.BATCH)((1.0, 2.0))
    (record,) = select(more[sweep.RECORDS], domain="validation stylised")
    assert record["value"] == pytest.approx(value, rel=1e-4)
    assert record["config"] == "invariance=1 reconstruction=2"
    assert {r["domain"] for r in more[sweep.RECORDS]} >= {"clean", *task.UNSEEN}
    json.dumps(more)
