"""Bounds on what weightings learn."""

LARGEST_RATIO = 1e30
"""Ratios of losses stay below this: a softmax of an infinite one would be NaN."""


LOG_LIMIT = 20.0
"""Learned log-weights stay within plus and minus this: e**20 is 5e8."""
