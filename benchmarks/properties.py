"""Which weighting has which property, found on the samples that the tests check."""

import yoto_jax as yoto
from benchmarks import _common
from tests import _properties

EXACT = ("upgrad", "dual_proj")  # also with a regularisation next to none
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
        make = getattr(yoto.weightings, method)
        variants = {"": make()}
        if method in EXACT:
            variants["regularization=1e-8"] = make(regularization=1e-8)
        for config, weighting in variants.items():
            for name, holds in _properties.PROPERTIES.items():
                held = holds(weighting)
                records.append(_common.record(method, name, held, config=config))
    path = options.out / "properties.json"
    result = _common.write_json(path, _common.meta(options), records)
    _common.show(table(result))
    _common.say(f"Results: {path}")


def table(result: _common.Result) -> _common.Table:
    """A yes wherever no sample contradicted the property."""
    records = result["records"]
    properties = tuple(dict.fromkeys(r["metric"] for r in records))
    rows = []
    for method, config in dict.fromkeys((r["method"], r["config"]) for r in records):
        chosen = _common.select(records, method=method, config=config)
        held = [_common.values(chosen, metric=name) for name in properties]
        name = f"`{method}({config})`" if config else f"`{method}`"
        rows.append([name, *("yes" if h.all() else "-" for h in held)])
    return _common.Table(("weighting", *properties), rows)
