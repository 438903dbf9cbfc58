"""What is shown of the physics-informed network, from the stored result alone."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.harness import plots
from benchmarks.harness.results import Result, rounded, select, values
from benchmarks.harness.searches import VALIDATED, WORST, verdict
from benchmarks.harness.tables import Table, mean_sd
from benchmarks.tasks.pinn.methods import CONDITIONS, FIXED, METHODS


def _rows(result: Result) -> list[tuple[str, str]]:
    """Methods and configurations that have a row."""
    rows = []
    for method in METHODS:
        records = select(result["records"], method=method, metric="error")
        if method == "tuned" and records:
            rows += [(method, VALIDATED), (method, WORST)]
        elif records:
            rows.append((method, records[0]["config"]))
    return rows


def _errors(
    result: Result, method: str, config: str, metric: str = "error"
) -> np.ndarray:
    """One for each seed."""
    return values(result["records"], method=method, config=config, metric=metric)


def _name(method: str, config: str) -> str:
    return "static, worst of grid" if config == WORST else METHODS[method].name


def _measured(result: Result, method: str, metric: str) -> float | None:
    found = values(result["records"], method=method, metric=metric)
    return float(found[0]) if len(found) else None


def _step_seconds(result: Result, method: str) -> float:
    """That of static weights times the relative one, if there is one.

    The same machine in the same rounds: two medians of seconds differ by more.
    """
    relative = _measured(result, method, "relative_time")
    reference = method if relative is None else "static"
    found = _measured(result, reference, "step_seconds")
    if found is None:  # Only the grid ran, with its equal weights.
        found = _measured(result, "tuned", "step_seconds")
    assert found is not None
    return found * (1.0 if relative is None else relative)


def table(result: Result) -> Table:
    columns = [
        "method",
        "error, equal steps",
        "error, equal time",
        "time of a step",
        "initial : pde",
        "boundary : pde",
        "runs",
    ]
    rows = [[_name(m, config), *_row(result, m, config)] for m, config in _rows(result)]
    meta = result["meta"]
    seconds = _measured(result, "static", "step_seconds")
    unit = "" if seconds is None else f" (static: {1000 * seconds:.2g} ms)"
    caption = (
        f"Relative L2 error on the test grid, mean ± standard deviation over "
        f"{meta['seeds']} seeds, after {meta['steps']} steps, and when static weights "
        f"have finished theirs. Time of a step relative to static weights{unit}, "
        f"median (quartiles), looks at gradients every {meta['every']} steps included, "
        "compilation apart. Weights at the end, relative to that of the equation "
        "(geometric mean over seeds). Runs: what it takes to get there. "
        f"{meta['device']} ({meta['cpu_count']} cores)."
    )
    return Table(columns, rows, caption)


def _row(result: Result, method: str, config: str) -> list[str]:
    errors = select(result["records"], method=method, config=config, metric="error")
    at_equal_time = _errors(result, method, config, "error at equal time")
    times = [
        _measured(result, method, metric)
        for metric in ("relative_time", "relative_time:25%", "relative_time:75%")
    ]
    middle, low, high = [f"{time:.3f}" for time in times if time is not None] or [
        ""
    ] * 3
    return [
        mean_sd((record["value"] for record in errors), digits=4),
        mean_sd(at_equal_time, digits=4) if len(at_equal_time) else "",
        f"{middle} ({low} to {high})" if middle else "",
        *(
            f"{rounded(f'{_ratio(result, method, config, name):.2g}'):,g}"
            for name in CONDITIONS
        ),
        f"{errors[0]['compute']:g}",
    ]


def _ratio(result: Result, method: str, config: str, condition: str) -> float:
    of = lambda name: _errors(result, method, config, f"weight:{name}")
    return float(np.exp(np.mean(np.log(of(condition)) - np.log(of("pde")))))


def conclusions(result: Result) -> list[str]:
    """What the numbers say, in sentences."""
    rows = [(m, config) for m, config in _rows(result) if config != WORST]
    errors = {row: _errors(result, *row) for row in rows}
    ranking = sorted(rows, key=lambda row: _geometric_mean(errors[row]))
    listed = ", ".join(
        f"{_name(*row)} {_geometric_mean(errors[row]):.2g}" for row in ranking
    )
    sentences = [f"At equal steps, geometric means over seeds: {listed}."]
    for rival in rows:
        if rival[0] not in FIXED:
            continue
        groups: dict[int, list[str]] = {1: [], 0: [], -1: []}
        for row in rows:
            if row != rival:
                difference = np.log(errors[rival]) - np.log(errors[row])
                groups[verdict(difference)].append(_name(*row))
        better, same, worse = (", ".join(groups[k]) or "none" for k in (1, 0, -1))
        sentences.append(
            f"Against {_name(*rival)} (paired by seed, 95 % interval of the log "
            f"error): better {better}; no significant difference {same}; worse {worse}."
        )
    return sentences


def _geometric_mean(errors: np.ndarray) -> float:
    return float(np.exp(np.mean(np.log(errors))))


# The figure.

STYLES = {
    "static": (plots.BLACK, "--"),
    "tuned": (plots.BLACK, "-"),
    "gradient-norm": (plots.ORANGE, "-"),
    "lr-annealing": (plots.PURPLE, "-"),
    "ntk": (plots.GREEN, "-"),
    "relobralo": (plots.SKY, "-"),
    "uncertainty": (plots.VERMILION, "-"),
    "yoto": (plots.BLUE, "-"),
}


def figure(result: Result, path: Path) -> None:
    """Errors against steps and against time, and weights over time."""
    drawing = Figure(figsize=(11, 8), dpi=100, layout="constrained")
    panels = drawing.subplots(2, 2)
    for method in STYLES:
        runs = [h for h in result["history"] if h["method"] == method]
        if runs:
            _draw(panels, result, method, runs)
    limit = _measured(result, "static", "step_seconds")
    if limit is not None:
        end = limit * result["meta"]["steps"]
        panels[0, 1].axvline(end, color=plots.GREY, linewidth=0.8, zorder=0)
    for panel, label in zip(panels[0], ("training step", "seconds"), strict=True):
        panel.set(xlabel=label, ylabel="relative L2 error")
        plots.plain_log_axis(panel)
    for panel, name in zip(panels[1], CONDITIONS, strict=True):
        panel.set(xlabel="training step", yscale="log")
        panel.set_ylabel(f"weight of {name}, relative to pde")
    panels[0, 0].set_title("Error at equal steps (bands: range over seeds)")
    panels[0, 1].set_title("Error at equal time (line: static finished)")
    drawing.legend(
        *panels[0, 0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=4,
        frameon=False,
    )
    plots.save(drawing, path)


def _draw(panels: Any, result: Result, method: str, runs: list[dict[str, Any]]) -> None:
    """Geometric means over seeds, and their range as a band."""
    color, style = STYLES[method]
    step = np.array(runs[0]["step"])
    seconds = _step_seconds(result, method)

    def draw(panel: Axes, x: np.ndarray, curves: list[np.ndarray]) -> None:
        plots.band(
            panel,
            x,
            np.array(curves),
            color,
            METHODS[method].name,
            geometric=True,
            linestyle=style,
        )

    errors = [np.array(run["error"]) for run in runs]
    draw(panels[0, 0], step, errors)
    draw(panels[0, 1], step * seconds, errors)
    for panel, name in zip(panels[1], CONDITIONS, strict=True):
        ratios = [
            np.divide(run["weights"][name], run["weights"]["pde"]) for run in runs
        ]
        draw(panel, step, ratios)
