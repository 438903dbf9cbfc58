"""Bounds on what weightings learn."""

LARGEST_RATIO = 1e30
"""Ratios of losses stay below this: a softmax of an infinite one would be NaN."""

SMALLEST_LOSS = 1e-12
"""Added to the denominator of such a ratio: losses of 0 leave it finite."""

LOG_LIMIT = 20.0
"""Learned log-weights stay within plus and minus this: e**20 is 5e8."""
