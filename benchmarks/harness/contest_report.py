"""What is shown of a contest, from the stored result alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.stats
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.harness import plots, searches
from benchmarks.harness.contest import (
    BUDGETS,
    CONSTANT,
    CONSTANT_PREDICTION,
    DRAWN,
    PLAIN,
    SEARCHES,
    SOFTMAX,
    SWEEP,
    Contest,
    timed,
)
from benchmarks.harness.results import Record, Result, select, values
from benchmarks.harness.searches import MEDIAN, ORACLE, VALIDATED, WORST, verdict
from benchmarks.harness.tables import Table, mean_sd


class View(NamedTuple):
    """A result, and what is needed to read it."""

    result: Result
    labels: dict[str, tuple[str, str]]  # method: label, rule
    metric: str
    better: int
    seen: str
    unseen: tuple[str, ...]

    def of(self, method: str, config: str = "") -> list[Record]:
        found = select(self.result["records"], method=method, config=config)
        return [r for r in found if r["seed"] is not None]

    def searched(self, method: str) -> list[Record]:
        """The runs of a search, not the choices among them."""
        found = select(self.result["records"], method=method)
        return [r for r in found if "=" in r["config"]]

    def rows(self) -> dict[tuple[str, str], str]:
        """What the table has: method and config, and their name."""
        rows = {}
        for method, (label, _) in self.labels.items():
            if method not in SEARCHES:
                if self.of(method):
                    rows[method, ""] = label
                continue
            budgets = [f"{VALIDATED}, {n} runs" for n in BUDGETS]
            extra = [ORACLE, MEDIAN, WORST] if method == "grid" else []
            for config in [*(budgets if method != "grid" else []), VALIDATED, *extra]:
                if self.of(method, config):
                    rows[method, config] = f"{label}, {self._title(method, config)}"
        return rows

    def _title(self, method: str, config: str) -> str:
        if config.startswith(VALIDATED):
            return f"{VALIDATED}, {self.of(method, config)[0]['compute']:g} runs"
        if config == ORACLE:
            return "best on test (oracle)"
        return f"{config} point"

    def values(self, method: str, config: str, metric: str, domain: Any) -> np.ndarray:
        return values(self.of(method, config), metric=metric, domain=domain)

    def unseen_values(self, method: str, config: str = "") -> np.ndarray:
        """The metric averaged over the unseen domains, one for each seed."""
        of_domains = [
            self.values(method, config, self.metric, domain) for domain in self.unseen
        ]
        return np.mean(of_domains, axis=0)

    def constant(self) -> float | None:
        """The metric of predicting without looking, averaged over unseen domains."""
        records = select(self.result["records"], method=CONSTANT_PREDICTION)
        records = select(records, metric=self.metric)
        found = [values(records, domain=domain) for domain in self.unseen]
        return float(np.mean(found)) if np.size(found) else None

    def runs(self, method: str, config: str = "") -> float:
        """Total cost in units of one run with constant weights."""
        ratio = 1.0
        if method not in CONSTANT:
            ratio = self.step_ratio(self.labels[method][1])
        costs = [record["compute"] for record in self.of(method, config)]
        return float(ratio * np.mean(costs))

    def step_ratio(self, rule: str, what: str = "median") -> float:
        records = self.result["records"]
        found = values(records, method=timed(rule), metric=f"step_ratio:{what}")
        return float(found[0]) if len(found) else float("nan")

    def weights(self, method: str, config: str, names: Sequence[str]) -> str:
        """Final weights, the primary loss first."""
        return " / ".join(
            f"{self.values(method, config, f'weight:{n}', None).mean():.2g}"
            for n in names
        )


def view(contest: Contest, result: Result) -> View:
    labels = {name: (m.label, m.rule) for name, m in contest.methods.items()}
    return View(
        result,
        labels,
        contest.metric,
        contest.better,
        contest.seen,
        contest.unseen,
    )


def table(seen: View, names: Sequence[str], caption: str) -> Table:
    """The main table: the metric by domain, its mean, the cost, the final weights."""
    columns = ["method", seen.seen, *seen.unseen, "mean unseen", "runs", "weights"]
    rows = []
    for (method, config), label in seen.rows().items():
        of_domains = [
            mean_sd(seen.values(method, config, seen.metric, domain))
            for domain in (seen.seen, *seen.unseen)
        ]
        rows.append(
            [
                label,
                *of_domains,
                mean_sd(seen.unseen_values(method, config)),
                f"{seen.runs(method, config):.3g}",
                seen.weights(method, config, names),
            ]
        )
    return Table(columns, rows, caption)


def short(full: Table, seen: View) -> Table:
    """The methods that a user would choose from, without the domains one by one."""
    kept = [i for i, c in enumerate(full.columns) if c not in (*seen.unseen, "weights")]
    chosen = [
        row
        for (method, config), row in zip(seen.rows(), full.rows, strict=True)
        if config in ("", VALIDATED, ORACLE, WORST)
        and method in (*SEARCHES, *_MARKS)
        and method not in ("normalized", "dwa", "geometric")
    ]
    return Table(
        [full.columns[i] for i in kept],
        [[row[i] for i in kept] for row in chosen],
        full.caption.split(" Weights:")[0],
    )


DIGEST = {
    ("primary", ""): "the primary loss alone",
    ("equal", ""): "equal weights",
    ("published", ""): "published weights",
    ("yoto", ""): "YOTO, defaults of the library",
    ("paper", ""): "YOTO, settings of the paper",
    ("grap", ""): "GraP, held-out objective",
    ("aligned", ""): "softmax alignment, held-out objective",
    ("conditional", ""): "one conditional model, best weights by validation",
    ("conditional-narrowed", ""): "one conditional model, narrowed by validation",
    ("random", f"{VALIDATED}, 5 runs"): "5 random draws, best by validation",
    ("random", VALIDATED): "15 random draws, best by validation",
    ("gp", VALIDATED): "15 runs of Bayesian search (GP), best by validation",
    ("grid", VALIDATED): "the paper's grid, best by validation",
    ("grid", ORACLE): "the paper's grid, its best point by the test (nobody has that)",
    ("grid", WORST): "the paper's grid, its worst point by the test",
}


def digest(views: dict[str, View]) -> Table:
    """Tasks side by side: the metric on unseen domains, and the cost in runs."""
    without = []
    for seen in views.values():
        constant = seen.constant()
        without += ["" if constant is None else f"{constant:.1f}", "0"]
    rows = [["the usual value of each pixel, no image", *without]]
    for (method, config), label in DIGEST.items():
        cells = []
        for seen in views.values():
            there = bool(seen.of(method, config))
            found = seen.unseen_values(method, config) if there else []
            cells.append(mean_sd(found) if there else "")
            cells.append(f"{seen.runs(method, config):.3g}" if there else "")
        rows.append([label, *cells])
    columns = ["weights"]
    for name, seen in views.items():
        columns += [f"{name} ({seen.metric})", "runs"]
    return Table(
        columns,
        rows,
        "Means over the unseen domains in %, mean ± standard deviation over seeds; "
        "runs: total cost in units of one run with constant weights. Validation "
        "chooses for each seed, the test one point for all.",
    )


def cost_table(seen: View) -> Table:
    """What a step costs, relative to one with constant weights."""
    names = {SOFTMAX: "YOTO and its variants", f"{PLAIN} again": "the same step again"}
    names |= {"conditional": "one conditional model, the weights chosen afterwards"}
    names |= {rule: label for label, rule in seen.labels.values() if rule not in names}
    rows = [
        [label, f"{ratio:.3f} ({low:.3f} to {high:.3f})"]
        for rule, label in names.items()
        if timed(rule) == rule
        if (ratio := seen.step_ratio(rule)) == ratio
        for low, high in [(seen.step_ratio(rule, "low"), seen.step_ratio(rule, "high"))]
    ]
    speed = {
        what: values(seen.result["records"], metric=f"speed:{what}")
        for what in ("median", "low", "high")
    }
    caption = (
        "Time of a step over that of one with constant weights: median and quartiles "
        "of rounds in turns."
    )
    if len(speed["median"]):
        caption += (
            f" {SWEEP} runs side by side in one program take as long as "
            f"{SWEEP / speed['median'][0]:.1f} one by one "
            f"({speed['median'][0]:.2f} times faster, quartiles "
            f"{speed['low'][0]:.2f} to {speed['high'][0]:.2f})."
        )
    return Table(["rule", "step"], rows, caption)


def claims(seen: View) -> Table:
    """The paper's claims, and what these numbers say."""
    rows = []

    def add(claim: str, ours: tuple[str, str], theirs: tuple[str, str]) -> None:
        if not (seen.of(*ours) and seen.of(*theirs)):
            return
        difference = seen.better * (
            seen.unseen_values(*ours) - seen.unseen_values(*theirs)
        )
        outcome = {
            1: "ahead (95 %): held",
            0: "no significant difference",
            -1: "behind (95 %): did not hold",
        }[verdict(difference)]
        rows.append([claim, mean_sd(difference), outcome])

    for method, label in (("paper", "paper's settings"), ("yoto", "our defaults")):
        mine = (method, "")
        add(f"YOTO ({label}) beats the best grid point", mine, ("grid", ORACLE))
        add("- the validated best of the grid", mine, ("grid", VALIDATED))
        add("- random search, all its runs", mine, ("random", VALIDATED))
        add("- Bayesian search (TPE), all its runs", mine, ("tpe", VALIDATED))
        add("- Bayesian search (GP), all its runs", mine, ("gp", VALIDATED))
        add("- the published weights", mine, ("published", ""))
        add("- equal weights", mine, ("equal", ""))
        add("- the primary loss alone", mine, ("primary", ""))
    for method in ("conditional", "conditional-narrowed"):
        if method not in seen.labels:
            continue
        label = seen.labels[method][0]
        add(
            f"One model, {label}, beats the best grid point",
            (method, ""),
            ("grid", ORACLE),
        )
        add("- the validated best of the grid", (method, ""), ("grid", VALIDATED))
        add("- YOTO (our defaults)", (method, ""), ("yoto", ""))
        add("- equal weights", (method, ""), ("equal", ""))
        add("- the primary loss alone", (method, ""), ("primary", ""))
    rows += _steadiness(seen)
    best = best_train_once(seen)
    if best:
        label = seen.labels[best][0]
        add(
            f"{label} (best of the train-once methods, a choice made on the test) "
            "beats the best grid point",
            (best, ""),
            ("grid", ORACLE),
        )
        add("- the validated best of the grid", (best, ""), ("grid", VALIDATED))
        add("- equal weights", (best, ""), ("equal", ""))
    rows += _spread(seen)
    return Table(
        ["claim", "difference", "verdict"],
        rows,
        "Differences of the mean over unseen domains, in points, positive in favour of "
        "the claim; mean ± standard deviation over seeds. Ahead and behind: 0 is "
        "outside of Student's 95 % interval of the mean. Tukey's test takes seeds as "
        "blocks and points as independent, which neighbours on a grid are not: its p "
        "is too small by a factor of a few.",
    )


