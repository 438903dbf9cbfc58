"""What is shown of the segmentation task, from the stored result alone."""

from pathlib import Path

from benchmarks.harness import contest as contests
from benchmarks.harness.common import Result, Table
from benchmarks.tasks.segmentation import task
from benchmarks.tasks.segmentation.methods import contest


def view(result: Result) -> contests.View:
    return contests.view(contest(None), result)


def table(result: Result) -> Table:
    meta = result["meta"]
    seen = view(result)
    return contests.table(
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
    return contests.short(table(result), view(result))


def tables(result: Result) -> dict[str, Table]:
    return {
        "segmentation-claims": contests.claims(view(result)),
        "segmentation-costs": contests.cost_table(view(result)),
    }


def figure(result: Result, path: Path) -> None:
    contests.figure(
        view(result), (task.PRIMARY, *task.AUXILIARY), path, "mIoU on unseen (%)"
    )
