"""What is switched off and turned up in the ablations."""

from typing import Any

from benchmarks.tasks.depth import task

METRIC = "delta1"
NAMES = (task.PRIMARY, *task.AUXILIARY)
EPSILON_RHO = 2.0  # the paper's, for its figure of initial weights
RATES = (0.1, 10.0, 100.0)

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "yoto": ("YOTO, library defaults (rho 10)", {}),
    "exponential": ("exp(mu), not normalised", {"exponential": True}),
    "no entropy": ("without the entropy", {"entropy": False}),
    "no softplus": ("without the softplus", {"softplus": False}),
    "no decay": ("without both (rho 0)", {"rho": 0.0}),
    "auxiliary": ("entropy of auxiliary losses alone", {"auxiliary": True}),
    "sgd": ("logits by SGD with momentum, rho 1", {"sgd": True, "rho": 1.0}),
    **{
        f"rate {rate:g}": (f"logits {rate:g} times as fast", {"rate": rate})
        for rate in RATES
    },
    "weak": ("rho 0.1", {"rho": 0.1}),
    "camera x1000": ("camera loss x1000", {"factors": (1.0, 1000.0, 1.0)}),
    "all x1000": ("all losses x1000", {"factors": (1000.0, 1000.0, 1000.0)}),
    "camera x1000, normalized": (
        "camera loss x1000, divided by means",
        {"factors": (1.0, 1000.0, 1.0), "normalize": True},
    ),
}
REPLAYED = {
    "yoto": "constant, YOTO's final weights",
    "weak": "constant, final weights of rho 0.1",
}
