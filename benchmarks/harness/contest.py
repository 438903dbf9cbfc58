"""What the paper's tasks are compared by: methods, their rules, what is particular."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import yoto_jax as yoto
from benchmarks.harness import conditional, searches
from benchmarks.harness.options import Options, UsageError
from benchmarks.harness.rules import Weighted
from benchmarks.harness.searches import Ratios, Search
from benchmarks.harness.terminal import say
from benchmarks.harness.training import DOWNSTREAM, Rule, Task
from benchmarks.harness.variations import Softmax

BUDGETS = (5, 10, 15)
SWEEP = 15  # runs side by side, to measure what that gains
NONE = 1e-30  # the weight of a loss that is left out; its logarithm is finite
STEERED_EVERY = 10  # steps between two looks at held-out data

weightings = yoto.weightings


def _steered(weighting: yoto.LossWeighting) -> yoto.LossWeighting:
    return weightings.every(weighting, STEERED_EVERY)


def _grap(task: Task) -> yoto.LossWeighting:
    del task
    return _steered(conditional.held_out_grap())


def _aligned(task: Task) -> yoto.LossWeighting:
    # As many logits' worth of movement in a run of any length.
    rate = 10 * STEERED_EVERY / task.steps
    optimizer = yoto.adamw(rate, hyperparameter_decay=0.1)
    return _steered(weightings.softmax_alignment(DOWNSTREAM, optimizer=optimizer))


SOFTMAX, PLAIN = "softmax", "plain"
RULES: dict[str, Rule] = {
    SOFTMAX: Softmax(),
    PLAIN: Weighted(lambda task: weightings.equal()),
    "uncertainty": Weighted(lambda task: weightings.uncertainty()),
    "famo": Weighted(lambda task: weightings.famo()),
    "dwa": Weighted(lambda task: weightings.dwa(window=max(1, task.steps // 20))),
    "geometric": Weighted(lambda task: weightings.geometric()),
    "grap": Weighted(_grap, steered=True),
    "aligned": Weighted(_aligned, steered=True),
}


class Method(NamedTuple):
    """A way to come to loss weights."""

    label: str
    rule: str = SOFTMAX
    config: dict[str, Any] | None = None
    search: Callable[[int], Search] | None = None


class Contest(NamedTuple):
    """What is particular to a task.

    Attributes:
      task: The task.
      metric: Which one the figure and the sentences are about.
      better: 1 if more of it is better, else -1.
      unit: Of the metric, for axes.
      seen: The test domain like the training data.
      unseen: The test domains that are not.
      methods: All of them, in the order of the table.
      rules: Those that the methods refer to, by name.
    """

    task: Task
    metric: str
    better: int
    unit: str
    seen: str
    unseen: tuple[str, ...]
    methods: dict[str, Method]
    rules: dict[str, Rule]


def rules(bounds: Sequence[tuple[float, float]], **options: Any) -> dict[str, Rule]:
    """The rules of a task, whose conditional models know weights in this box."""
    return {**RULES, **conditional.rules(bounds, **options)}


def methods(
    auxiliary: int,
    grid: Sequence[Ratios],
    bounds: Sequence[tuple[float, float]],
    published: Ratios,
    paper: dict[str, Any],
    rhos: Sequence[float],
    budget: int | None = None,
) -> dict[str, Method]:
    """The contestants.

    Args:
      auxiliary: K, the number of auxiliary losses.
      grid: The points of the paper's grid.
      bounds: The box for random and Bayesian search.
      published: The weights of the method that the paper starts from.
      paper: The paper's settings of YOTO: rho, epsilon and the optimizer of the logits.
      rhos: Other values of rho, with the paper's settings otherwise.
      budget: At most so many runs of a search (default: as in the paper).
    """
    most = max(BUDGETS) if budget is None else budget
    constant = lambda *ratios: {"ratios": ratios, "learn": False}
    library = {"ratios": (0.1,) * auxiliary}
    names = {"sgd": "SGD"} if paper.get("sgd") else {}
    optimizer = names.get("sgd", "Adam")
    epsilon = paper["ratios"][0]
    bayesian = lambda name: lambda seed: searches.Bayesian(name, bounds, most, seed)
    return {
        "primary": Method("primary loss alone", config=constant(*(NONE,) * auxiliary)),
        "equal": Method("equal weights", config=constant(*(1.0,) * auxiliary)),
        "published": Method("published weights", config=constant(*published)),
        "yoto": Method("YOTO, library defaults", config=library),
        "paper": Method(
            f"YOTO, paper's settings (rho {paper['rho']:g}, epsilon {epsilon:.2g}, "
            f"{optimizer})",
            config=paper,
        ),
        **{
            f"rho-{rho:g}": Method(f"- rho {rho:g}", config=paper | {"rho": rho})
            for rho in rhos
        },
        "auxiliary": Method(
            "- entropy of the auxiliary losses alone",
            config=paper | {"auxiliary": True},
        ),
        "coupled": Method(
            "- decay through momentum, times alpha (logits by SGD)",
            config=paper | {"coupled": True, "sgd": True},
        ),
        "normalized": Method(
            "YOTO on losses divided by their running means",
            config=library | {"normalize": True},
        ),
        "initial": Method(
            "YOTO on losses divided by their first values",
            config=library | {"normalize": True, "decay": 1.0},
        ),
        "uncertainty": Method("uncertainty weighting", "uncertainty"),
        "famo": Method("FAMO", "famo"),
        "dwa": Method("DWA", "dwa"),
        "geometric": Method("geometric mean", "geometric"),
        "grap": Method("GraP, held-out objective", "grap"),
        "aligned": Method("softmax alignment, held-out objective", "aligned"),
        **{name: Method(label, name) for name, label in conditional.LABELS.items()},
        "grid": Method(
            "grid", search=lambda seed: searches.Points(list(grid)[:budget])
        ),
        "random": Method(
            "random", search=lambda seed: searches.random(bounds, most, seed)
        ),
        "tpe": Method("Bayesian (TPE)", search=bayesian("tpe")),
        "gp": Method("Bayesian (GP)", search=bayesian("gp")),
    }


SEARCHES = ("grid", "random", "tpe", "gp")
CONSTANT = ("primary", "equal", "published", *SEARCHES)
"""Methods that train with constant weights: the unit of cost."""
DRAWN = ("yoto", "paper", "grap", "aligned")
"""Methods whose weights over time are drawn; those and other values of rho are kept."""
QUICK = ("equal", "yoto", "paper", "aligned", "grid", "random", "tpe")
"""What the quick preset runs: every kind of method, in two compiled programs."""


def available(names: Sequence[str], asked: bool) -> tuple[str, ...]:
    """Without Gaussian processes where PyTorch is missing, unless asked for."""
    if "gp" not in names or searches.has_gp():
        return tuple(names)
    if asked:
        raise UsageError("method gp needs PyTorch: pip install 'yoto_jax[search]'")
    say("gp is left out: it needs PyTorch (pip install 'yoto_jax[search]')")
    return tuple(name for name in names if name != "gp")


def check(contest: Contest, options: Options) -> tuple[str, ...]:
    """The methods to run, before anything is made that takes a while."""
    chosen = options.choose(tuple(contest.methods), QUICK)
    return available(chosen, options.methods is not None)


CONSTANT_PREDICTION = "constant"


def timed(rule: str) -> str:
    """The rule whose step is timed for it: variations step alike."""
    return rule.split("-")[0]
