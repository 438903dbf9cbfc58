"""What is compared of the conditional VAE: losses, methods and their settings."""

import numpy as np

Losses = dict[str, np.ndarray]  # arrays [seeds, betas] by loss
METHODS = ("fixed", "conditional", "sum", "geometric", "long", "cost")
TRAINED = METHODS[:-1]
NAMES = {
    "fixed": "fixed",
    "conditional": "conditional",
    "sum": "normalised to sum 1",
    "geometric": "normalised to product 1",
    "long": "not normalised, as many steps as all fixed",
}
MIDDLE = 1
LOSSES = ("reconstruction", "kl")
NOISE = 0.01  # nats within which losses count as equal
FORWARD_IMAGES = 1024
ARMS = (
    "fixed",
    "fixed again",
    "one beta",
    "beta per group",
    "beta per group, no biases",
    "beta per image",
)
LIMITS = {"forward": 1.10, "step": 1.15}


ARMS_OF_COST = tuple(f"cost: {arm}" for arm in ARMS)
