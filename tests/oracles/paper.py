"""Independent oracles in NumPy float64, written from the equations of the paper.

Here a problem is a vector of losses and a vector of logits, the primary loss's among
them; ``learned`` is the mask of the logits that are learned.
"""

import numpy as np


def softmax(mu):
    e = np.exp(mu - np.max(mu))
    return e / e.sum()


def composite_loss(losses, mu):  # Eq. 5
    return np.exp(mu) @ losses / np.exp(mu).sum()


def composite_gradient(losses, mu):  # Eq. 6, as printed
    e = np.exp(mu)
    numerator = np.array(
        [e[i] * np.sum((losses[i] - losses) * e) for i in range(len(mu))]
    )
    return numerator / e.sum() ** 2


def regularizer(mu, learned, entropy="all"):  # Eq. 7 without rho
    p = softmax(mu if entropy == "all" else mu[learned])
    return p @ np.log(p) + np.log1p(np.exp(mu[learned])).sum()


def regularizer_gradient(mu, learned, entropy="all"):  # Eq. 8, as printed
    spanned = np.ones_like(learned) if entropy == "all" else learned
    e = np.where(spanned, np.exp(mu), 0.0)
    numerator = np.array([e[i] * np.sum(e * (mu[i] - mu)) for i in range(len(mu))])
    gradient = numerator / e.sum() ** 2 + np.exp(mu) / (1 + np.exp(mu))
    return np.where(learned, gradient, 0.0)


def numerical_gradient(f, x, step=1e-6):
    basis = np.eye(len(x)) * step
    return np.array([(f(x + d) - f(x - d)) / (2 * step) for d in basis])


def minimise_regularizer(auxiliary):
    """Minimum for one primary and ``auxiliary`` equal losses: a root on a line."""
    learned = np.arange(auxiliary + 1) > 0
    low, high = -10.0, 0.0
    for _ in range(200):
        middle = (low + high) / 2
        mu = np.where(learned, middle, 0.0)
        if regularizer_gradient(mu, learned)[1] > 0:
            high = middle
        else:
            low = middle
    return (low + high) / 2


class Quadratics:
    """K + 1 losses l_i(w) = c_i |w - a_i|^2 + d_i, with their gradients."""

    def __init__(self, count, dim, seed):
        rng = np.random.default_rng(seed)
        self.centres = rng.normal(size=(count, dim))
        self.scales = rng.uniform(0.2, 1.5, count)
        self.floors = rng.uniform(0.0, 0.5, count)

    def losses(self, w):
        distances = ((w - self.centres) ** 2).sum(-1)
        return self.scales * distances + self.floors

    def gradients(self, w):
        return 2 * self.scales[:, None] * (w - self.centres)


def algorithm_1(
    problem, start, steps, *, lr, beta1, weight_decay, rho, schedule, entropy="all"
):
    """Algorithm 1 of the paper, line by line; mu[0] belongs to the primary loss."""
    w, mu = start
    learned = np.arange(len(mu)) > 0
    m, n = np.zeros_like(w), np.zeros_like(mu)
    trajectory = []
    for t in range(steps):
        eta = schedule(t)
        losses = problem.losses(w)
        g = softmax(mu) @ problem.gradients(w)
        h = np.where(learned, composite_gradient(losses, mu), 0.0)
        m = beta1 * m + eta * lr * g
        n = beta1 * n + eta * lr * h
        decay = rho * regularizer_gradient(mu, learned, entropy)
        w, mu = (
            w - m - eta * lr * weight_decay * w,
            mu - n - eta * lr * decay,
        )
        trajectory.append((w, mu))
    return trajectory


def algorithm_1_adamw(
    problem, start, steps, *, lr, b1, b2, eps, weight_decay, rho, schedule
):
    """Its AdamW form: the regulariser beside Adam's normalised gradient."""
    w, mu = start
    learned = np.arange(len(mu)) > 0
    first = [np.zeros_like(w), np.zeros_like(mu)]
    second = [np.zeros_like(w), np.zeros_like(mu)]
    trajectory = []
    for t in range(1, steps + 1):
        losses = problem.losses(w)
        gradients = [
            softmax(mu) @ problem.gradients(w),
            np.where(learned, composite_gradient(losses, mu), 0.0),
        ]
        steps_taken = []
        for k, gradient in enumerate(gradients):
            first[k] = b1 * first[k] + (1 - b1) * gradient
            second[k] = b2 * second[k] + (1 - b2) * gradient**2
            corrected = first[k] / (1 - b1**t), second[k] / (1 - b2**t)
            steps_taken.append(corrected[0] / (np.sqrt(corrected[1]) + eps))
        decay = rho * regularizer_gradient(mu, learned)
        rate = schedule(t - 1) * lr
        w = w - rate * (steps_taken[0] + weight_decay * w)
        mu = mu - rate * (steps_taken[1] + decay)
        trajectory.append((w, mu))
    return trajectory
