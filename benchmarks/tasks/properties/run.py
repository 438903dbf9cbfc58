"""Which weighting has which property, found on the samples that the tests check."""

import yoto_jax as yoto
from benchmarks.harness import common
from yoto_jax.testing import gramian_properties

METHODS = {name: m for name, m in yoto.weightings.methods().items() if m.properties}


def main(options: common.Options) -> None:
    options.refuse_data()
    methods = options.choose(tuple(METHODS))
    records = []
    for method in common.track(methods, "properties"):
        variants = {"": METHODS[method].example()}
        if exact := METHODS[method].exact:  # with a regularisation next to none
            config = " ".join(f"{name}={x:g}" for name, x in exact.items())
            variants[config.replace("e-0", "e-")] = METHODS[method].example(**exact)
        for config, weighting in variants.items():
            for name, held in gramian_properties(weighting).items():
                records.append(common.record(method, name, held, config=config))
    path = options.out / "properties.json"
    result = common.write_json(path, common.meta(options), records)
    common.show(table(result))
    common.say(f"Results: {path}")


def table(result: common.Result) -> common.Table:
    """A yes wherever no sample contradicted the property."""
    records = result["records"]
    properties = tuple(dict.fromkeys(r["metric"] for r in records))
    rows = []
    for method, config in dict.fromkeys((r["method"], r["config"]) for r in records):
        chosen = common.select(records, method=method, config=config)
        held = [common.values(chosen, metric=name) for name in properties]
        name = f"`{method}({config})`" if config else f"`{method}`"
        rows.append([name, *("yes" if h.all() else "-" for h in held)])
    return common.Table(("weighting", *properties), rows)
