"""What is shown of PPO, from the stored result alone."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from benchmarks.harness import plots
from benchmarks.harness.results import Result, values
from benchmarks.harness.tables import Table, mean_sd
from benchmarks.tasks.ppo.methods import CONSTANTS, LOSSES, RETURN, WHOLE

REFUSES = 0.5  # of the batches skipped: the method is not for these losses


def _methods(result: Result) -> list[str]:
    """By their returns over the whole training, those that refuse last."""
    names = list(dict.fromkeys(r["method"] for r in result["records"]))
    mean = lambda name: values(result["records"], method=name, metric=WHOLE).mean()
    return sorted(names, key=lambda n: (_refuses(result, n), -mean(n)))


def _domains(result: Result) -> list[str]:
    return list(dict.fromkeys(r["domain"] for r in result["records"]))


def _returns(
    result: Result, method: str, domain: str, metric: str = RETURN
) -> np.ndarray:
    return values(result["records"], method=method, domain=domain, metric=metric)


def _skipped(result: Result, method: str) -> float:
    return values(result["records"], method=method, metric="skipped").mean()


def _refuses(result: Result, method: str) -> bool:
    return _skipped(result, method) > REFUSES


def table(result: Result) -> Table:
    domains = _domains(result)
    rows = []
    for method in _methods(result):
        row = [method if method in CONSTANTS or " " in method else f"`{method}`"]
        for domain in domains:
            row.append(mean_sd(_returns(result, method, domain)))
            row.append(f"{_returns(result, method, domain, WHOLE).mean():.0f}")
        row += [f"{_typical(_weights(result, method, name)):.2g}" for name in LOSSES]
        row.append(f"{100 * _skipped(result, method):.0f}")
        rows.append(row)
    meta = result["meta"]
    columns = ["method"]
    for domain in domains:
        columns += [domain, "all along"]
    columns += [*(f"w {name}" for name in LOSSES), "skipped, %"]
    caption = (
        f"Return of the episodes in the last tenth of {meta['updates']} updates, mean "
        f"and standard deviation over {meta['seeds']} seeds, and of all episodes; "
        "geometric means of the weights at the end; batches that a method skipped, for "
        "a loss that it cannot weigh: there the weights of its start were used."
    )
    return Table(columns, rows, caption)


def _typical(weights: np.ndarray) -> float:
    """The geometric mean, 0 if one is."""
    with np.errstate(divide="ignore"):
        return np.exp(np.mean(np.log(weights)))


def _weights(result: Result, method: str, loss: str) -> np.ndarray:
    return values(result["records"], method=method, metric=f"weight:{loss}")


def conclusions(result: Result) -> list[str]:
    names = _methods(result)
    refusing = [name for name in names if _refuses(result, name)]
    sentences = []
    if refusing:
        sentences.append(f"Refuse losses that are not positive: {', '.join(refusing)}.")
    for domain in _domains(result):
        taken = [name for name in names if name not in refusing]
        best = max(taken, key=lambda n: _returns(result, n, domain).mean())
        constants = [name for name in taken if name in CONSTANTS]
        usual = ", ".join(
            f"{name} {mean_sd(_returns(result, name, domain))}" for name in constants
        )
        sentences.append(
            f"{domain}: best is {best} with {mean_sd(_returns(result, best, domain))}"
            f"{' (' + usual + ')' if usual else ''}."
        )
    return sentences


def figure(result: Result, path: Path) -> None:
    """Returns of all methods that take the losses, a panel for each environment."""
    names = [name for name in _methods(result) if not _refuses(result, name)][::-1]
    domains = _domains(result)
    size = (4.5 * len(domains) + 1.5, 0.24 * len(names) + 1.2)
    drawing = Figure(figsize=size, dpi=100, layout="constrained")
    panels = drawing.subplots(1, len(domains), sharey=True, squeeze=False)[0]
    for panel, domain in zip(panels, domains, strict=True):
        for row, name in enumerate(names):
            found = _returns(result, name, domain)
            color = plots.BLACK if name in CONSTANTS else plots.BLUE
            panel.plot(found, [row] * len(found), ".", color=color, alpha=0.4)
            panel.plot(found.mean(), row, "|", color=color, markersize=12)
        panel.set_title(domain)
        panel.set_xlabel("return, last tenth of the training")
    panels[0].set_yticks(range(len(names)), names)
    plots.save(drawing, path)