def _spread(seen: View) -> list[list[str]]:
    """Whether the points of the grid differ by more than the noise of the seeds."""
    rows = []
    for domains in ((seen.seen,), *((d,) for d in seen.unseen), seen.unseen):
        found = _grid_values(seen, domains)
        if found is None or min(found.shape) < 2:
            continue
        name = domains[0] if len(domains) == 1 else "mean unseen"
        means = found.mean(axis=1)
        rows.append(
            [
                f"weights matter: best against worst grid point, {name}",
                mean_sd(found[means.argmax()] - found[means.argmin()]),
                f"Tukey's range test: p = {max(range_test(found), 1e-6):.1g}",
            ]
        )
    return rows


def _grid_values(seen: View, domains: Sequence[str]) -> np.ndarray | None:
    """The metric of the points of the grid, [points, seeds]."""
    records = seen.searched("grid")
    points = dict.fromkeys(r["config"] for r in records)
    if not points:
        return None
    return np.array(
        [
            np.mean(
                [
                    values(records, config=point, metric=seen.metric, domain=domain)
                    for domain in domains
                ],
                axis=0,
            )
            for point in points
        ]
    )


def range_test(found: np.ndarray) -> float:
    """Probability that noise alone spreads the means of rows [points, seeds] so far.

    Tukey's test of the studentized range, seeds as blocks.
    """
    points, seeds = found.shape
    rows, columns = found.mean(axis=1), found.mean(axis=0)
    residual = found - rows[:, None] - columns[None] + found.mean()
    freedom = (points - 1) * (seeds - 1)
    deviation = np.sqrt((residual**2).sum() / freedom / seeds)
    spread = (rows.max() - rows.min()) / deviation
    return float(scipy.stats.studentized_range.sf(spread, points, freedom))


