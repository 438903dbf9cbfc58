"""Choices in NumPy float64: probabilities, gradients of mixtures, the decay."""

import numpy as np


def softmax(a, temperature=1.0):
    e = np.exp((a - np.max(a)) / temperature)
    return e / e.sum()


def mixture_gradient(a, temperature, slopes):
    """Gradient of a loss in the logits, whose slope along each output is given.

    The loss is of y = sum_n w_n y_n, and ``slopes[n]`` is its gradient at y times y_n:
    dL/da_n = w_n (slopes_n - sum_m w_m slopes_m) / temperature.
    """
    w = softmax(a, temperature)
    jacobian = (np.diag(w) - np.outer(w, w)) / temperature
    return jacobian @ slopes


def regularizer(a):
    """Kullback-Leibler divergence of Softmax(a) from equal probabilities."""
    p = softmax(a)
    return sum(x * np.log(x * len(p)) for x in p if x > 0)


def regularizer_gradient(a):
    p = softmax(a)
    return p * (a - p @ a)


def numerical_gradient(f, x, step=1e-6):
    basis = np.eye(len(x)) * step
    return np.array([(f(x + d) - f(x - d)) / (2 * step) for d in basis])


def descend(a, strength, rate, steps):
    """Logits after so many steps of plain descent on the decay alone."""
    for _ in range(steps):
        a = a - rate * strength * regularizer_gradient(a)
    return a
