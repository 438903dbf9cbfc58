"""One search that any number of processes, on any number of machines, work on.

The search is a study in a storage of Optuna. A worker takes a trial, gives signs of
life while it evaluates it, and tells its value. A trial without them for a while was
its worker's last: it fails, and its parameters are tried again by another one. As many
trials are completed as were asked for: none is lost, none too many is evaluated.

Optuna has heartbeats of its own, but for databases alone, and not for a worker that is
killed before the first one. Here they are attributes of the trial, which every storage
has, and it is the watching worker's clock that decides.
"""

import collections
import contextlib
import itertools
import math
import secrets
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import optuna
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import event

Point = tuple[float, ...]
Objective = Callable[[Point], tuple[float, dict[str, Any]]]
"""The value of a point, more is better, and what else is to be kept of it."""

PLAN = "plan"  # attribute of the study
BEAT, WORKER, SURPLUS = "beat", "worker", "surplus"  # attributes of trials
HISTORY = "retry_history"  # as Optuna calls it: the numbers of all earlier attempts
FIRST = "failed_trial"
ATTEMPTS = 3
FINISHED = getattr(optuna.exceptions, "UpdateFinishedTrialError", RuntimeError)
"""What a storage raises when a trial is over; the first releases of Optuna 4 have no
name for it."""
LOCKED_SECONDS = 60  # that a worker waits for others to be done with a file of SQLite


class Timing(NamedTuple):
    """In seconds."""

    beat: float = 10.0  # from one sign of life to the next
    grace: float = 60.0  # without one until a worker counts as gone
    poll: float = 1.0  # from look to look of a worker that has nothing to do


TIMING = Timing()


class Plan(NamedTuple):
    """What every worker has to know: it is stored with the study."""

    budget: int  # trials to complete
    bounds: Sequence[tuple[float, float]]  # of each ratio, which are searched in logs
    settings: dict[str, Any]  # of the objective


# Storage.


