"""The weightings there are, and what is known of each without importing it."""

import dataclasses
import importlib
import types
from collections.abc import Callable, Mapping
from typing import Any, Literal

from yoto_jax._weighting import LossWeighting


@dataclasses.dataclass(frozen=True)
class Paper:
    """Where a method comes from."""

    author: str  # the first one
    year: int
    title: str
    url: str


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Method:
    """A line of the registry: what is known of a weighting without importing it.

    Attributes:
      name: Of the function in :mod:`yoto_jax.weightings`.
      needs: What the weights depend on: ``"losses"``, and statistics as in
        :class:`yoto_jax.LossWeighting`.
      accepts: Which losses it takes; a batch with another one is skipped.
      sum_of_weights: After an update: ``"1"``, ``"K"`` or ``"free"``.
      negative_weights: Whether a weight may be negative.
      order_matters: Whether other weights come out if the losses trade places, as where
        each loss draws at random.
      requires: The argument that has no default: ``weights``, or one that names a loss:
        ``primary``, ``reference``, ``downstream``.
      remembers: What its state holds, in words.
      papers: Where it comes from; the docstring says more.
      properties: Of its combined gradient, see
        :func:`yoto_jax.testing.gramian_properties`; of methods that need the Gramian.
      exact: Arguments with which the properties hold, if not with the defaults.
      state: Class of its state, the field ``inner``; None if there is none.
      helpers: What else its module has for its users.
      module: Where it is in ``yoto_jax/weightings/``; by default as ``name`` says.
      state_module: Where its state is, if elsewhere.

    Examples:
      >>> import yoto_jax as yoto
      >>> method = yoto.weightings.methods()["gradnorm"]
      >>> print(method.needs, method.accepts, method.sum_of_weights)
      ('losses', 'norms') positive K
    """

    name: str
    needs: tuple[str, ...]
    accepts: Literal["any", "not negative", "positive"] = "any"
    sum_of_weights: Literal["1", "K", "free"] = "free"
    negative_weights: bool = False
    order_matters: bool = False
    requires: str | None = None
    remembers: str = "nothing"
    papers: tuple[Paper, ...] = ()
    properties: tuple[str, ...] = ()
    exact: Mapping[str, Any] | None = None
    state: str | None = None
    helpers: tuple[str, ...] = ()
    module: str = ""
    state_module: str = ""

    @property
    def smallest_count(self) -> int:
        """The fewest losses that it can weigh."""
        return 2 if self.requires == "downstream" else 1

    @property
    def factory(self) -> Callable[..., LossWeighting]:
        """The function that makes the weighting, imported now."""
        return find(self.name)

    def example(self, loss: str | int = 0, **options: Any) -> LossWeighting:
        """The weighting with its defaults, and with ``options``.

        Args:
          loss: The one it is about, if it is about one.
          **options: Other arguments of the function.
        """
        if self.requires is None:
            return self.factory(**options)
        return self.factory(0.5 if self.requires == "weights" else loss, **options)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Wrapper:
    """A function that makes a weighting of a weighting."""

    name: str
    state: str
    module: str


def methods() -> Mapping[str, Method]:
    """All methods by name, in the order of the documentation.

    Returns:
      A read-only mapping. Wrappers are not in it.

    Examples:
      >>> import yoto_jax as yoto
      >>> methods = yoto.weightings.methods()
      >>> print([name for name, m in methods.items() if m.needs == ("norms",)])
      ['grad_norm_balance', 'metabalance', 'db_mtl', 'encodec_balancer']
      >>> weighting = methods["grap"].example("label")
    """
    return _BY_NAME


# Properties of the combined gradient.
_SAFE = "non-conflicting"
_SAFE_OFF = "non-conflicting off stationarity"
_LINEAR = "linear under scaling"
_STOPS = "stops at strong stationarity alone"
_PERMUTES = "permutation equivariant"
_DIRECTION = "direction independent of scale"
_POSITIVE = "non-negative weights"
_UNREGULARIZED = types.MappingProxyType({"regularization": 1e-8})

_NAVON = Paper(
    "Navon",
    2022,
    "Multi-Task Learning as a Bargaining Game",
    "https://arxiv.org/abs/2202.01017",
)
_IMTL = Paper(
    "Liu",
    2021,
    "Towards Impartial Multi-task Learning",
    "https://openreview.net/forum?id=IMPnRXEWpvr",
)
_SAKARIDIS = Paper(
    "Sakaridis",
    2025,
    "You Only Train Once",
    "https://arxiv.org/abs/2506.04349",
)
_KARPUKHIN = Paper(
    "Karpukhin",
    2026,
    "When Losses Align: Gradient-Based Composite Loss Weighting for Efficient "
    "Pretraining",
    "https://arxiv.org/abs/2605.07756",
)

