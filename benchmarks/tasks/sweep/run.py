"""One search for loss weights, shared by several processes and machines.

The task is digits under shift. Every trial trains with constant weights in some ratio
to the primary loss, with all seeds, and its value is the accuracy on validation images.
Workers share one study of Optuna: those that this command starts, and those that
``--join`` it from elsewhere. A worker may be killed at any moment.
"""

import dataclasses
import datetime
import multiprocessing
import os
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optuna
import sqlalchemy
from optuna.trial import FrozenTrial, TrialState

import yoto_jax as yoto
from benchmarks.harness.options import Options, UsageError
from benchmarks.harness.provenance import meta
from benchmarks.harness.results import Record, Result, rounded, write_json
from benchmarks.harness.terminal import console, say, show
from benchmarks.tasks.digits import run as digits
from benchmarks.tasks.digits import task
from benchmarks.tasks.sweep import worker as shared
from benchmarks.tasks.sweep.report import conclusions, figure, table
from benchmarks.tasks.sweep.worker import Plan

RESUMABLE = True
METHODS = ("tpe",)
STUDY = "yoto_jax: digits"
LEARNING_RATE = 1e-3
STEPS = {"quick": 20, "cpu": 2000, "gpu": 20_000}
BUDGET = {"quick": 4, "cpu": 27, "gpu": 100}
WORKERS = {"quick": 2, "cpu": 4, "gpu": 4}  # each compiles for itself
BOUNDS = ((0.01, 100.0),) * len(task.AUXILIARY)
RECORDS = "records"  # attribute of a trial


def main(options: Options) -> None:
    options.refuse_data()
    options.choose(METHODS)
    url = storage_of(options)
    if not options.extra.get("join"):
        begin(options, url)
    elif not shared.exists(url, STUDY):
        raise UsageError(f"{shown(url)} has no search to join: start it without --join")
    before = len(shared.completed(shared.load(url, STUDY)))
    started = time.perf_counter()
    workers = options.extra.get("workers") or WORKERS[options.preset]
    supervise(url, workers, options.extra.get("kill"))
    seconds = time.perf_counter() - started
    if options.extra.get("join"):
        return
    path = options.out / "sweep.json"
    settings = {"seconds": round(seconds), "trials_before": before}
    result = write(options, url, path, settings)
    figure(result, path.with_suffix(".png"))
    show(table(result))
    for sentence in conclusions(result):
        say(f"- {sentence}")
    say(f"Written: {path}, {path.with_suffix('.png')}")


def write(options: Options, url: str, path: Path, settings: dict[str, Any]) -> Result:
    """The result of a search that is over."""
    study = shared.load(url, STUDY)
    plan, trials = shared.plan_of(study), study.get_trials(deepcopy=False)
    finished = [t for t in trials if t.state == TrialState.COMPLETE]
    settings |= {
        "budget": plan.budget,
        "workers": len({t.user_attrs[shared.WORKER] for t in finished}),
        "storage": shown(url).split(":")[0],
    }
    if options.extra.get("storage"):  # What is written down has no password in it.
        public = options.extra | {"storage": shown(url)}
        options = dataclasses.replace(options, extra=public)
    return write_json(
        path,
        meta(options, **plan.settings, **settings),
        records_of(finished),
        trials=described(trials),
    )


def storage_of(options: Options) -> str:
    url = options.extra.get("storage")
    if url is None:
        options.out.mkdir(parents=True, exist_ok=True)
        return f"sqlite:///{(options.out / 'sweep.db').resolve()}"
    if "://" not in url and not url.startswith("journal:"):
        raise UsageError(
            f"--storage {url} is neither the URL of a database, such as "
            "sqlite:///sweep.db, nor journal:PATH"
        )
    return url


def shown(url: str) -> str:
    """The storage as it may be read by anybody: without a password."""
    if url.startswith("journal:"):
        return f"journal:{Path(url.removeprefix('journal:')).name}"
    made = sqlalchemy.engine.make_url(url)
    if made.get_backend_name() == "sqlite":
        return f"sqlite:///{Path(made.database or '').name}"
    return made.set(query={}).render_as_string(hide_password=True)


def begin(options: Options, url: str) -> None:
    """Make the study, or check that the one there is to be gone on with."""
    if not options.resume and shared.exists(url, STUDY):
        raise UsageError(
            f"{shown(url)} holds a search already: go on with it by --resume, work "
            "on it by --join, or choose another --storage or --out"
        )
    plan = Plan(
        options.extra.get("budget") or BUDGET[options.preset],
        BOUNDS,
        {
            "steps": options.steps or STEPS[options.preset],
            "seeds": options.seeds,
            "batch": task.BATCH,
        },
    )
    try:
        shared.start(url, STUDY, plan)
    except ValueError as error:
        raise UsageError(
            f"{shown(url)} holds a search with other settings: {error}"
        ) from None


# Workers.


