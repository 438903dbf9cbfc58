"""Depth with learned and searched loss weights: one run against a sweep.

Every method trains the same network on the same scenes with the same seeds. Searches
choose on held-out scenes of the training domain; GraP and softmax alignment are steered
by the same scenes. The zero-shot domains choose nothing.
"""

import itertools
from pathlib import Path

import jax
import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from benchmarks.data.scenes import Scenes
from benchmarks.harness import common, experiment
from benchmarks.harness import contest as contests
from benchmarks.harness.common import Options, Result, Table
from benchmarks.harness.contest import Contest
from benchmarks.harness.experiment import Run
from benchmarks.tasks.depth import metrics, task

RESUMABLE = True
GRID = tuple(itertools.product((0.001, 0.01, 0.25, 1.0, 10.0), (0.01, 0.1, 1.0)))
BOUNDS = ((0.001, 10.0), (0.01, 1.0))
PUBLISHED = (0.25, 0.1)
PAPER = {"ratios": (0.1, 0.1), "rho": 20.0}
RHOS = (0.1, 1.0)
METRIC = "delta1"
ROUNDS = {"quick": 0, "cpu": 9, "gpu": 9}
BUDGET = {"quick": 2}
EXAMPLES = (task.SEEN, *task.UNSEEN)


def contest(made: experiment.Task | None, budget: int | None = None) -> Contest:
    methods = contests.methods(
        len(task.AUXILIARY), GRID, BOUNDS, PUBLISHED, PAPER, RHOS, budget
    )
    rules = contests.rules(BOUNDS)
    return Contest(
        made, METRIC, 1, "delta1 (%)", task.SEEN, task.UNSEEN, methods, rules
    )


def main(options: Options) -> None:
    options.refuse_data()
    chosen = contests.check(contest(None), options)
    size = task.SIZES[options.preset]
    size = size._replace(steps=options.steps or size.steps)
    made, tests, net = task.make(size)
    ours = contest(made, BUDGET.get(options.preset))
    records, history = contests.contend(ours, options, chosen, ROUNDS)
    constant = {
        (metric, domain): value
        for domain, data in tests.items()
        for metric, value in task.constant(made.data[0], data).items()
    }
    records += contests.constant_records(task.UNSEEN, constant)
    settings = {"seeds": options.seeds, **size._asdict()}
    path = options.out / "depth.json"
    result = common.write_json(
        path, common.meta(options, **settings), records, history=history
    )
    figure(result, path.with_suffix(".png"))
    examples(made, tests, net, options.out / "depth_examples.png")
    common.show(table(result), summary(result))
    common.show(contests.claims(view(result)))
    common.say(f"Written: {path} and figures beside it")


# What follows reads the stored result and nothing else.


def view(result: Result) -> contests.View:
    return contests.view(contest(None), result)


def table(result: Result) -> Table:
    meta = result["meta"]
    seen = view(result)
    return contests.table(
        seen,
        (task.PRIMARY, *task.AUXILIARY),
        f"delta1 in % (share of pixels whose depth is right within 25 %), mean ± "
        f"standard deviation over {meta['seeds']} seeds; {meta['steps']} steps, "
        f"{meta['device']} ({meta['cpu_count']} cores). The usual depth of each "
        "pixel, whatever the image shows, has "
        f"{seen.constant():.1f} on the unseen domains. Runs: total cost in units of "
        "one run with constant weights. Weights: of silog, camera and invariance, at "
        "the end.",
    )


def summary(result: Result) -> Table:
    return contests.short(table(result), view(result))


def tables(result: Result) -> dict[str, Table]:
    return {
        "depth-claims": contests.claims(view(result)),
        "depth-metrics": all_metrics(result),
        "depth-costs": contests.cost_table(view(result)),
    }


def all_metrics(result: Result) -> Table:
    """The seven metrics of the paper, averaged over the unseen domains."""
    seen = view(result)
    rows = []
    for (method, config), label in seen.rows().items():
        found = [
            np.mean(
                [seen.values(method, config, metric, d) for d in task.UNSEEN], axis=0
            )
            for metric in metrics.METRICS
        ]
        digits = [1, 2, 3, 1, 1, 2, 1]
        cells = [
            common.mean_sd(x, digits=n) for x, n in zip(found, digits, strict=True)
        ]
        rows.append([label, *cells])
    return Table(
        ["method", *metrics.METRICS],
        rows,
        "Means over the unseen domains. A.Rel and delta1 in %, RMS and CD in metres, "
        "FA: area under the F-score in %. Less is better but for delta1 and FA.",
    )


def figure(result: Result, path: Path) -> None:
    contests.figure(
        view(result),
        (task.PRIMARY, *task.AUXILIARY),
        path,
        "delta1 on unseen domains (%)",
    )


def examples(
    made: experiment.Task, tests: dict[str, Scenes], net: task.DepthNet, path: Path
) -> None:
    """Images, their depth, and what a model with equal weights makes of them."""
    equal = experiment.settings(ratios=(1.0,) * len(task.AUXILIARY), learn=0.0)
    run = Run(contests.SOFTMAX, 0, equal)
    model = experiment.train(made, contests.RULES[run.rule], run)
    drawing = Figure(figsize=(12, 3.5), dpi=100, layout="compressed")
    panels = drawing.subplots(3, 2 * len(EXAMPLES))
    for column, domain in enumerate(EXAMPLES):
        data = jax.tree.map(lambda x: x[:2], tests[domain])
        log_depth, _ = net.apply({"params": model}, data.images)
        for i in range(2):
            of_image = panels[:, 2 * column + i]
            truth = np.where(data.depth[i] > 0, data.depth[i], np.nan)
            of_image[0].imshow(np.clip(data.images[i], 0, 1))
            for panel, shown in (
                (of_image[1], truth),
                (of_image[2], np.exp(log_depth[i])),
            ):
                mapped = panel.imshow(shown, cmap="viridis", norm=LogNorm(1, 40))
        panels[0, 2 * column].set_title(domain, loc="left")
    for panel in panels.flat:
        panel.set_xticks([])
        panel.set_yticks([])
    for row, name in enumerate(("image", "true depth", "predicted")):
        panels[row, 0].set_ylabel(name)
    bar = drawing.colorbar(mapped, ax=panels, shrink=0.6, label="depth (m)")
    ticks = [1, 2, 5, 10, 20, 40]
    bar.set_ticks(ticks, labels=[str(t) for t in ticks])
    drawing.savefig(path)
