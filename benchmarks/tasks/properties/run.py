"""Which weighting has which property, found on the samples that the tests check."""

import yoto_jax as yoto
from benchmarks.harness import common
from benchmarks.tasks.properties.report import table
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
