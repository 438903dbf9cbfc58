"""Segmentation with learned and searched loss weights: one run against a sweep.

Every method trains the same network on the same images with the same seeds. Searches
choose on held-out images, clean and stylised as in training; GraP and softmax alignment
are steered by the same images. No labelled image of a target condition chooses
anything.
"""

from benchmarks.harness import contest as contests
from benchmarks.harness import contest_report, contest_runs
from benchmarks.harness.options import Options
from benchmarks.harness.provenance import meta
from benchmarks.harness.results import write_json
from benchmarks.harness.terminal import say, show
from benchmarks.tasks.segmentation import task
from benchmarks.tasks.segmentation.examples import examples
from benchmarks.tasks.segmentation.methods import METRIC, contest
from benchmarks.tasks.segmentation.report import figure, summary, table, view

RESUMABLE = True
ROUNDS = {"quick": 0, "cpu": 9, "gpu": 9}
BUDGET = {"quick": 2}


def main(options: Options) -> None:
    chosen = contests.check(contest(None), options)
    size = task.SIZES[options.preset]
    size = size._replace(steps=options.steps or size.steps)
    source = task.load(size, options.data)
    made, net = task.make(size, source)
    ours = contest(made, BUDGET.get(options.preset))
    records, history = contest_runs.contend(ours, options, chosen, ROUNDS)
    constant = {(METRIC, d): value for d, value in task.constant(source).items()}
    records += contest_runs.constant_records(task.UNSEEN, constant)
    settings = {
        "seeds": options.seeds,
        "data": source.name,
        "classes": len(source.classes),
        **size._asdict(),
        "train_images": len(source.train.images),
        "target_images": len(source.targets),
        "validation_images": len(source.validation.images),
        "test_images": len(source.tests[task.CLEAN].images),
    }
    path = options.out / f"{made.name}.json"
    result = write_json(path, meta(options, **settings), records, history=history)
    figure(result, path.with_suffix(".png"))
    examples(made, source, net, path.with_name(f"{path.stem}_examples.png"))
    show(table(result), summary(result))
    show(contest_report.claims(view(result)))
    say(f"Written: {path} and figures beside it")
