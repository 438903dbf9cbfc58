"""What is timed in the benchmark of the overhead."""

import yoto_jax as yoto
from benchmarks.models.small import NAMES
from yoto_jax import weightings

COMPARED = ("fixed", "fixed again", "yoto")
WAYS = ("loop", "scan")
MANY_PAIRS = "pairs of many losses"
"""In meta data, if hundreds of losses were measured in an earlier run."""
FIXED = dict(zip(NAMES, (0.4, 0.2, 0.3, 0.1), strict=True))


LEFT_OUT = {
    "equal": "what fixed weights are",
    "static": "what fixed weights are",
    "random": "as uncertainty",
    "scale_invariant": "as uncertainty",
    "geometric": "as uncertainty",
    "imtl_l": "as uncertainty",
    "dwa": "as uncertainty",
    "softadapt": "as uncertainty",
    "relobralo": "as uncertainty",
    "cov": "as uncertainty",
    "stch": "as uncertainty",
    "grad_norm_balance": "as gradnorm",
    "db_mtl": "as gradnorm",
    "lr_annealing": "as gradnorm",
    "causal": "for losses in the order of time",
    "ntk": "its kernel is the user's",
    "modo": "its second batch is the user's",
    "sdmgrad": "its second batch is the user's",
    "ntk_surrogate": "as gradnorm",
    "encodec_balancer": "as gradnorm",
    "metabalance": "as gradnorm",
    "inverse_dirichlet": "as gradnorm",
    "pcd": "as dual_proj",
    "grap_closed_form": "as grap",
    "softmax_alignment": "as grap",
    "auto_lambda": "as grap",
}
MEASURED = {
    name: method
    for name, method in weightings.methods().items()
    if name not in LEFT_OUT
}
LOSS_DRIVEN = tuple(n for n, m in MEASURED.items() if set(m.needs) <= {"losses"})
GRADIENT_DRIVEN = tuple(n for n in MEASURED if n not in LOSS_DRIVEN)


FULL = {
    "upgrad, all parameters": yoto.of_parameters(),
    "upgrad, all parameters, one at a time": yoto.of_parameters(chunk_size=1),
    "upgrad, all parameters, none kept": yoto.of_parameters(keep=False),
    "gradnorm, all parameters, none kept": yoto.of_parameters(keep=False),
}
ARMS = ("fixed", "fixed again", *LOSS_DRIVEN, *GRADIENT_DRIVEN, *FULL)
"""What is timed, in the order of the table."""
