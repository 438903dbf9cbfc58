"""What is compared on digits under shift: methods and their settings."""

from benchmarks.harness import conditional
from benchmarks.harness.searches import MEDIAN, ORACLE, VALIDATED, WORST

CONDITIONAL = tuple(conditional.LABELS)
LEARNED = ("yoto", "paper")
WEIGHTED = {
    "nash_mtl": "Nash-MTL, gradients of all parameters",
    "nash_mtl_features": "Nash-MTL, gradients of the features",
    "share": "equal gradient norms in the first steps, held",
}

ROWS = {  # (method, config or None for the only one): name in the table
    ("yoto", None): "YOTO, rho={rho} (default)",
    ("paper", None): "YOTO, rho={rho} (paper)",
    ("equal", None): "equal weights",
    **{(name, None): label for name, label in WEIGHTED.items()},
    **{(name, None): label for name, label in conditional.LABELS.items()},
    ("portfolio", None): "race of equal weights and three shares",
    ("race", None): "race of the grid's nine points",
    ("grid", VALIDATED): "grid, best by validation",
    ("random", VALIDATED): "random, best by validation",
    ("grid", MEDIAN): "grid, median point",
    ("grid", WORST): "grid, worst point",
    ("grid", ORACLE): "grid, best on test (oracle)",
}
