"""Independent oracles in NumPy float64: weights that balance, and their range."""

import numpy as np
import scipy.optimize

from tests.oracles import paper


def epsilon(sizes, primary, share=1.0):
    """Means over batches [n, K] of what is compared, as ratios to the primary's."""
    means = np.asarray(sizes, np.float64).mean(axis=0)
    return share * means[primary] / np.delete(means, primary)


def slope(mu, count, rest):
    """Eq. 8, as printed, for one of so many auxiliary losses; the others at a logit."""
    logits = np.concatenate([[0.0, mu], np.full(count - 1, rest)])
    return paper.regularizer_gradient(logits, np.arange(count + 1) > 0)[1]


def extremes(count):
    """Where the pull on one logit is strongest, below and above the minimum."""
    rest = paper.minimise_regularizer(count)
    find = lambda f, low, high: (
        scipy.optimize.minimize_scalar(
            f, bounds=(low, high), method="bounded", options={"xatol": 1e-10}
        ).x
    )
    low = find(lambda mu: slope(mu, count, rest), rest - 6.0, rest)
    high = find(lambda mu: -slope(mu, count, rest), rest, 6.0)
    return np.exp([low, rest, high])
