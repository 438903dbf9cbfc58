"""What is compared on every problem: constants, a search, weightings, candidates."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import yoto_jax as yoto
from benchmarks.harness import conditional
from benchmarks.harness.contest import NONE, STEERED_EVERY
from benchmarks.harness.rules import Combined, Momenta, Weighted
from benchmarks.harness.training import DOWNSTREAM, PyTree, Rule, Task
from benchmarks.harness.variations import Softmax
from benchmarks.tasks.frontier.candidates import capped, in_units
from benchmarks.tasks.frontier.physics import KERNEL
from benchmarks.tasks.frontier.problem import Problem
from yoto_jax.weightings._grad_norm_balance import WARMUP

BUDGET = 15
"""Runs of the search that all others are compared with."""

SEARCH = "search"
CONSTANTS = ("primary alone", "equal")
PUBLISHED = "published"
LEFT_OUT = {
    "static": "constant weights are rows of their own",
    "equal": "a constant row",
    "ntk": "is a row of equations, every 100 steps",
    "causal": "is for losses that are stretches of time",
    "encodec_balancer": "is grad_norm_balance with a step that no unit changes",
    "inverse_dirichlet": "is grad_norm_balance but for a factor that all weights share",
}
"""Methods of the registry that are no rows, and why."""

SELDOM = (
    ("grad_norm_balance", 10),
    ("grad_norm_balance", 100),
    ("nash_mtl", 10),
    ("aligned_mtl", 10),
    ("aligned_mtl", 3),
)
"""Methods that are also tried with weights that are held for so many steps."""
RARELY = 100
"""Steps between two looks at the tangent kernel."""
OF_FEATURES = ("grad_norm_balance", "nash_mtl", "aligned_mtl")
"""Methods that are also tried looking at the gradients of features alone."""


def _adatask(losses: PyTree) -> optax.GradientTransformationExtraArgs:
    adam = yoto.per_loss(optax.scale_by_adam(), losses)
    return optax.chain(adam, yoto.aggregate(weightings.static(1.0), losses))


COMBINED = {
    "grad_drop": Combined(yoto.grad_drop),
    "adatask": Combined(_adatask, scales=True),
    "modo": Combined(
        lambda losses: yoto.aggregate(weightings.modo(), losses), two_batches=True
    ),
    "sdmgrad": Combined(
        lambda losses: yoto.aggregate(weightings.sdmgrad(), losses), two_batches=True
    ),
}
"""Links that combine the gradients of all losses, of one batch or of two."""

SHARES = ("share 0.1", "share 1", "share 10")
"""Arms of the library's portfolio: auxiliary gradients so long, in primary ones."""

weightings = yoto.weightings
Make = Callable[[Task], yoto.LossWeighting]


class Entry(NamedTuple):
    """A way to come to weights, with the passes that a step takes.

    Attributes:
      rule: How losses become a gradient.
      kind: ``"constant"``, ``"library"`` or ``"candidate"``.
      runs: Gradient evaluations of a step, in those of a step with constant weights;
        None to count the operations of the compiled steps.
    """

    rule: Rule
    kind: str
    runs: float | None


SOFTMAX = Softmax()
"""The rule of constants and of YOTO, whose lanes are one program."""


def constant(task: Task, name: str, published: Any) -> dict[str, Any]:
    """The configuration of a constant row."""
    count = len(task.auxiliary)
    ratios = {
        "primary alone": (NONE,) * count,
        "equal": (1.0,) * count,
        PUBLISHED: published,
    }
    return fixed(ratios[name])


def fixed(ratios: Any) -> dict[str, Any]:
    return {"ratios": tuple(ratios), "learn": False}


LEARNED = {
    "yoto": {"epsilon": 0.1},
    "yoto, epsilon 1": {"epsilon": 1.0},
}
"""Layer 1: logits among the parameters, by their initial relative weights."""


def learned(task: Task, name: str) -> dict[str, Any]:
    return {"ratios": (LEARNED[name]["epsilon"],) * len(task.auxiliary)}


def every_entry(problem: Problem) -> dict[str, Entry]:
    """All rows that are one run each: weightings, and models that know all weights."""
    chosen = conditional.rules(problem.bounds, where=problem.modulated)
    found = {name: Entry(rule, "library", None) for name, rule in chosen.items()}
    return entries(problem.task) | found