def _steadiness(seen: View) -> list[list[str]]:
    """What the paper says of rho and of seeds."""
    rows = []
    family = [m for m in seen.labels if m == "paper" or m.startswith("rho-")]
    family = [m for m in family if seen.of(m)]
    if len(family) > 1:
        ranked = sorted(family, key=lambda m: seen.unseen_values(m).mean())
        low, high = (seen.unseen_values(m) for m in (ranked[0], ranked[-1]))
        apart = verdict(high - low) != 0
        rows.append(
            [
                f"YOTO hardly depends on rho: best against worst of {len(family)}",
                mean_sd(high - low),
                "significant: did not hold" if apart else "no significant difference",
            ]
        )
    if seen.of("paper"):
        records = seen.of("paper")
        names = [r["metric"] for r in records if r["metric"].startswith("weight:")]
        primary, *others = dict.fromkeys(names)
        weight = lambda name: values(records, metric=name)
        spread = [
            np.log10(weight(name) / weight(primary)).std(ddof=1)
            for name in others
            if len(weight(name)) > 1
        ]
        if spread:
            rows.append(
                [
                    "seeds end at the same weights: sd of log10 of a ratio, largest",
                    f"{max(spread):.3f}",
                    "paper: at most 0.015",
                ]
            )
    return rows