def supervise(url: str, workers: int, kill: int | None = None) -> None:
    """Run so many workers until the search is over.

    After ``kill`` trials, one worker is killed in the middle of its own.
    """
    # They may have to share an accelerator: nobody may take all its memory at once.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    # A new interpreter each: JAX does not survive a fork.
    context = multiprocessing.get_context("spawn")
    processes = {
        name: context.Process(target=serve, args=(url, name), daemon=True)
        for name in (shared.new_name() for _ in range(workers))
    }
    for process in processes.values():
        process.start()
    before = shared.stop_when_told()
    try:
        _watch(url, processes, kill)
    finally:
        signal.signal(signal.SIGTERM, before)
        for process in processes.values():
            process.terminate()  # It gives its trial back.
        for name, process in processes.items():
            process.join()
            shared.give_back(shared.load(url, STUDY), name)
    study = shared.load(url, STUDY)
    budget, done = shared.plan_of(study).budget, len(shared.completed(study))
    if done < budget:
        raise SystemExit(
            f"All workers ended after {done} of {budget} trials: see above why. Go on "
            "with --resume, or with --join from elsewhere."
        )


def _watch(url: str, processes: dict[str, BaseProcess], kill: int | None) -> None:
    study = shared.load(url, STUDY)
    budget, told, ended = shared.plan_of(study).budget, -1, set()
    while any(process.is_alive() for process in processes.values()):
        done = len(shared.completed(study))
        if done != told:
            say(f"sweep: {done} of {budget} trials")
            told = done
        if kill is not None and done >= kill:
            worker = _in_the_middle(study)
            if worker in processes:
                os.kill(processes[worker].pid or 0, signal.SIGKILL)
                kill = None
        for name, process in processes.items():
            if process.exitcode and name not in ended:
                ended.add(name)
                shared.give_back(study, name)
                say(
                    f"sweep: a worker ended with code {process.exitcode} (negative: "
                    "the signal that killed it); its trial goes to another one"
                )
        time.sleep(shared.TIMING.poll)


def _in_the_middle(study: optuna.Study) -> str | None:
    """A worker whose trial has run for half as long as those before, if any."""
    seconds = [
        t.duration.total_seconds() for t in shared.completed(study) if t.duration
    ]
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if trial.datetime_start is None or not seconds:
            continue
        ran = (datetime.datetime.now() - trial.datetime_start).total_seconds()
        if ran >= np.median(seconds) / 2:
            return trial.user_attrs.get(shared.WORKER)
    return None


def serve(url: str, name: str) -> None:
    """What a worker's process does."""
    shared.stop_when_told()
    console.quiet = True
    settings = shared.plan_of(shared.load(url, STUDY)).settings
    shared.work(url, STUDY, objective_of(**settings), worker=name)


def optimizer(rho: jax.Array) -> optax.GradientTransformation:
    """A constant rate: a search is watched here, not a network trained to the end."""
    return yoto.adamw(LEARNING_RATE, hyperparameter_decay=rho)


def objective_of(steps: int, seeds: int, batch: int) -> shared.Objective:
    """Trains and measures the digits with constant weights."""
    if batch != task.BATCH:
        raise ValueError(f"the search is with batches of {batch}, not {task.BATCH}")
    data = task.load()

    def objective(ratios: shared.Point) -> tuple[float, dict[str, Any]]:
        runs = task.fixed(jnp.array([ratios]), seeds)
        outcome = task.train(data.train, optimizer, runs, steps, "sweep")
        measured = digits.measure(outcome, data)
        config = task.describe_ratios(ratios)
        records = [
            record
            for seed in range(seeds)
            for record in task.run_records(METHODS[0], config, seed, 0, measured)
        ]
        value = measured["accuracy", "validation stylised"].mean()
        return float(value), {RECORDS: records}

    return objective


# Records.


def records_of(finished: list[FrozenTrial]) -> list[Record]:
    return [record for trial in finished for record in trial.user_attrs[RECORDS]]


def described(trials: list[FrozenTrial]) -> list[dict[str, Any]]:
    """All trials, those that were lost as well."""
    started = [t.datetime_start for t in trials if t.datetime_start is not None]
    origin = min(started)
    workers = list(dict.fromkeys(t.user_attrs.get(shared.WORKER) for t in trials))
    seconds = lambda t: None if t is None else round((t - origin).total_seconds(), 1)
    return [
        {
            "number": t.number,
            "state": t.state.name.lower(),
            "worker": workers.index(t.user_attrs.get(shared.WORKER)),
            "started": seconds(t.datetime_start),
            "ended": seconds(t.datetime_complete),
            "ratios": [rounded(ratio) for ratio in t.params.values()],
            "value": rounded(t.value) if t.value is not None else None,
            "repeats": t.system_attrs.get(shared.HISTORY, []),
        }
        for t in trials
        if shared.SURPLUS not in t.user_attrs
    ]
