"""What is shown of bad batches, from the stored result alone."""

import functools

from benchmarks.harness.results import Result, select, values
from benchmarks.harness.tables import Table
from benchmarks.tasks.robustness import task
from benchmarks.tasks.robustness.methods import CLOSE, LOST, PROTECTIONS, config_of


def value(
    result: Result, method: str, protection: str, stream: str, metric: str
) -> float:
    """One number of a run, 0 if there is no record of it."""
    config = config_of(protection, stream)
    found = values(result["records"], method=method, config=config, metric=metric)
    return float(found.sum())


def noise(result: Result, method: str) -> float:
    """How far weights end apart by chance: clean runs on other batches."""
    streams = [stream for stream in task.STREAMS if stream.startswith("other")]
    return max(value(result, method, "bare", stream, "weights") for stream in streams)


def behind(result: Result, method: str) -> float:
    """How far weights move over as many steps as there are batches with a fault."""
    return value(result, method, "bare", "clean", "weights earlier")


def broke(result: Result, method: str, protection: str, stream: str) -> bool:
    """Whether anything was ever not finite: states, parameters, weights."""
    metrics = ("state broke", "training broke")
    return any(value(result, method, protection, stream, m) for m in metrics)


def methods_of(result: Result) -> tuple[str, ...]:
    return tuple(dict.fromkeys(r["method"] for r in result["records"]))


def table(result: Result) -> Table:
    """Every fault without ``skip_outliers``, and the worst of them with it."""
    columns = ["method", *task.FAULTS, "skip_outliers", "steps behind", "chance"]
    rows = []
    for method in methods_of(result):
        worst = max(task.FAULTS, key=lambda f: _protected(result, method, f))
        rows.append(
            [
                _name(method),
                *(_cell(result, method, "bare", fault) for fault in task.FAULTS),
                _cell(result, method, "skip_outliers", worst),
                _percent(behind(result, method)),
                _percent(noise(result, method)),
            ]
        )
    return Table(columns, rows, _caption(result))


def tables(result: Result) -> dict[str, Table]:
    """Every fault with ``skip_outliers``."""
    rows = [
        [
            _name(method),
            *(_cell(result, method, "skip_outliers", fault) for fault in task.FAULTS),
            _skipped(result, method),
        ]
        for method in methods_of(result)
    ]
    caption = "With skip_outliers. Skipped: batches on which no step was taken."
    columns = ["method", *task.FAULTS, "skipped"]
    return {"robustness-protected": Table(columns, rows, caption)}


def _caption(result: Result) -> str:
    meta = result["meta"]
    return (
        f"Largest relative change of a final weight (mean of the last fifth of "
        f"{meta['steps']} steps) from the clean run, if {100 * meta['probability']:g} "
        "% of the losses are multiplied by NaN, inf, 1e30, 1e10, -1 or 0, with "
        "apply_if_finite around a clipped Adam (in layer 1: as named); then the worst "
        "of the six with skip_outliers. Steps behind: change in the clean run over as "
        "many steps as there are bad batches. Chance: between clean runs on different "
        f"batches, the largest of {task.OTHERS}. Broke: a state or parameter was not "
        f"finite at some step. Losses: the true ones end over {100 * CLOSE:g} % off."
    )


def _name(method: str) -> str:
    return f"`{method}`" if method in task.WEIGHTINGS else method


def _protected(result: Result, method: str, fault: str) -> float:
    return value(result, method, "skip_outliers", fault, "weights")


def _cell(result: Result, method: str, protection: str, stream: str) -> str:
    read = functools.partial(value, result, method, protection, stream)
    notes = []
    if broke(result, method, protection, stream):
        notes.append("broke")
    if read("losses") > CLOSE:
        notes.append(f"losses {_percent(read('losses'))}")
    cell = _percent(read("weights"))
    return f"{cell} ({', '.join(notes)})" if notes else cell


def _percent(share: float) -> str:
    if share >= LOST:
        return "lost"
    if share >= 10:
        return f"{share:.0f} x" if share < 1000 else f"{share:.0e} x"
    return f"{100 * share:.0f} %" if share > 0.0995 else f"{100 * share:.1f} %"


def _skipped(result: Result, method: str) -> str:
    """Batches on which no step was taken; of all faults, the fewest and the most."""
    counts = [
        value(result, method, "skip_outliers", fault, "not stepped")
        for fault in task.FAULTS
    ]
    low, high = f"{min(counts):.0f}", f"{max(counts):.0f}"
    return low if low == high else f"{low} to {high}"


def conclusions(result: Result) -> list[str]:
    """What the numbers say, in sentences."""
    words = {"bare": "With apply_if_finite", "skip_outliers": "With skip_outliers"}
    pairs = ("NaN", "inf"), ("1e30", "1e10"), ("negative", "zero")
    sentences = [
        f"{words[protection]}, {' and '.join(faults)}: "
        f"{_verdict(result, protection, faults)}"
        for protection in PROTECTIONS
        for faults in pairs
    ]
    return [*sentences, _about_states(result), _sameness(result), _about_clean(result)]


def _verdict(result: Result, protection: str, faults: tuple[str, ...]) -> str:
    runs = [(m, fault) for m in methods_of(result) for fault in faults]
    broken = [run for run in runs if broke(result, run[0], protection, run[1])]
    off = {run: value(result, run[0], protection, run[1], "weights") for run in runs}
    far = [run for run in runs if off[run] > CLOSE]
    least = lambda method: noise(result, method) + behind(result, method)
    unexplained = [run for run in far if off[run] > least(run[0])]
    return (
        f"of {len(runs)} runs {len(broken)} held a number that is not finite at some "
        f"step, {len(far)} ended with weights more than {100 * CLOSE:g} % off"
        f"{_named(far)}, {len(unexplained)} of them farther than chance and the "
        f"missing steps explain{_named(unexplained) if unexplained != far else ''}."
    )


def _named(runs: list[tuple[str, str]]) -> str:
    names = list(dict.fromkeys(method for method, _ in runs))
    if not names:
        return ""
    shown = "; ".join(names[:8])
    return f" ({shown}{f'; and {len(names) - 8} more' if len(names) > 8 else ''})"


def _about_states(result: Result) -> str:
    """Whether the weightings themselves stay finite, whatever happens around them."""
    methods = [m for m in methods_of(result) if m in task.WEIGHTINGS]
    broken = [
        record
        for record in select(result["records"], metric="state broke")
        if record["method"] in methods
    ]
    count = len(methods) * len(PROTECTIONS) * len(task.STREAMS)
    return (
        f"Weights and states of the weightings themselves: not finite in "
        f"{len(broken)} of {count} runs."
    )


def _sameness(result: Result) -> str:
    """Whether all faults that are skipped come to the same run."""
    methods = methods_of(result)
    metrics = ("weights", "losses", "skipped", "not stepped")
    seen = lambda m, fault: [
        value(result, m, "skip_outliers", fault, metric) for metric in metrics
    ]
    same = [m for m in methods if len({(*seen(m, f),) for f in task.FAULTS}) == 1]
    return (
        f"With skip_outliers all six faults come to the same run with {len(same)} of "
        f"{len(methods)} methods."
    )


def _about_clean(result: Result) -> str:
    methods = methods_of(result)
    clean = lambda m, metric: value(result, m, "skip_outliers", "clean", metric)
    touched = [m for m in methods if clean(m, "skipped") or clean(m, "not stepped")]
    return (
        f"On clean batches skip_outliers skipped some with {len(touched)} of "
        f"{len(methods)} methods."
    )
