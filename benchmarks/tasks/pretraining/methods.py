"""What is compared in the pretraining: methods and their rows."""

from benchmarks.harness.searches import MEDIAN, ORACLE, VALIDATED, WORST
from benchmarks.tasks.pretraining import task

GRAP = "grap"
PLAIN = "plain"
CLOSED = "closed"
EQUAL = "equal"
SEARCHES = ("random", "grid")
FIXED = {EQUAL: (1.0, 1.0, 1.0), "published": task.PUBLISHED}
ALIGNED = (GRAP, PLAIN, CLOSED)

PROBE = "probe"  # the metric that the figure and the sentences are about
METRICS = {
    PROBE: "linear probe",
    "knn": "k-NN",
    "probe all": "probe, all labels",
}
ROWS = {  # (method, config or None for the only one): name in the table
    (GRAP, None): "GraP",
    (PLAIN, None): "GraP, projector not weighted",
    (CLOSED, None): "GraP, closed form",
    (EQUAL, None): "equal weights",
    ("published", None): "published weights",
    ("random", VALIDATED): "random, best by validation",
    ("grid", VALIDATED): "grid, best by validation",
    ("gradnorm", None): "GradNorm",
    ("dwa", None): "DWA",
    ("mgda", None): "MGDA",
    ("pcgrad", None): "PCGrad",
    ("random", MEDIAN): "random, median draw",
    ("random", WORST): "random, worst draw",
    ("random", ORACLE): "random, best on test (oracle)",
}
