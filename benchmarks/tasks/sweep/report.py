"""What is shown of the shared search, from the stored result alone."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from benchmarks.harness import plots, searches
from benchmarks.harness.results import Result, select, values
from benchmarks.harness.tables import Table, mean_sd
from benchmarks.tasks.digits import task


def _of_trials(result: Result, domains: tuple[str, ...]) -> np.ndarray:
    """Accuracy [trials, seeds], averaged over domains."""
    seeds = result["meta"]["seeds"]
    accuracies = [
        values(result["records"], metric="accuracy", domain=domain)
        for domain in domains
    ]
    return np.mean(accuracies, axis=0).reshape(-1, seeds)


def _validation(result: Result) -> np.ndarray:
    return _of_trials(result, ("validation stylised",))


def _unseen(result: Result) -> np.ndarray:
    return _of_trials(result, task.UNSEEN)


def _finished(result: Result) -> list[dict[str, Any]]:
    return select(result["trials"], state="complete")


def _lost(result: Result) -> list[dict[str, Any]]:
    return [trial for trial in result["trials"] if trial["state"] == "fail"]


def table(result: Result) -> Table:
    """What the search found: its best, and how bad it could have been."""
    columns = ["trial", *(f"weight of the {name}" for name in task.AUXILIARY)]
    columns += ["validation", "mean unseen", "number", "attempts"]
    validation, unseen = _validation(result), _unseen(result)
    chosen = searches.selections(validation.mean(axis=1), unseen.mean(axis=1))
    rows = []
    for choice, i in chosen.items():
        trial = _finished(result)[i]
        rows.append(
            [
                choice,
                *(f"{ratio:.3g}" for ratio in trial["ratios"]),
                mean_sd(validation[i], scale=100),
                mean_sd(unseen[i], scale=100),
                str(trial["number"]),
                str(1 + len(trial["repeats"])),
            ]
        )
    meta = result["meta"]
    before = f", {meta['trials_before']} earlier" if meta["trials_before"] else ""
    storage = STORAGES.get(meta["storage"], meta["storage"])
    caption = (
        f"Accuracy in %, mean ± standard deviation over {meta['seeds']} seeds, "
        f"{meta['steps']} steps; weights relative to the primary loss. "
        f"{len(_finished(result))} trials (TPE{before}) of {meta['workers']} workers "
        f"that shared {storage}, in {meta['seconds']} s; {len(_lost(result))} lost "
        f"with their worker. {meta['device']} ({meta['cpu_count']} cores)."
    )
    return Table(columns, rows, caption)


STORAGES = {"sqlite": "a file of SQLite", "journal": "a journal"}


def conclusions(result: Result) -> list[str]:
    finished, meta = _finished(result), result["meta"]
    best = max(t["value"] for t in finished)
    sentences = [
        f"{len(finished)} of {meta['budget']} trials are complete, by "
        f"{meta['workers']} workers; the best has {100 * best:.1f} % on validation "
        "images."
    ]
    if lost := {t["number"] for t in _lost(result)}:
        again = {number for t in finished for number in t["repeats"]}
        sentences.append(
            f"Lost with their worker: {len(lost)}; of those, tried again to the end: "
            f"{len(lost & again)}."
        )
    return sentences


def figure(result: Result, path: Path) -> None:
    """Who worked when, and how good what was found was."""
    drawing = Figure(figsize=(11, 3.8), dpi=110, layout="constrained")
    left, right = drawing.subplots(1, 2, width_ratios=(3, 2))
    _draw_workers(left, result)
    _draw_values(right, result)
    plots.save(drawing, path)


def _draw_workers(panel: Axes, result: Result) -> None:
    last = max(t["ended"] for t in result["trials"] if t["ended"] is not None)
    kinds = {
        "complete": (plots.BLUE, "complete"),
        "repeated": (plots.GREEN, "complete, a repetition"),
        "fail": (plots.VERMILION, "lost with its worker, until it was noticed"),
    }
    for trial in result["trials"]:
        if trial["started"] is None:
            continue
        kind = "repeated" if trial["repeats"] else trial["state"]
        kind = trial["state"] if trial["state"] == "fail" else kind
        color, label = kinds.get(kind, (plots.GREY, "under way"))
        start, end = trial["started"], trial["ended"] or last
        panel.barh(
            trial["worker"] + 1,
            end - start,
            left=start,
            height=0.7,
            color=color,
            edgecolor="white",
            label=label,
        )
    handles = dict(zip(*panel.get_legend_handles_labels()[::-1], strict=True))
    panel.legend(
        handles.values(),
        handles.keys(),
        fontsize=8,
        ncols=3,
        loc="lower left",
        bbox_to_anchor=(0, 1),
        frameon=False,
    )
    panel.set(xlabel="seconds since the first trial", ylabel="worker")
    panel.yaxis.set_major_locator(MaxNLocator(integer=True))
    panel.invert_yaxis()


def _draw_values(panel: Axes, result: Result) -> None:
    finished = sorted(_finished(result), key=lambda t: t["ended"])
    values = 100 * np.array([t["value"] for t in finished])
    number = np.arange(1, len(values) + 1)
    panel.plot(number, values, "o", color=plots.GREY, markersize=4, label="a trial")
    best = np.array(list(itertools.accumulate(values, max)))
    panel.step(number, best, where="post", color=plots.BLUE, label="best so far")
    panel.set(xlabel="finished trials", ylabel="validation accuracy (%)")
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.legend(
        fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False
    )