def entries(task: Task) -> dict[str, Entry]:
    """All rows that are one weighting each, by name."""
    found = {}
    for name, method in weightings.methods().items():
        if name in (*LEFT_OUT, *COMBINED, "yoto"):  # YOTO is layer 1 here.
            continue
        found[name] = _entry(task, method)
    # One loss a step: its backward pass costs what that of their sum does, at most.
    found["m_config"] = Entry(Momenta(weightings.config), "library", 1.0)
    found |= {name: Entry(rule, "library", None) for name, rule in COMBINED.items()}
    made = candidates(task)
    found |= {
        name: Entry(Weighted(make), "candidate", cost(task, make(task)))
        for name, make in made.items()
    }
    found |= {name: _frozen(task, make) for name, make in frozen(task).items()}
    found |= {
        f"{name}, every {period}": _seldom(task, name, period)
        for name, period in SELDOM
    }
    if KERNEL in task.statistics:
        found[f"ntk, every {RARELY}"] = _of_kernel()
    if has_features(task):
        found |= {f"{name}, of features": _of_features(name) for name in OF_FEATURES}
    return found


def has_features(task: Task) -> bool:
    """Whether the losses of a task share features."""
    key = jax.random.key(0)
    data = task.of_seed(task.data, jnp.zeros((), jnp.int32))
    encoded = jax.eval_shape(
        lambda key: task.encode(task.init(key), task.draw(data, key)), key
    )
    return bool(jax.tree.leaves(encoded))


def _of_features(name: str) -> Entry:
    """A method that looks at the gradients of the features: one pass through them."""
    method = weightings.methods()[name]
    rule = Weighted(lambda task: method.example(task.primary), of_features=True)
    return Entry(rule, "candidate", None)


def _frozen(task: Task, make: Make) -> Entry:
    """Norms that are looked at in the first steps alone."""
    extra = cost(task, make(task)) - 1
    return Entry(Weighted(make), "candidate", 1 + extra * _warmup(task) / task.steps)


def _warmup(task: Task) -> int:
    return max(1, int(WARMUP * task.steps))


def _seldom(task: Task, name: str, period: int) -> Entry:
    """A method that looks at the gradients every so many steps alone."""
    method = weightings.methods()[name]
    make = lambda task: weightings.every(method.example(task.primary), period)
    extra = cost(task, make(task)) - 1
    return Entry(Weighted(make), "candidate", 1 + extra / period)


def _of_kernel() -> Entry:
    """Weights by the tangent kernel, every so many steps.

    Its diagonal takes the gradient of every residual at every point once, which is one
    run of that step.
    """
    rule = Weighted(lambda task: weightings.every(weightings.ntk(), RARELY))
    return Entry(rule, "candidate", 1 + 1 / RARELY)


def _entry(task: Task, method: yoto.weightings.Method) -> Entry:
    if method.requires == "downstream":

        def steered(task: Task) -> yoto.LossWeighting:
            return weightings.every(method.example(DOWNSTREAM), STEERED_EVERY)

        rule = Weighted(steered, steered=True)
        # Every so many steps a pass over held-out data, and all gradients of it.
        passes = 1 + 2 * (len(task.names) + 1)
        return Entry(rule, "library", 1 + passes / 3 / STEERED_EVERY)
    make = lambda task: method.example(task.primary)
    return Entry(Weighted(make), "library", cost(task, make(task)))


def cost(task: Task, weighting: yoto.LossWeighting) -> float:
    """Gradient evaluations of a step, a backward pass counted as two forward ones."""
    looks = set(weighting.needs) - {"losses"}
    return (1 + 2 * len(task.names)) / 3 if looks else 1.0


def candidates(task: Task) -> dict[str, Make]:
    """What is tried beyond the library's defaults."""
    primary = task.primary
    balance = weightings.grad_norm_balance
    return {
        "anchored .1": lambda task: balance(primary, share=0.1),
        "anchored 1": lambda task: balance(primary, share=1.0),
        "nash_mtl, capped": lambda task: capped(weightings.nash_mtl(), primary),
    }


def frozen(task: Task) -> dict[str, Make]:
    """Weights by the gradient norms of the first steps, and YOTO in units of them."""
    primary, warmup = task.primary, _warmup(task)
    arms = yoto.racing.portfolio(primary, task.steps)

    def arm(name: str) -> Make:
        return lambda task: arms[name]

    return {name: arm(name) for name in SHARES} | {
        "yoto in units, frozen": lambda task: in_units(
            weightings.yoto(primary, epsilon=1.0), primary, warmup=warmup
        )
    }
