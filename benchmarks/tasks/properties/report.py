"""What is shown of the properties, from the stored result alone."""

from benchmarks.harness.results import Result, select, values
from benchmarks.harness.tables import Table


def table(result: Result) -> Table:
    """A yes wherever no sample contradicted the property."""
    records = result["records"]
    properties = tuple(dict.fromkeys(r["metric"] for r in records))
    rows = []
    for method, config in dict.fromkeys((r["method"], r["config"]) for r in records):
        chosen = select(records, method=method, config=config)
        held = [values(chosen, metric=name) for name in properties]
        name = f"`{method}({config})`" if config else f"`{method}`"
        rows.append([name, *("yes" if h.all() else "-" for h in held)])
    return Table(("weighting", *properties), rows)
