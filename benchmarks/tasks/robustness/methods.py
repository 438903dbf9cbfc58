"""What is compared under bad batches, and what counts as close and as lost."""

from benchmarks.harness.results import describe

CLOSE = 0.05
LOST = 1e6  # stands for a deviation that is not a number, or is larger
PROTECTIONS = ("bare", "skip_outliers")


def config_of(protection: str, stream: str) -> str:
    return describe(protection=protection, stream=stream)