METHODS = (
    Method(
        name="static",
        needs=(),
        requires="weights",
        papers=(
            Paper(
                "Xin",
                2022,
                "Do Current Multi-Task Optimization Methods in Deep Learning Even "
                "Help?",
                "https://arxiv.org/abs/2209.11379",
            ),
        ),
    ),
    Method(
        name="equal",
        needs=(),
        sum_of_weights="1",
        module="_static",
        properties=(_LINEAR, _STOPS, _PERMUTES, _POSITIVE),
        papers=(
            Paper(
                "Kurin",
                2022,
                "In Defense of the Unitary Scalarization for Deep Multi-Task Learning",
                "https://arxiv.org/abs/2201.04122",
            ),
        ),
    ),
    Method(
        name="random",
        needs=(),
        sum_of_weights="1",
        order_matters=True,
        remembers="random key",
        state="RandomState",
        papers=(
            Paper(
                "Lin",
                2022,
                "Reasonable Effectiveness of Random Weighting: A Litmus Test for "
                "Multi-Task Learning",
                "https://arxiv.org/abs/2111.10603",
            ),
        ),
    ),
    Method(
        name="scale_invariant",
        needs=("losses",),
        accepts="positive",
        papers=(_NAVON,),
    ),
    Method(
        name="geometric",
        needs=("losses",),
        accepts="positive",
        papers=(
            Paper(
                "Chennupati",
                2019,
                "MultiNet++: Multi-Stream Feature Aggregation and Geometric Loss "
                "Strategy for Multi-Task Learning",
                "https://arxiv.org/abs/1904.08492",
            ),
        ),
    ),
    Method(
        name="uncertainty",
        needs=("losses",),
        accepts="positive",
        remembers="log variances",
        state="UncertaintyState",
        papers=(
            Paper(
                "Kendall",
                2018,
                "Multi-Task Learning Using Uncertainty to Weigh Losses for Scene "
                "Geometry and Semantics",
                "https://arxiv.org/abs/1705.07115",
            ),
        ),
    ),
    Method(
        name="imtl_l",
        needs=("losses",),
        accepts="positive",
        remembers="log scales",
        state="ImtlLState",
        papers=(_IMTL,),
    ),
    Method(
        name="uw_so",
        needs=("losses",),
        accepts="positive",
        sum_of_weights="1",
        papers=(
            Paper(
                "Kirchdorfer",
                2024,
                "Analytical Uncertainty-Based Loss Weighting in Multi-Task Learning",
                "https://arxiv.org/abs/2408.07985",
            ),
        ),
    ),
    Method(
        name="dwa",
        needs=("losses",),
        accepts="positive",
        sum_of_weights="K",
        remembers="two windows",
        state="DwaState",
        papers=(
            Paper(
                "Liu",
                2019,
                "End-to-End Multi-Task Learning with Attention",
                "https://arxiv.org/abs/1803.10704",
            ),
        ),
    ),
    Method(
        name="softadapt",
        needs=("losses",),
        accepts="positive",
        sum_of_weights="K",
        remembers="last losses",
        state="SoftAdaptState",
        papers=(
            Paper(
                "Heydari",
                2019,
                "SoftAdapt: Techniques for Adaptive Loss Weighting of Neural Networks "
                "with Multi-Part Loss Functions",
                "https://arxiv.org/abs/1912.12355",
            ),
        ),
    ),
    Method(
        name="relobralo",
        needs=("losses",),
        accepts="positive",
        sum_of_weights="K",
        remembers="first and last losses, random key",
        state="RelobraloState",
        papers=(
            Paper(
                "Bischof",
                2021,
                "Multi-Objective Loss Balancing for Physics-Informed Deep Learning",
                "https://arxiv.org/abs/2110.09813",
            ),
        ),
    ),
    Method(
        name="cov",
        needs=("losses",),
        accepts="positive",
        sum_of_weights="1",
        remembers="running means and variances",
        state="CovState",
        papers=(
            Paper(
                "Groenendijk",
                2020,
                "Multi-Loss Weighting with Coefficient of Variations",
                "https://arxiv.org/abs/2009.01717",
            ),
        ),
    ),
    Method(
        name="slaw",
        needs=("losses",),
        sum_of_weights="K",
        remembers="running means and deviations",
        state="SlawState",
        papers=(
            Paper(
                "Crawshaw",
                2021,
                "SLAW: Scaled Loss Approximate Weighting for Efficient Multi-Task "
                "Learning",
                "https://arxiv.org/abs/2109.08218",
            ),
        ),
    ),
    Method(
        name="famo",
        needs=("losses",),
        accepts="not negative",
        sum_of_weights="1",
        remembers="logits",
        state="FamoState",
        papers=(
            Paper(
                "Liu",
                2023,
                "FAMO: Fast Adaptive Multitask Optimization",
                "https://arxiv.org/abs/2306.03792",
            ),
        ),
    ),
    Method(
        name="stch",
        needs=("losses",),
        remembers='scales (`form="log"`)',
        state="StchState",
        papers=(
            Paper(
                "Lin",
                2024,
                "Smooth Tchebycheff Scalarization for Multi-Objective Optimization",
                "https://arxiv.org/abs/2402.19078",
            ),
        ),
    ),
    Method(
        name="causal",
        needs=("losses",),
        accepts="not negative",
        order_matters=True,
        papers=(
            Paper(
                "Wang",
                2022,
                "Respecting causality is all you need for training physics-informed "
                "neural networks",
                "https://arxiv.org/abs/2203.07404",
            ),
        ),
    ),
    Method(
        name="yoto",
        needs=("losses",),
        requires="primary",
        sum_of_weights="1",
        remembers="logits",
        state="YotoState",
        papers=(_SAKARIDIS,),
    ),
    Method(
        name="gradnorm",
        needs=("losses", "norms"),
        accepts="positive",
        sum_of_weights="K",
        remembers="weights, first losses",
        state="GradNormState",
        papers=(
            Paper(
                "Chen",
                2018,
                "GradNorm: Gradient Normalization for Adaptive Loss Balancing in Deep "
                "Multitask Networks",
                "https://arxiv.org/abs/1711.02257",
            ),
        ),
    ),
    Method(
        name="grad_norm_balance",
        needs=("norms",),
        remembers="running mean",
        state="AverageState",
        state_module="_averages",
        helpers=("calibrated", "NormsState"),
        papers=(
            Paper(
                "Wang",
                2023,
                "An Expert's Guide to Training Physics-informed Neural Networks",
                "https://arxiv.org/abs/2308.08468",
            ),
        ),
    ),
    Method(
        name="metabalance",
        needs=("norms",),
        requires="primary",
        remembers="running mean",
        state="NormsState",
        state_module="_grad_norm_balance",
        papers=(
            Paper(
                "He",
                2022,
                "MetaBalance: Improving Multi-Task Recommendations via Adapting "
                "Gradient Magnitudes of Auxiliary Tasks",
                "https://arxiv.org/abs/2203.06801",
            ),
        ),
    ),
    Method(
        name="db_mtl",
        needs=("norms",),
        papers=(
            Paper(
                "Lin",
                2023,
                "Dual-Balancing for Multi-Task Learning",
                "https://arxiv.org/abs/2308.12029",
            ),
        ),
    ),
    Method(
        name="encodec_balancer",
        needs=("norms",),
        remembers="running mean",
        state="NormsState",
        state_module="_grad_norm_balance",
        papers=(
            Paper(
                "Défossez",
                2022,
                "High Fidelity Neural Audio Compression",
                "https://arxiv.org/abs/2210.13438",
            ),
        ),
    ),
    Method(
        name="lr_annealing",
        needs=("max_abs", "mean_abs"),
        requires="reference",
        remembers="running mean",
        state="AverageState",
        state_module="_averages",
        papers=(
            Paper(
                "Wang",
                2020,
                "Understanding and mitigating gradient pathologies in "
                "physics-informed neural networks",
                "https://arxiv.org/abs/2001.04536",
            ),
        ),
    ),
    Method(
        name="inverse_dirichlet",
        needs=("std",),
        remembers="running mean",
        state="AverageState",
        state_module="_averages",
        papers=(
            Paper(
                "Maddu",
                2021,
                "Inverse Dirichlet Weighting Enables Reliable Training of Physics "
                "Informed Neural Networks",
                "https://arxiv.org/abs/2107.00940",
            ),
        ),
    ),
    Method(
        name="ntk",
        needs=("ntk_diagonal",),
        remembers="running mean",
        state="AverageState",
        state_module="_averages",
        helpers=("ntk_diagonal",),
        papers=(
            Paper(
                "Wang",
                2020,
                "When and why PINNs fail to train: A neural tangent kernel perspective",
                "https://arxiv.org/abs/2007.14527",
            ),
        ),
    ),
    Method(
        name="ntk_surrogate",
        needs=("losses", "norms"),
        accepts="positive",
        remembers="running mean",
        module="_ntk",
        state="AverageState",
        state_module="_averages",
        papers=(
            Paper(
                "NVIDIA",
                2025,
                "PhysicsNeMo Sym",
                "https://github.com/NVIDIA/physicsnemo-sym",
            ),
        ),
    ),
    Method(
        name="mgda",
        needs=("gramian",),
        sum_of_weights="1",
        properties=(_SAFE, _SAFE_OFF, _PERMUTES, _POSITIVE),
        papers=(
            Paper(
                "Désidéri",
                2012,
                "Multiple-gradient descent algorithm (MGDA) for multiobjective "
                "optimization",
                "https://doi.org/10.1016/j.crma.2012.03.014",
            ),
            Paper(
                "Sener",
                2018,
                "Multi-Task Learning as Multi-Objective Optimization",
                "https://arxiv.org/abs/1810.04650",
            ),
        ),
    ),
    Method(
        name="pcgrad",
        needs=("gramian",),
        order_matters=True,
        remembers="random key",
        state="PCGradState",
        properties=(_LINEAR, _STOPS, _POSITIVE),
        papers=(
            Paper(
                "Yu",
                2020,
                "Gradient Surgery for Multi-Task Learning",
                "https://arxiv.org/abs/2001.06782",
            ),
        ),
    ),
    Method(
        name="gradvac",
        needs=("gramian",),
        order_matters=True,
        remembers="target cosines, random key",
        state="GradVacState",
        properties=(_LINEAR, _STOPS, _POSITIVE),
        papers=(
            Paper(
                "Wang",
                2020,
                "Gradient Vaccine: Investigating and Improving Multi-task "
                "Optimization in Massively Multilingual Models",
                "https://arxiv.org/abs/2010.05874",
            ),
        ),
    ),
    Method(
        name="cagrad",
        needs=("gramian",),
        properties=(_STOPS, _PERMUTES, _POSITIVE),
        papers=(
            Paper(
                "Liu",
                2021,
                "Conflict-Averse Gradient Descent for Multi-task Learning",
                "https://arxiv.org/abs/2110.14048",
            ),
        ),
    ),
    Method(
        name="imtl_g",
        needs=("gramian",),
        sum_of_weights="1",
        negative_weights=True,
        properties=(_STOPS, _PERMUTES),
        papers=(_IMTL,),
    ),
    Method(
        name="nash_mtl",
        needs=("gramian",),
        properties=(_SAFE_OFF, _STOPS, _PERMUTES, _DIRECTION, _POSITIVE),
        papers=(_NAVON,),
    ),
    Method(
        name="fair_grad",
        needs=("gramian",),
        properties=(_SAFE_OFF, _STOPS, _PERMUTES, _POSITIVE),
        papers=(
            Paper(
                "Ban",
                2024,
                "Fair Resource Allocation in Multi-Task Learning",
                "https://arxiv.org/abs/2402.15638",
            ),
        ),
    ),
    Method(
        name="aligned_mtl",
        needs=("gramian",),
        negative_weights=True,
        properties=(_STOPS, _PERMUTES),
        papers=(
            Paper(
                "Senushkin",
                2023,
                "Independent Component Alignment for Multi-Task Learning",
                "https://arxiv.org/abs/2305.19000",
            ),
        ),
    ),
    Method(
        name="upgrad",
        needs=("gramian",),
        properties=(_SAFE, _SAFE_OFF, _LINEAR, _STOPS, _PERMUTES, _POSITIVE),
        exact=_UNREGULARIZED,
        papers=(
            Paper(
                "Quinton",
                2024,
                "Jacobian Descent for Multi-Objective Optimization",
                "https://arxiv.org/abs/2406.16232",
            ),
        ),
    ),
    Method(
        name="dual_proj",
        needs=("gramian",),
        properties=(_SAFE, _SAFE_OFF, _STOPS, _PERMUTES, _POSITIVE),
        exact=_UNREGULARIZED,
        papers=(
            Paper(
                "Lopez-Paz",
                2017,
                "Gradient Episodic Memory for Continual Learning",
                "https://arxiv.org/abs/1706.08840",
            ),
        ),
    ),
    Method(
        name="config",
        needs=("gramian",),
        negative_weights=True,
        properties=(_SAFE_OFF, _LINEAR, _STOPS, _PERMUTES, _DIRECTION),
        papers=(
            Paper(
                "Liu",
                2024,
                "ConFIG: Towards Conflict-free Training of Physics Informed Neural "
                "Networks",
                "https://arxiv.org/abs/2408.11104",
            ),
        ),
    ),
    Method(
        name="moco",
        needs=("gramian",),
        sum_of_weights="1",
        remembers="weights",
        state="MocoState",
        properties=(_STOPS, _PERMUTES, _POSITIVE),
        papers=(
            Paper(
                "Fernando",
                2022,
                "Mitigating Gradient Bias in Multi-objective Learning: A Provably "
                "Convergent Approach",
                "https://arxiv.org/abs/2210.12624",
            ),
        ),
    ),
    Method(
        name="modo",
        needs=("cross_gramian",),
        sum_of_weights="1",
        remembers="weights",
        state="MocoState",
        module="_moco",
        papers=(
            Paper(
                "Chen",
                2023,
                "Three-Way Trade-Off in Multi-Objective Learning: Optimization, "
                "Generalization and Conflict-Avoidance",
                "https://arxiv.org/abs/2305.20057",
            ),
        ),
    ),
    Method(
        name="sdmgrad",
        needs=("cross_gramian",),
        sum_of_weights="1",
        remembers="weights",
        state="MocoState",
        state_module="_moco",
        papers=(
            Paper(
                "Xiao",
                2023,
                "Direction-oriented Multi-objective Learning: Simple and Provable "
                "Stochastic Algorithms",
                "https://arxiv.org/abs/2305.18409",
            ),
        ),
    ),
    Method(
        name="pcd",
        needs=("gramian",),
        requires="primary",
        remembers="running mean",
        state="PcdState",
        papers=(
            Paper(
                "Varam",
                2026,
                "Not All Objectives Are Born Equal: Priority-Constrained Descent for "
                "Hierarchical Multi-Objective Optimization",
                "https://arxiv.org/abs/2606.29521",
            ),
        ),
    ),
    Method(
        name="epo",
        needs=("losses", "gramian"),
        sum_of_weights="1",
        papers=(
            Paper(
                "Mahapatra",
                2020,
                "Multi-Task Learning with User Preferences: Gradient Descent with "
                "Controlled Ascent in Pareto Optimization",
                "https://proceedings.mlr.press/v119/mahapatra20a.html",
            ),
        ),
    ),
    Method(
        name="grap",
        needs=("gramian",),
        requires="downstream",
        remembers="weights, running means",
        state="GrapState",
        papers=(_KARPUKHIN,),
    ),
    Method(
        name="grap_closed_form",
        needs=("gramian",),
        requires="downstream",
        remembers="weights, running means",
        state="GrapClosedFormState",
        papers=(_KARPUKHIN,),
    ),
    Method(
        name="softmax_alignment",
        needs=("gramian",),
        requires="downstream",
        sum_of_weights="1",
        remembers="logits, running means",
        state="SoftmaxAlignmentState",
        papers=(_SAKARIDIS, _KARPUKHIN),
    ),
    Method(
        name="auto_lambda",
        needs=("alignment",),
        requires="downstream",
        negative_weights=True,
        remembers="weights",
        state="AutoLambdaState",
        papers=(
            Paper(
                "Liu",
                2022,
                "Auto-Lambda: Disentangling Dynamic Task Relationships",
                "https://arxiv.org/abs/2202.03091",
            ),
        ),
    ),
)
WRAPPERS = (
    Wrapper(name="every", state="EveryState", module="_wrappers"),
    Wrapper(name="hold", state="HoldState", module="_wrappers"),
    Wrapper(name="log", state="LogState", module="_log"),
    Wrapper(name="normalize", state="NormalizeState", module="_wrappers"),
    Wrapper(name="skip_outliers", state="SkipOutliersState", module="_skip_outliers"),
    Wrapper(name="smooth", state="SmoothState", module="_wrappers"),
)

_BY_NAME: Mapping[str, Method] = types.MappingProxyType({m.name: m for m in METHODS})


def _homes() -> dict[str, str]:
    homes = {wrapper.name: wrapper.module for wrapper in WRAPPERS}
    homes |= {wrapper.state: wrapper.module for wrapper in WRAPPERS}
    for method in METHODS:
        module = method.module or f"_{method.name}"
        homes |= dict.fromkeys((method.name, *method.helpers), module)
        if method.state is not None:
            homes[method.state] = method.state_module or module
    return homes


HOMES: Mapping[str, str] = types.MappingProxyType(_homes())
"""The module of each method, helper, wrapper and state."""


def find(name: str) -> Any:
    """A method, helper, wrapper or class of a state by name, imported now."""
    module = importlib.import_module(f"yoto_jax.weightings.{HOMES[name]}")
    return getattr(module, name)
