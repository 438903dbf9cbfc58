"""Hypergradient descent in NumPy float64: Baydin et al., 2018, Algorithms 4 to 6.

The algorithms differ in the update u_t(alpha), which is alpha times a direction. How
the hypergradient moves alpha is a rule of its own: ``additive`` as printed, ``cosine``
as in the library.
"""

import numpy as np


def additive(beta):
    """alpha_t = alpha_{t-1} - beta h_t, as printed."""
    return lambda alpha, gradient, slope: alpha - beta * (gradient @ slope)


def cosine(rate, start, bound=np.inf):
    """The logarithm moves by the cosine, within bounds around the start."""

    def rule(alpha, gradient, slope):
        lengths = np.linalg.norm(gradient) * np.linalg.norm(slope)
        step = rate * (gradient @ slope) / lengths if lengths else 0.0
        return float(np.clip(alpha * np.exp(-step), start / bound, start * bound))

    return rule


def sgd_slope():
    """Algorithm 4: the derivative of the update by alpha."""
    return lambda gradient: -gradient


def sgdn_slope(mu=0.9):
    """Algorithm 5, with Nesterov momentum."""
    velocity = 0.0

    def slope(gradient):
        nonlocal velocity
        velocity = mu * velocity + gradient
        return -gradient - mu * velocity

    return slope


def adam_slope(b1=0.9, b2=0.999, eps=1e-8):
    """Algorithm 6."""
    first = second = 0.0
    t = 0

    def slope(gradient):
        nonlocal first, second, t
        t += 1
        first = b1 * first + (1 - b1) * gradient
        second = b2 * second + (1 - b2) * gradient**2
        return -(first / (1 - b1**t)) / (np.sqrt(second / (1 - b2**t)) + eps)

    return slope


def descend(gradient_of, theta, alpha, rule, make_slope, steps):
    """Parameters, learning rates and hypergradients of every step.

    h_t = gradient(theta_{t-1}) . d u_{t-1} / d alpha, which is 0 at the start; then
    alpha_t by the rule, and theta_t = theta_{t-1} + u_t(alpha_t).
    """
    slope_of, slope = make_slope(), np.zeros_like(theta)
    thetas, alphas, hypergradients = [theta], [alpha], []
    for _ in range(steps):
        gradient = gradient_of(theta)
        hypergradients.append(gradient @ slope)
        alpha = rule(alpha, gradient, slope)
        slope = slope_of(gradient)
        theta = theta + alpha * slope
        thetas.append(theta)
        alphas.append(alpha)
    return np.array(thetas), np.array(alphas), np.array(hypergradients)
