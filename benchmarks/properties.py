"""Which weighting has which property, found on the samples that the tests check."""

import yoto_jax as yoto
from benchmarks import _common
from yoto_jax.testing import gramian_properties

METHODS = {name: m for name, m in yoto.weightings.methods().items() if m.properties}


def main(options: _common.Options) -> None:
    options.refuse_data()
    methods = options.choose(tuple(METHODS))
    records = []
    for method in _common.track(methods, "properties"):
        variants = {"": METHODS[method].example()}
        if exact := METHODS[method].exact:  # with a regularisation next to none
            config = " ".join(f"{name}={x:g}" for name, x in exact.items())
            variants[config.replace("e-0", "e-")] = METHODS[method].example(**exact)
        for config, weighting in variants.items():
            for name, held in gramian_properties(weighting).items():
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
