"""What is compared on PPO: constants and every weighting that takes any loss."""

RETURN, WHOLE = "return", "return, all updates"
"""Metrics: of the last updates, and of all."""

LOSSES = ("policy", "value", "entropy")
PRIMARY = "policy"
CONSTANTS = {
    "published": (1.0, 0.5, 0.01),
    "value .05": (1.0, 0.05, 0.01),
    "value .005": (1.0, 0.005, 0.01),
    "without entropy": (1.0, 0.5, 0.0),
    "equal weights": (1.0, 1.0, 1.0),
}
SHARES = {
    "share .1": {"policy": 1.0, "value": 1.0, "entropy": 0.1},
    "share .01": {"policy": 1.0, "value": 1.0, "entropy": 0.01},
}
"""Gradient norms relative to the policy's, held equal to these."""
