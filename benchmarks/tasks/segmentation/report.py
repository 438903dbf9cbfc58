"""What is shown of the segmentation task, from the stored result alone."""

from pathlib import Path

from benchmarks.harness import contest_report
from benchmarks.harness.results import Result
from benchmarks.harness.tables import Table
from benchmarks.tasks.segmentation import task
from benchmarks.tasks.segmentation.methods import contest


def view(result: Result) -> contest_report.View:
    return contest_report.view(contest(None), result)


def table(result: Result) -> Table:
    meta = result["meta"]
    seen = view(result)
    return contest_report.table(
        seen,
        (task.PRIMARY, *task.AUXILIARY),
        f"mIoU in %, mean ± standard deviation over {meta['seeds']} seeds; "
        f"{meta['data']}: {meta['train_images']} training, "
        f"{meta['validation_images']} held-out and {meta['test_images']} test images, "
        f"{meta['classes']} classes; {meta['steps']} steps, {meta['device']} "
        f"({meta['cpu_count']} cores). The usual class of each pixel, whatever the "
        f"image shows, has {seen.constant():.1f}. Runs: total cost in units of one run "
        "with constant weights. Weights: of ce and invariance, at the end.",
    )


def summary(result: Result) -> Table:
    return contest_report.short(table(result), view(result))


def tables(result: Result) -> dict[str, Table]:
    return {
        "segmentation-claims": contest_report.claims(view(result)),
        "segmentation-costs": contest_report.cost_table(view(result)),
    }


def figure(result: Result, path: Path) -> None:
    contest_report.figure(
        view(result), (task.PRIMARY, *task.AUXILIARY), path, "mIoU on unseen (%)"
    )
