"""Which weighting has which property, found on the samples that the tests check."""

import yoto_jax as yoto
from benchmarks.harness.options import Options
from benchmarks.harness.provenance import meta
from benchmarks.harness.results import record, write_json
from benchmarks.harness.terminal import say, show, track
from benchmarks.tasks.properties.report import table
from yoto_jax.testing import gramian_properties

METHODS = {name: m for name, m in yoto.weightings.methods().items() if m.properties}


def main(options: Options) -> None:
    options.refuse_data()
    methods = options.choose(tuple(METHODS))
    records = []
    for method in track(methods, "properties"):
        variants = {"": METHODS[method].example()}
        if exact := METHODS[method].exact:  # with a regularisation next to none
            config = " ".join(f"{name}={x:g}" for name, x in exact.items())
            variants[config.replace("e-0", "e-")] = METHODS[method].example(**exact)
        for config, weighting in variants.items():
            for name, held in gramian_properties(weighting).items():
                records.append(record(method, name, held, config=config))
    path = options.out / "properties.json"
    result = write_json(path, meta(options), records)
    show(table(result))
    say(f"Results: {path}")
