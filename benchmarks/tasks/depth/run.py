"""Depth with learned and searched loss weights: one run against a sweep.

Every method trains the same network on the same scenes with the same seeds. Searches
choose on held-out scenes of the training domain; GraP and softmax alignment are steered
by the same scenes. The zero-shot domains choose nothing.
"""

from benchmarks.harness import contest as contests
from benchmarks.harness import contest_report, contest_runs
from benchmarks.harness.options import Options
from benchmarks.harness.provenance import meta
from benchmarks.harness.results import write_json
from benchmarks.harness.terminal import say, show
from benchmarks.tasks.depth import task
from benchmarks.tasks.depth.examples import examples
from benchmarks.tasks.depth.methods import contest
from benchmarks.tasks.depth.report import figure, summary, table, view

RESUMABLE = True
ROUNDS = {"quick": 0, "cpu": 9, "gpu": 9}
BUDGET = {"quick": 2}


def main(options: Options) -> None:
    options.refuse_data()
    chosen = contests.check(contest(None), options)
    size = task.SIZES[options.preset]
    size = size._replace(steps=options.steps or size.steps)
    made, tests, net = task.make(size)
    ours = contest(made, BUDGET.get(options.preset))
    records, history = contest_runs.contend(ours, options, chosen, ROUNDS)
    constant = {
        (metric, domain): value
        for domain, data in tests.items()
        for metric, value in task.constant(made.data[0], data).items()
    }
    records += contest_runs.constant_records(task.UNSEEN, constant)
    settings = {"seeds": options.seeds, **size._asdict()}
    path = options.out / "depth.json"
    result = write_json(path, meta(options, **settings), records, history=history)
    figure(result, path.with_suffix(".png"))
    examples(made, tests, net, options.out / "depth_examples.png")
    show(table(result), summary(result))
    show(contest_report.claims(view(result)))
    say(f"Written: {path} and figures beside it")