def best_train_once(seen: View) -> str | None:
    """Of the methods that learn weights in one run; a choice made on the test."""
    learned = [
        method for method in seen.labels if method not in CONSTANT and seen.of(method)
    ]
    if not learned:
        return None
    return max(learned, key=lambda m: seen.better * seen.unseen_values(m).mean())


# The figure.


def figure(seen: View, names: Sequence[str], path: Path, ylabel: str) -> None:
    """Weights over time, and the metric against total cost."""
    history = seen.result["history"]
    shown = [m for m in DRAWN if seen.of(m)]
    drawing = Figure(figsize=(13, 7.6), dpi=100, layout="constrained")
    parts: Any = drawing.subfigures(2, 1, height_ratios=(1, 1.45))
    upper, lower = parts
    colors = dict(zip(names, (plots.BLUE, plots.VERMILION, plots.GREEN), strict=False))
    if shown:
        panels = upper.subplots(1, len(shown), sharey=True, squeeze=False)[0]
        for panel, method in zip(panels, shown, strict=True):
            of_method = [h for h in history if h["method"] == method]
            for name in names:
                curves = np.array([h["weights"][name] for h in of_method])
                curves /= sum(
                    np.array([h["weights"][n] for h in of_method]) for n in names
                )
                plots.band(panel, of_method[0]["step"], curves, colors[name], name)
            label = seen.labels[method][0]
            panel.set_title(label.replace(" (", "\n(").replace(", held", ",\nheld"))
            panel.set(xlabel="training step", ylim=(0, 1))
        panels[0].set_ylabel("share of the weights")
        panels[0].legend(fontsize=8)
    panel = lower.subplots()
    _draw_costs(panel, seen, ylabel)
    plots.save(drawing, path)


