"""What is shown of the overhead, from the stored result alone."""

from typing import Any

import numpy as np

from benchmarks.harness.results import Record, Result, select, values
from benchmarks.harness.tables import Table
from benchmarks.tasks.overhead import peers
from benchmarks.tasks.overhead.methods import ARMS, COMPARED, MANY_PAIRS, WAYS


def tables(result: Result) -> dict[str, Table]:
    """All tables but that of the loss logits, by their marks."""
    metrics = {r["metric"] for r in result["records"]}
    found = {}
    if "extra MiB" in metrics:
        found["overhead-weightings"] = step_table(result)
    if "solver microseconds" in metrics:
        found["overhead-solvers"] = solver_table(result)
    if "many: ratio" in metrics:
        found["overhead-large"] = many_table(result, "large layers")
        found["overhead-many"] = many_table(result, "many losses")
    if "many: solve milliseconds" in metrics:
        found["overhead-solves"] = many_solver_table(result)
    if "TorchJD milliseconds" in metrics:
        found["overhead-peers"] = peer_table(result)
    return found


def table(result: Result) -> Table:
    """Step times and paired ratios by model, from the stored records."""
    records = result["records"]

    def cell(model: str, arm: str, metric: str) -> float:
        (value,) = values(records, config=model, method=arm, metric=metric)
        return float(value)

    def ratio(model: str, way: str, arm: str) -> str:
        median, first, third = (
            cell(model, arm, f"{way}: ratio{which}")
            for which in ("", ", first quartile", ", third quartile")
        )
        return f"{median:.3f} ({first:.3f} to {third:.3f})"

    columns = ["model"]
    for way in WAYS:
        columns += [f"{way}: step (us)", "same again", "learned weights"]
    rows = []
    for model in dict.fromkeys(r["config"] for r in records if "loop" in r["metric"]):
        row = [model]
        for way in WAYS:
            metric = f"{way}: microseconds"
            if not select(records, config=model, metric=metric):
                row += ["", "", ""]
                continue
            row.append(f"{cell(model, 'fixed', metric):,.0f}")
            row += [ratio(model, way, arm) for arm in COMPARED[1:]]
        rows.append(row)
    imported = values(records, metric="import ms")
    meta = result["meta"]
    return Table(
        columns,
        rows,
        f"Ratio to the step with fixed weights, median (quartiles) of {meta['rounds']} "
        f"interleaved rounds, {meta['device']} ({meta['cpu_count']} cores). "
        + "".join(
            f"`import yoto_jax` takes {milliseconds:.0f} ms after `import optax`."
            for milliseconds in imported
        ),
    )


def _cell(records: list[Record], **wanted: Any) -> float:
    found = values(records, **wanted)
    return float(found[0]) if len(found) else float("nan")


def _number(value: float, digits: int) -> str:
    return "" if np.isnan(value) else f"{value:z,.{digits}f}"  # z: no minus zero


def _spread(median: float, first: float, third: float) -> str:
    if np.isnan(median):
        return ""
    return f"{median:.3f} ({first:.3f} to {third:.3f})"


def step_table(result: Result) -> Table:
    """Time, compilation and memory of a step with each weighting."""
    records = result["records"]
    models = [
        r["config"] for r in select(records, method="fixed", metric="milliseconds")
    ]
    measured = [r for r in records if r["metric"] == "extra MiB"]
    columns = ["weighting"]
    found = {r["method"] for r in measured}
    rows = [[arm] for arm in ARMS if arm in found]
    sizes = []
    for model in models:
        get = lambda arm, metric, model=model: _cell(
            records, method=arm, metric=metric, config=model
        )
        columns += [f"{model}: step", "compile (s)", "extra memory (MiB)"]
        for row in rows:
            arm = row[0]
            quartiles = [
                get(arm, f"ratio{which}")
                for which in ("", ", first quartile", ", third quartile")
            ]
            row += [
                f"{get('fixed', 'milliseconds'):.0f} ms"
                if arm == "fixed"
                else _spread(*quartiles),
                _number(get(arm, "compile seconds"), 1),
                _number(get(arm, "extra MiB"), 1),
            ]
        sizes.append(f"{get('fixed', 'parameters MiB'):.1f} MiB ({model})")
    meta = result["meta"]
    return Table(
        columns,
        rows,
        "Ratio to the step with fixed weights measured right before or after it, "
        f"median (quartiles) of {meta['pairs']} pairs, fewer for steps that take "
        f"seconds, {meta['device']} "
        f"({meta['cpu_count']} cores), four losses. Methods that look at gradients use "
        "those of the representation unless they say otherwise. Memory beyond the "
        "plain step's, from the compiled program; "
        f"parameters: {', '.join(sizes)}.",
    )


