"""What is shown of the depth task, from the stored result alone."""

from pathlib import Path

import numpy as np

from benchmarks.harness import contest_report
from benchmarks.harness.results import Result
from benchmarks.harness.tables import Table, mean_sd
from benchmarks.tasks.depth import metrics, task
from benchmarks.tasks.depth.methods import contest


def view(result: Result) -> contest_report.View:
    return contest_report.view(contest(None), result)


def table(result: Result) -> Table:
    meta = result["meta"]
    seen = view(result)
    return contest_report.table(
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
    return contest_report.short(table(result), view(result))


def tables(result: Result) -> dict[str, Table]:
    return {
        "depth-claims": contest_report.claims(view(result)),
        "depth-metrics": all_metrics(result),
        "depth-costs": contest_report.cost_table(view(result)),
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
        cells = [mean_sd(x, digits=n) for x, n in zip(found, digits, strict=True)]
        rows.append([label, *cells])
    return Table(
        ["method", *metrics.METRICS],
        rows,
        "Means over the unseen domains. A.Rel and delta1 in %, RMS and CD in metres, "
        "FA: area under the F-score in %. Less is better but for delta1 and FA.",
    )


def figure(result: Result, path: Path) -> None:
    contest_report.figure(
        view(result),
        (task.PRIMARY, *task.AUXILIARY),
        path,
        "delta1 on unseen domains (%)",
    )