_MARKS = {
    "primary": ("x", plots.GREY),
    "equal": ("s", plots.BLACK),
    "published": ("P", plots.BLACK),
    "yoto": ("o", plots.BLUE),
    "paper": ("o", plots.SKY),
    "normalized": ("<", plots.BLUE),
    "uncertainty": ("^", plots.GREEN),
    "famo": ("v", plots.GREEN),
    "dwa": (">", plots.GREEN),
    "geometric": ("d", plots.GREEN),
    "grap": ("D", plots.VERMILION),
    "aligned": ("*", plots.VERMILION),
    "conditional": ("p", plots.PURPLE),
    "conditional-narrowed": ("h", plots.PURPLE),
}
_CURVES = {
    "grid": plots.ORANGE,
    "random": plots.PURPLE,
    "tpe": plots.GREY,
    "gp": plots.BLACK,
}


def _draw_costs(panel: Axes, seen: View, ylabel: str) -> None:
    present = [m for m in _MARKS if seen.of(m)]
    for place, method in enumerate(present):
        marker, color = _MARKS[method]
        found = seen.unseen_values(method)
        # Methods of one run stand side by side.
        plots.point(panel, place - len(present), found, marker, color)
    ticks = [(i - len(present), _short_label(seen, m)) for i, m in enumerate(present)]
    longest = 0
    for method, color in _CURVES.items():
        curve = search_curve(seen, method)
        if curve is not None:
            n = np.arange(1, len(curve) + 1)
            dashes = "--" if method in ("tpe", "gp") else "-"
            panel.plot(
                n,
                curve,
                color=color,
                marker=".",
                linestyle=dashes,
                label=f"{seen.labels[method][0]}: best of n by validation",
            )
            longest = max(longest, len(curve))
    for config, dashes in ((ORACLE, ":"), (WORST, "-.")):
        if seen.of("grid", config):
            level = seen.unseen_values("grid", config).mean()
            panel.axhline(
                level,
                color=plots.ORANGE,
                linestyle=dashes,
                zorder=0,
                label=f"grid: {'best' if config == ORACLE else 'worst'} on test",
            )
    if longest:
        panel.axvline(0, color=plots.GREY, lw=0.8)
        ticks += [(n, str(n)) for n in range(1, longest + 1) if n == 1 or n % 5 == 0]
        panel.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    if ticks:  # None of the methods may be among those drawn.
        panel.set_xticks(*zip(*ticks, strict=True))
    for label in panel.get_xticklabels()[: len(present)]:
        label.set(rotation=35, ha="right", fontsize=8)
    panel.set_ylabel(ylabel)
    panel.set_title(
        "One training run each (left), searches by their number of runs (right); "
        "mean and standard deviation over seeds"
    )


def _short_label(seen: View, method: str) -> str:
    short = {"normalized": "YOTO, normalised", "primary": "primary loss alone"}
    label = seen.labels[method][0].split(" (")[0].replace(", held-out objective", "")
    return short.get(method, label)


def search_curve(seen: View, method: str) -> np.ndarray | None:
    """The metric of the validated best of n runs, for every n.

    Of the first n where a search learns from run to run, else of any n.
    """
    records = seen.searched(method)
    if not records:
        return None
    curves = []
    for seed in sorted({r["seed"] for r in records}):
        of_seed = select(records, seed=seed)
        validation = values(of_seed, metric="validation")
        tests = [values(of_seed, metric=seen.metric, domain=d) for d in seen.unseen]
        test = np.mean(tests, axis=0)
        if method in ("tpe", "gp"):
            best = [
                searches.selections(validation[:n], test[:n])[VALIDATED]
                for n in range(1, len(test) + 1)
            ]
            curves.append(test[best])
        else:
            curves.append(searches.best_of_n(validation, test))
    return np.mean(curves, axis=0)