def many_table(result: Result, kind: str) -> Table:
    """Time, memory and compilation of steps with more and more losses."""
    records = [r for r in result["records"] if r["config"].startswith(f"{kind}, ")]
    columns = ["weighting" if kind == "many losses" else "gradients"]
    rows = [[arm] for arm in dict.fromkeys(r["method"] for r in records)]
    for config in dict.fromkeys(r["config"] for r in records):
        size = config.removeprefix(f"{kind}, ")
        columns += [f"{size}: step", "extra memory (MiB)", "compile (s)"]
        for row in rows:
            get = lambda metric, row=row, config=config: _cell(
                records, method=row[0], metric=f"many: {metric}", config=config
            )
            fixed = f"{_number(get('milliseconds'), 1)} ms"
            row += [
                fixed if row[0] == "fixed" else _number(get("ratio"), 1),
                _number(get("extra MiB"), 1),
                _number(get("compile seconds"), 1),
            ]
    meta = result["meta"]
    return Table(
        columns,
        rows,
        "Ratio to the step with fixed weights beside it, median of up to "
        f"{meta.get(MANY_PAIRS, meta['pairs'])} pairs, {meta['device']} "
        f"({meta['cpu_count']} cores); memory "
        "beyond that step's, from the compiled program.",
    )


def many_solver_table(result: Result) -> Table:
    """Time and memory of the weights alone, of hundreds of losses."""
    records = select(result["records"], metric="many: solve milliseconds")
    columns = ["method"]
    rows = [[method] for method in dict.fromkeys(r["method"] for r in records)]
    for size in dict.fromkeys(r["config"] for r in records):
        columns += [f"{size} (ms)", "memory (MiB)"]
        for row in rows:
            for metric in ("milliseconds", "MiB"):
                name = f"many: solve {metric}"
                of_method = {"method": row[0], "config": size, "metric": name}
                row.append(_number(_cell(result["records"], **of_method), 1))
    return Table(
        columns, rows, "One call on a K x K Gramian in float32, median, same machine."
    )


def solver_table(result: Result) -> Table:
    """Microseconds of a call, ours and, where measured, TorchJD's."""
    records = select(result["records"], metric="solver microseconds")
    theirs = select(result["records"], metric="TorchJD solver microseconds")
    sizes = dict.fromkeys(r["config"] for r in records)
    columns = ["method"]
    for size in sizes:
        columns += [f"{size} (us)", *(["TorchJD (us)"] if theirs else [])]
    rows = []
    for method in dict.fromkeys(r["method"] for r in records):
        row = [method]
        for size in sizes:
            row.append(_number(_cell(records, method=method, config=size), 0))
            if theirs:
                row.append(_number(_cell(theirs, method=method, config=size), 0))
        rows.append(row)
    return Table(
        columns, rows, "One call on a K x K Gramian in float32, median, same machine."
    )


def peer_table(result: Result) -> Table:
    """The same transformer and losses in PyTorch with TorchJD."""
    records = result["records"]
    theirs = select(records, metric="TorchJD milliseconds")
    (model,) = dict.fromkeys(r["config"] for r in theirs)
    ours = lambda method, metric: _cell(
        records, method=method, metric=metric, config=model
    )
    plain = _cell(theirs, method="plain")
    step = _number(ours("fixed", "milliseconds"), 0)
    rows = [["plain step", step, "", _number(plain, 0), "", _number(plain, 0), ""]]
    for method in peers.METHODS:
        row = [method, _number(ours(method, "milliseconds"), 0)]
        row.append(_number(ours(method, "ratio"), 2))
        for way in peers.WAYS:
            taken = _cell(theirs, method=f"{method}, {way}")
            row += [_number(taken, 0), _number(taken / plain, 2)]
        rows.append(row)
    meta = result["meta"]
    versions = [
        f"{name} {meta[key]}"
        for key, name in (("torch", "PyTorch"), ("torchjd", "TorchJD"))
        if key in meta
    ]
    return Table(
        [
            "method",
            "ours (ms)",
            "overhead",
            "TorchJD, parameters (ms)",
            "overhead",
            "TorchJD, features (ms)",
            "overhead",
        ],
        rows,
        f"A step of the {model}, four losses, {meta['device']} ({meta['cpu_count']} "
        "cores), median. Ours: `of_representation`. TorchJD: `mtl_backward` to the "
        "shared parameters, as it is documented, or to the features alone, written by "
        "hand. "
        "Overhead: ratio to the plain step of the same framework."
        + (f" {', '.join(versions)}." if versions else ""),
    )