def open_storage(url: str) -> optuna.storages.BaseStorage:
    """A database by its URL, or a file of operations by ``journal:PATH``."""
    if url.startswith("journal:"):
        backend = optuna.storages.journal.JournalFileBackend(url.split(":", 1)[1])
        return optuna.storages.JournalStorage(backend)
    if not url.startswith("sqlite:"):
        return optuna.storages.RDBStorage(url)
    patient = {"connect_args": {"timeout": LOCKED_SECONDS}}
    storage = optuna.storages.RDBStorage(url, engine_kwargs=patient)

    @event.listens_for(storage.engine, "connect")
    def connected(connection: Any, _: Any) -> None:
        """Write ahead: a transaction then costs no wait for the disk."""
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")

    # SQLite has no locks of rows, by which Optuna sees to it that a trial is taken
    # once. From its beginning, a transaction therefore has the file for itself.
    @event.listens_for(storage.engine, "begin")
    def begun(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    storage.engine.dispose()  # Connections from before.
    return storage


def start(url: str, name: str, plan: Plan) -> None:
    """Make a study, or check that the one there has the same plan.

    Raises:
      ValueError: if it has another one.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        storage=open_storage(url),
        study_name=name,
        direction="maximize",
        load_if_exists=True,
    )
    if PLAN not in study.user_attrs:
        study.set_user_attr(PLAN, plan._asdict())
    there = plan_of(study)
    if there != _as_stored(plan):
        raise ValueError(f"{there} is stored, which is not {_as_stored(plan)}")


def exists(url: str, name: str) -> bool:
    storage = open_storage(url)
    return name in optuna.get_all_study_names(storage)


def load(url: str, name: str) -> optuna.Study:
    """The study; without a sampler, for those who only look."""
    return optuna.load_study(study_name=name, storage=open_storage(url))


def plan_of(study: optuna.Study) -> Plan:
    return _as_stored(Plan(**study.user_attrs[PLAN]))


def _as_stored(plan: Plan) -> Plan:
    return plan._replace(bounds=[tuple(pair) for pair in plan.bounds])


def completed(study: optuna.Study) -> list[FrozenTrial]:
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


# Trials that are owed a repetition, and trials too many.


def _history(trial: FrozenTrial) -> list[int]:
    return trial.system_attrs.get(HISTORY, [])


def owed(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Trials that failed and have to be tried again, but are not yet."""
    repeated = {_history(trial)[-1] for trial in trials if _history(trial)}
    return [
        trial
        for trial in trials
        if trial.state == TrialState.FAIL
        and SURPLUS not in trial.user_attrs
        and trial.number not in repeated
        and len(_history(trial)) + 1 < ATTEMPTS
    ]


def is_surplus(number: int, trials: Sequence[FrozenTrial], budget: int) -> bool:
    """Whether a trial just taken is not needed: others were quicker.

    Workers look before they take a trial, but two may look at once. Numbers tell who
    was first: whatever happens at once, no more than ``budget`` trials, each with its
    repetitions, are not surplus.
    """
    mine = next(trial for trial in trials if trial.number == number)
    if history := _history(mine):
        return any(
            trial.number < number and _history(trial)[-1:] == history[-1:]
            for trial in trials
        )
    waiting = {trial.number for trial in owed(trials)}
    alive = {
        _first(trial)
        for trial in trials
        if trial.state in _ALIVE or trial.number in waiting
    }
    return sum(first < number for first in alive) >= budget


_ALIVE = (TrialState.COMPLETE, TrialState.RUNNING, TrialState.WAITING)


def _first(trial: FrozenTrial) -> int:
    """The number of the first attempt."""
    return [*_history(trial), trial.number][0]


def _repeat(study: optuna.Study, trial: FrozenTrial) -> None:
    """Queue the parameters of a trial once more."""
    history = [*_history(trial), trial.number]
    study.add_trial(
        optuna.create_trial(
            state=TrialState.WAITING,
            params=trial.params,
            distributions=trial.distributions,
            system_attrs={FIRST: history[0], HISTORY: history},
        )
    )


def _fail(study: optuna.Study, number: int) -> None:
    # Somebody else may have done so, or it came to its end after all.
    with contextlib.suppress(FINISHED):
        study.tell(number, state=TrialState.FAIL, skip_if_finished=True)


class Watch:
    """Who has given no sign of life since when, by the clock of this process."""

    def __init__(self, grace: float):
        self._grace = grace
        self._seen: dict[int, tuple[Any, float]] = {}

    def gone(self, trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
        """Trials under way whose worker gave none for the time of grace."""
        now = time.monotonic()
        running = [trial for trial in trials if trial.state == TrialState.RUNNING]
        seen = {}
        for trial in running:
            beat = trial.user_attrs.get(BEAT)
            last, since = self._seen.get(trial.number, (beat, now))
            seen[trial.number] = (beat, since if last == beat else now)
        self._seen = seen
        return [t for t in running if now - seen[t.number][1] > self._grace]


# Work.


def work(
    url: str,
    name: str,
    objective: Objective,
    timing: Timing = TIMING,
    worker: str | None = None,
) -> None:
    """Evaluate trials until as many as planned are complete, whoever did them.

    Args:
      url: Of the storage.
      name: Of the study.
      objective: Evaluates a point.
      timing: When a worker counts as gone.
      worker: Who this is, which nobody else may be (default: drawn at random).
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    worker = worker or new_name()
    study = load(url, name)
    study.sampler = sampler(seed=int(worker, 16))
    plan, watch = plan_of(study), Watch(timing.grace)
    while (trial := _take(study, plan.budget, watch, timing.poll)) is not None:
        _evaluate(study, trial, worker, plan, objective, timing.beat)


def new_name() -> str:
    """A name for a worker: its seed as well."""
    return secrets.token_hex(4)


def give_back(study: optuna.Study, worker: str) -> None:
    """Fail what a worker was at, for those who know that it is gone: nobody waits."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if trial.user_attrs.get(WORKER) == worker:
            _fail(study, trial.number)


def sampler(seed: int) -> optuna.samplers.BaseSampler:
    """Workers have different seeds, or else they would try the same points."""
    with warnings.catch_warnings(category=optuna.exceptions.ExperimentalWarning):
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        # What others are about to try counts as bad: there is no need to go there too.
        return optuna.samplers.TPESampler(
            seed=seed, n_startup_trials=5, constant_liar=True
        )


def _take(
    study: optuna.Study, budget: int, watch: Watch, poll: float
) -> optuna.Trial | None:
    """The next trial to evaluate, when there is one; None when all are complete."""
    while True:
        trials = study.get_trials(deepcopy=False)
        if gone := watch.gone(trials):
            for trial in gone:
                _fail(study, trial.number)
            trials = study.get_trials(deepcopy=False)
        missing = owed(trials)
        for trial in missing:
            _repeat(study, trial)
        states = collections.Counter(trial.state for trial in trials)
        if states[TrialState.COMPLETE] >= budget:
            return None
        alive = sum(states[state] for state in _ALIVE)
        if missing or states[TrialState.WAITING] or alive < budget:
            taken = study.ask()
            if not is_surplus(taken.number, study.get_trials(deepcopy=False), budget):
                return taken
            taken.set_user_attr(SURPLUS, True)
            _fail(study, taken.number)
        else:
            time.sleep(poll)


def _evaluate(
    study: optuna.Study,
    trial: optuna.Trial,
    worker: str,
    plan: Plan,
    objective: Objective,
    seconds: float,
) -> None:
    try:
        with _beating(trial, seconds):
            trial.set_user_attr(WORKER, worker)
            point = tuple(
                trial.suggest_float(f"ratio {i}", low, high, log=True)
                for i, (low, high) in enumerate(plan.bounds)
            )
            value, more = objective(point)
    except BaseException:  # An error, or told to stop: another one need not wait.
        with contextlib.suppress(optuna.exceptions.OptunaError):
            _fail(study, trial.number)
        raise
    # Held for gone in the meantime? Then somebody else tries it again.
    with contextlib.suppress(FINISHED):
        for key, entry in more.items():
            trial.set_user_attr(key, entry)
        # Optuna takes no NaN: what went astray is as bad as can be.
        value = value if math.isfinite(value) else -math.inf
        study.tell(trial, value, skip_if_finished=True)


@contextlib.contextmanager
def _beating(trial: optuna.Trial, seconds: float) -> Iterator[None]:
    """Give signs of life."""
    stopped = threading.Event()

    def beat() -> None:
        for count in itertools.count():
            # One that fails is not worth the run. The time of grace is that of several.
            with contextlib.suppress(optuna.exceptions.OptunaError, FINISHED, OSError):
                trial.set_user_attr(BEAT, count)
            if stopped.wait(seconds):
                return

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()


def stop_when_told() -> Any:
    """Let SIGTERM, by which clusters announce the end, give the trial back.

    Returns:
      What it did before.
    """
    return signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
