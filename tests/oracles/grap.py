"""GraP, step by step in NumPy float64, from vectors instead of a Gramian.

The toy problems are here too: losses with their gradients, as plain functions.
"""

import itertools
from typing import Any

import numpy as np


def best_on_ellipsoid(cosines, alignments):
    """argmax p^T w with w^T C w = 1 and no negative w: all supports are tried."""
    cosines, alignments = np.asarray(cosines), np.asarray(alignments)
    count = len(alignments)
    if np.abs(cosines).max() < 1e-12 or np.abs(alignments).max() < 1e-12:
        return np.zeros(count)
    best, reached = np.zeros(count), 0.0
    for size in range(1, count + 1):
        for support in map(list, itertools.combinations(range(count), size)):
            block = cosines[np.ix_(support, support)]
            x = np.linalg.lstsq(block, alignments[support], rcond=1e-10)[0]
            squared = x @ block @ x
            if x.min() < 0 or squared <= 0 or alignments[support] @ x <= 0:
                continue
            x = x / np.sqrt(squared)
            if alignments[support] @ x > reached + 1e-13:
                best, reached = np.zeros(count), alignments[support] @ x
                best[support] = x
    return best


class Sgd:
    def __init__(self, rate):
        self.rate = rate

    def step(self, x, gradient):
        return x - self.rate * gradient


class Adam:
    def __init__(self, rate, b1=0.0, b2=0.99, eps=1e-8):
        self.rate, self.b1, self.b2, self.eps = rate, b1, b2, eps
        self.count, self.first, self.second = 0, 0.0, 0.0

    def step(self, x, gradient):
        self.count += 1
        self.first = self.b1 * self.first + (1 - self.b1) * gradient
        self.second = self.b2 * self.second + (1 - self.b2) * gradient**2
        first = self.first / (1 - self.b1**self.count)
        second = self.second / (1 - self.b2**self.count)
        return x - self.rate * first / (np.sqrt(second) + self.eps)


class Grap:
    """One ``step`` is one batch; ``observe`` is told of the encoder after it."""

    def __init__(
        self,
        count,
        *,
        closed_form=False,
        optimizer=None,
        regularization=0.0,
        gramian_decay=0.9,
        norm_decay=0.9,
        warmup=10,
        max_skipped=5,
    ):
        self.solves, self.regularization = closed_form, regularization
        self.gramian_decay, self.norm_decay = gramian_decay, norm_decay
        self.warmup, self.max_skipped = warmup, max_skipped
        self.optimizer = Adam(0.01) if optimizer is None else optimizer
        self.phi = np.ones(count)
        self.nu: Any = None
        self.C: Any = None
        self.p: Any = None
        self.tau: Any = None
        self.batches = self.t = self.skipped = 0

    def mean(self, old, new, count):  # 2.3
        if count == 0:
            return new
        if count < self.warmup:
            return (old * count + new) / (count + 1)
        return self.gramian_decay * old + (1 - self.gramian_decay) * new

    def step(self, s, d):
        """Gradients (K, P) and downstream gradient (P,) to weights (K,)."""
        aligned = int(np.linalg.norm(d) > 0)
        direction = d / max(np.linalg.norm(d), 1e-12)  # 2.1
        n = np.linalg.norm(s, axis=1)  # 2.2
        b = self.norm_decay
        self.nu = n if self.nu is None else b * self.nu + (1 - b) * n
        g = s / np.maximum(self.nu, 1e-6)[:, None]
        C, p = g @ g.T, g @ direction  # 2.3
        r = np.maximum(np.sqrt(np.diag(C)), 1e-8)
        self.C = self.mean(self.C, C / np.outer(r, r), self.batches)
        self.batches += 1
        if aligned:
            self.p = self.mean(self.p, p / r, self.t)
        w = self.closed_form(aligned) if self.solves else self.follow(aligned)
        self.t += aligned
        size = 1.0 if self.tau is None else self.tau  # 2.8
        return size * w / np.maximum(self.nu, 1e-6)

    def composite(self, u):  # 2.4
        if np.linalg.norm(u) < 1e-16:
            return u, 1.0
        N = max(np.sqrt(u @ self.C @ u), 1e-16)
        return u / N, N

    def follow(self, aligned):
        sign = np.where(self.phi < 0, -1.0, 1.0)
        unit = 1.0 if self.tau is None else self.tau
        factor = self.nu / unit
        u = sign * self.phi * factor
        w, N = self.composite(u)
        if not aligned:
            return w
        slope = -(self.p - (self.p @ w) * (self.C @ w)) / N  # 2.5
        length = np.linalg.norm(u)
        slope = slope + self.regularization * 2 * (length - 1) * u / length
        self.slope = sign * factor * slope
        self.phi = self.optimizer.step(self.phi, self.slope)
        return w

    def closed_form(self, aligned):  # 2.6 and 2.7
        if not aligned:
            return self.phi / np.sqrt(self.phi @ self.C @ self.phi)
        w = best_on_ellipsoid(self.C, self.p)
        if np.linalg.norm(w) < 1e-8:
            self.skipped += 1
            within = self.skipped <= self.max_skipped
            return np.zeros_like(w) if within else np.ones_like(w)
        self.skipped = 0
        self.phi = w
        return w

    def observe(self, cotangent_norm, gradient_norm):  # 2.8
        if cotangent_norm == 0:
            return
        ratio = cotangent_norm / max(gradient_norm, 1e-16)
        b = self.norm_decay
        self.tau = ratio if self.tau is None else b * self.tau + (1 - b) * ratio


# Section 5: gradients of the pretraining losses, and of the downstream loss, at x.

S = np.array([[1.0, 0.5], [0.5, 1.0]])
CENTER = np.array([0.5, 1.0])
MIXTURE_S = np.array([np.diag([3.0, 1.0]), S])
MIXTURE_CENTERS = np.array([[0.0, 0.0], [0.5, 1.0]])
MIXTURE_WEIGHTS = np.array([0.3, 0.7])


def mixture_optimum():
    weighted = MIXTURE_WEIGHTS[:, None, None] * MIXTURE_S
    right = sum(s @ m for s, m in zip(weighted, MIXTURE_CENTERS, strict=True))
    return np.linalg.solve(weighted.sum(0), right)
