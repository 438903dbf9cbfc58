"""Which weighting has which property, found on the samples that the tests check."""

import yoto_jax as yoto
from benchmarks import _common
from tests import _properties

METHODS = (
    "equal",
    "mgda",
    "pcgrad",
    "gradvac",
    "cagrad",
    "imtl_g",
    "nash_mtl",
    "fair_grad",
    "aligned_mtl",
    "upgrad",
    "dual_proj",
    "config",
)


def main(options: _common.Options) -> None:
    options.refuse_data()
    methods = options.choose(METHODS)
    records = []
    for method in _common.track(methods, "properties"):
        weighting = getattr(yoto.weightings, method)()
        for name, holds in _properties.PROPERTIES.items():
            records.append(_common.record(method, name, holds(weighting)))
    path = options.out / "properties.json"
    result = _common.write_json(path, _common.meta(options), records)
    _common.show(table(result))
    _common.say(f"Results: {path}")


def table(result: _common.Result) -> _common.Table:
    """A yes wherever no sample contradicted the property."""
    records = result["records"]
    properties = tuple(dict.fromkeys(r["metric"] for r in records))
    rows = []
    for method in dict.fromkeys(r["method"] for r in records):
        held = [_common.values(records, method=method, metric=p) for p in properties]
        rows.append([f"`{method}`", *("yes" if h.all() else "-" for h in held)])
    return _common.Table(("weighting", *properties), rows)
