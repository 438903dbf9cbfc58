"""What is shown of many devices and processes, from the stored result alone."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.harness import plots
from benchmarks.harness.results import Record, describe, parse, select, values
from benchmarks.harness.tables import Table
from benchmarks.tasks.scaling import measurements as runs
from benchmarks.tasks.scaling import task


def table(result: dict[str, Any]) -> Table:
    """What each method sends beyond a plain step."""
    records = result["records"]
    ways = {"shard_map": "shard_map, pmap", "jit, Auto": "jit"}
    names = dict.fromkeys(r["method"] for r in records if r["metric"] == "collectives")
    columns = ["weighting"]
    for label in ways.values():
        columns += [f"{label}: operations", "bytes"]
    rows = []
    for name in names:
        row = [name]
        for way in ways:
            of_way = functools.partial(values, records, method=name, config=way)
            sign = "" if name == "plain" else "+"
            row += [
                f"{int(of_way(metric='collectives')[0]):{sign}d}",
                f"{int(of_way(metric='bytes')[0]):{sign},d}",
            ]
        rows.append(row)
    return Table(
        columns,
        rows,
        "Collective operations of one training step on eight devices, and the bytes of "
        "their results on each, read from the compiled program. First line: a plain "
        "step, which averages gradients; below: what is added to it. Three losses, "
        "float32; methods that look at gradients look at those of the features "
        "unless they say otherwise.",
    )


def summary(result: dict[str, Any]) -> Table:
    """The conclusions, one a row."""
    return Table(["what came of it"], [[text] for text in conclusions(result)])


def tables(result: dict[str, Any]) -> dict[str, Table]:
    """The other tables, by the mark of their place."""
    made = {
        "scaling-devices": _devices_table(result),
        "scaling-memory": _memory_table(result),
        "scaling-speed": _speed_table(result),
        "scaling-processes": _processes_table(result),
        "scaling-crashes": _crashes_table(result),
        "scaling-1024": model_table(result),
    }
    return {mark: table for mark, table in made.items() if table.rows}


def _devices_table(result: dict[str, Any]) -> Table:
    records = [r for r in result["records"] if r["domain"] is not None]
    rows = []
    for name in dict.fromkeys(r["method"] for r in records):
        of_name = functools.partial(values, records, method=name)
        row = [name]
        for way in task.WAYS:
            row.append(f"{of_name(metric='difference', config=way).max():.1e}")
        row.append("yes" if of_name(metric="identical").all() else "NO")
        rows.append(row)
    counts = ", ".join(map(str, result["meta"]["devices"]))
    return Table(
        ["", *task.WAYS, "replicas identical"],
        rows,
        "Largest difference from the run on one device after "
        f"{result['meta']['steps']} steps, of any parameter or any weight on the way "
        "(absolute, relative for "
        f"numbers above 1), on {counts} virtual devices; whether all devices held the "
        "same weights bit for bit at every step.",
    )


def _memory_table(result: dict[str, Any]) -> Table:
    records = result["records"]
    mib = lambda x: f"{x / 2**20:.2f}"
    rows = []
    configs = [r["config"] for r in records if r["metric"] == "promised bytes"]
    for config in configs:
        pick = functools.partial(values, records, config=config)
        promised = pick(metric="promised bytes")[0]
        extra = pick(metric="extra bytes")[0]
        rows.append([config, mib(promised), mib(extra), f"{extra / promised:.2f}"])
    ratio = values(records, metric="ratio of peaks")
    caption = (
        "Memory for gradients that a weighting looks at, beyond a plain gradient: "
        "what the guide says and what the compiled program has (MiB; MLP "
        "64-1024-1024-10, batch of 64, three losses)."
    )
    if len(ratio):
        caption += (
            f" A whole step of YOTO with AdamW takes {100 * (ratio[0] - 1):.3f} % more "
            "than a plain one."
        )
    return Table(["gradients of", "promised", "measured", "ratio"], rows, caption)


def _speed_table(result: dict[str, Any]) -> Table:
    records = [r for r in result["records"] if r["config"].startswith("devices=")]
    counts = list(dict.fromkeys(r["config"] for r in records))
    rows = []
    for name in dict.fromkeys(r["method"] for r in records):
        row = [name]
        for config in counts:
            pick = functools.partial(values, records, method=name, config=config)
            row.append(f"{pick(metric='milliseconds')[0]:.2f}")
            row.append(_spread(pick, "of one device"))
            row.append("" if name == "plain" else _spread(pick, "of plain"))
        rows.append(row)
    columns = [""]
    for config in counts:
        n = parse(config)["devices"]
        columns += [f"{n}: ms", "of 1 device", "of plain"]
    return Table(
        columns,
        rows,
        "Strong scaling: time of a step on the same batch of "
        f"{result['meta']['batch']} digits, on so many devices; ratios are medians "
        f"(quartiles) of {result['meta']['rounds']} interleaved rounds. The devices "
        f"are {_devices_text(result)}.",
    )


def _devices_text(result: dict[str, Any]) -> str:
    if result["meta"]["platform"] == "cpu":
        return f"virtual, on {result['meta']['cpu_count']} cores"
    return f"{result['meta']['device']}s"


def _spread(pick: Callable[..., np.ndarray], metric: str) -> str:
    middle, low, high = (
        pick(metric=metric + part)[0]
        for part in ("", ", lower quartile", ", upper quartile")
    )
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def _processes_table(result: dict[str, Any]) -> Table:
    records = [r for r in result["records"] if r["config"].startswith("processes=")]
    counts = list(dict.fromkeys(r["config"] for r in records))
    rows = []
    for name in dict.fromkeys(r["method"] for r in records):
        row = [name]
        for config in counts:
            pick = functools.partial(values, records, method=name, config=config)
            row.append(f"{pick(metric='milliseconds')[0]:.1f}")
            if config != counts[0]:
                row.append(f"{pick(metric='difference')[0]:.1e}")
        row.append(
            "yes" if values(records, method=name, metric="identical").all() else "NO"
        )
        rows.append(row)
    columns = [""]
    for config in counts:
        n = parse(config)["processes"]
        columns.append(f"{n}: ms" if n != "1" else "1 process: ms")
        if config != counts[0]:
            columns.append("difference")
    return Table(
        [*columns, "all processes identical"],
        rows,
        f"{result['meta']['process_steps']} steps with a batch of 128 on eight virtual "
        "devices, spread over so many processes that talk through Gloo: time of a step "
        "(one run, not interleaved) and largest difference from one process.",
    )


def _crashes_table(result: dict[str, Any]) -> Table:
    records = result["records"]
    of = lambda metric: values(records, method="crash", metric=metric)
    rows = []
    if len(of("steps lost")):
        trials, delay = len(of("steps lost")), of("seconds until others ended")
        rows = [
            ["runs with one of the processes killed", f"{trials}"],
            ["all others ended with an error", f"{int(of('others ended').sum())}"],
            ["that says what happened", f"{int(of('clear message').sum())}"],
            ["seconds until they did, median", f"{np.median(delay):.1f}"],
            ["seconds until they did, most", f"{delay.max():.1f}"],
            ["continued bit for bit", f"{int(of('bit for bit').sum())}"],
            ["steps between checkpoints", f"{int(of('every')[0])}"],
            ["steps lost, median", f"{np.median(of('steps lost')):.0f}"],
            ["steps lost, most", f"{of('steps lost').max():.0f}"],
        ]
    return Table(
        ["", ""],
        rows,
        "A process of a run of YOTO gets SIGKILL at a random step; the run is started "
        "again with `--resume`. Checkpoints are written behind the training: the last "
        "that was finished on all processes may be the one before the newest.",
    )


# A thousand devices, on paper.

DEVICES = 1024
BANDWIDTH = 50e9  # bytes a second in and out of each device
LATENCY = 5e-6  # seconds for one message between neighbours
PARAMETERS = 25_600_000  # a residual net of 50 layers, float32
STEP = 0.1  # seconds that computing takes


def all_reduce_seconds(size: float, devices: int = DEVICES) -> float:
    """Ring for what is long, tree for what is short: the faster of the two."""
    hops = np.log2(devices)
    ring = 2 * (devices - 1) * (size / devices / BANDWIDTH + LATENCY)
    tree = 2 * hops * (LATENCY + size / BANDWIDTH)
    return min(ring, tree)


def model_table(result: dict[str, Any]) -> Table:
    """Cost of a step on many devices, computed and not measured."""
    del result
    losses = 4
    gradient = 4 * PARAMETERS
    cases = {
        "plain": (gradient,),
        "YOTO (the logits travel with the gradient)": (gradient + 4 * losses,),
        "from losses (FAMO, ...): K numbers first": (4 * losses, gradient),
        "from gradients of features: K x K numbers": (
            4 * losses**2 + 4 * losses,
            gradient,
        ),
        "from gradients of all parameters: K gradients": (losses * gradient,),
    }
    plain = all_reduce_seconds(gradient)
    rows = []
    for name, sizes in cases.items():
        taken = sum(all_reduce_seconds(size) for size in sizes)
        share = (taken - plain) / (STEP + plain)
        rows.append([name, f"{1e3 * taken:.2f}", f"{100 * share:+.2f} %"])
    return Table(
        ["weighting", "communication (ms)", "of a plain step"],
        rows,
        f"A model, not a measurement: {DEVICES} devices, {BANDWIDTH / 1e9:.0f} GB/s "
        f"and {1e6 * LATENCY:.0f} us for a message, {PARAMETERS / 1e6:.1f} million "
        f"parameters in float32, K = {losses} losses, {1e3 * STEP:.0f} ms of computing "
        "for a step, nothing overlapped.",
    )


def conclusions(result: dict[str, Any]) -> list[str]:
    """What the numbers say."""
    records = result["records"]
    said = []
    if len(off := values(records, metric="difference")):
        same = values(records, metric="identical").all()
        said.append(
            f"Runs on several devices or processes differ from one by at most "
            f"{off.max():.1e} (limit {result['meta']['limit']:.0e}); replicas of the "
            f"weights are {'identical' if same else 'NOT identical'} bit for bit."
        )
    sent_by = {
        r["method"]: r["value"]
        for r in records
        if r["metric"] == "collectives" and r["config"] == "shard_map"
    }
    by_losses = [
        name for name, m in runs.WEIGHTINGS.items() if {*m.needs} <= {"losses"}
    ]
    if driven := [sent_by[name] for name in by_losses if name in sent_by]:
        said.append(
            f"Weightings that look at losses add at most {int(max(driven))} all-reduce "
            f"to a step; YOTO adds {int(sent_by['yoto'])}."
        )
    if len(ratio := values(records, metric="ratio of peaks")):
        said.append(
            f"A step of YOTO takes {100 * (ratio[0] - 1):.3f} % more memory than a "
            "plain one."
        )
    lost = values(records, metric="steps lost")
    if len(lost):
        bits = values(records, metric="bit for bit")
        every = int(values(records, metric="every")[0])
        said.append(
            f"Of {len(lost)} killed runs {int(bits.sum())} continued bit for bit; at "
            f"most {int(lost.max())} steps were lost, with a checkpoint every {every}."
        )
    soaked = {r["metric"]: r["value"] for r in records if r["method"] == "soak"}
    if soaked:
        steps = parse(select(records, method="soak")[0]["config"])
        said.append(
            f"After {float(steps['steps']):,.0f} steps: {int(soaked['compilations'])} "
            f"compilation, memory {soaked['growth of resident MiB']:+.1f} MiB of "
            f"{soaked['resident MiB']:.0f}, weights "
            f"{'finite' if soaked['finite'] else 'NOT finite'}."
        )
    return said


COLORS = {
    "plain": plots.BLACK,
    "yoto": plots.BLUE,
    "famo": plots.SKY,
    "gradnorm": plots.ORANGE,
    "upgrad": plots.GREEN,
    "grap": plots.VERMILION,
}


def figure(result: dict[str, Any], path: Path) -> None:
    """Time of a step over the number of devices, and what methods send."""
    drawing = Figure(figsize=(12, 6), dpi=100, layout="constrained")
    left, right = drawing.subplots(1, 2, width_ratios=(1, 1.15))
    _draw_times(left, result)
    _draw_traffic(right, result["records"])
    plots.save(drawing, path)


def _draw_times(panel: Axes, result: dict[str, Any]) -> None:
    records = result["records"]
    timed = [r for r in records if r["metric"] == "of one device"]
    counts = sorted({int(parse(r["config"])["devices"]) for r in timed})
    apart = 2.0 ** np.linspace(-0.1, 0.1, len(COLORS))  # so that bars do not overlap
    measured = {r["method"] for r in timed}  # the quick preset has fewer
    for shift, (name, color) in zip(apart, COLORS.items(), strict=True):
        if name not in measured:
            continue
        pick = lambda part, n, name=name: values(
            records,
            method=name,
            metric=f"of one device{part}",
            config=describe(devices=n),
        )[0]
        middle, low, high = (
            np.array([pick(part, n) for n in counts])
            for part in ("", ", lower quartile", ", upper quartile")
        )
        panel.errorbar(
            shift * np.array(counts),
            middle,
            (middle - low, high - middle),
            color=color,
            marker="o",
            markersize=4,
            capsize=2,
            label=name,
        )
    cores = result["meta"]["cpu_count"] or 1
    if result["meta"]["platform"] == "cpu":
        ideal, label = [1.0 for _ in counts], f"ideal: all use the same {cores} cores"
    else:
        ideal, label = [1 / n for n in counts], "ideal"
    panel.plot(counts, ideal, color=plots.GREY, linestyle=":", label=label)
    panel.set_xscale("log", base=2)
    panel.set_xticks(counts, [str(n) for n in counts])
    panel.set(
        title="Time of a step on the same batch (bars: quartiles)",
        xlabel=f"devices ({_devices_text(result)})",
        ylabel="time of a step, relative to one device",
    )
    panel.set_ylim(bottom=0)
    panel.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3, frameon=False
    )


def _draw_traffic(panel: Axes, records: list[Record]) -> None:
    sent = select(records, metric="bytes", config="shard_map")
    plain = next(r["value"] for r in sent if r["method"] == "plain")
    extra = {r["method"]: r["value"] for r in sent if r["method"] != "plain"}
    order = sorted(extra, key=lambda name: extra[name], reverse=True)
    panel.barh(order, [max(extra[name], 0.0) for name in order], color=plots.BLUE)
    panel.axvline(plain, color=plots.GREY, linestyle="--")
    panel.text(1.2 * plain, len(order) - 1, "plain\ngradient", va="top", fontsize=9)
    panel.set_xscale("symlog", linthresh=4)
    panel.set_xticks([0, 10, 1e3, 1e5], ["0", "10", "1,000", "100,000"])
    panel.set_xlim(0, 30 * plain)
    panel.set(
        title="Communication: three losses, eight devices",
        xlabel="bytes added to the all-reduces of a step",
    )
    panel.margins(y=0.01)
    panel.set_axisbelow(True)
    panel.tick_params(axis="y", labelsize=8)
