"""Weights over a whole run in NumPy float64, written from the equations.

Every oracle takes losses (T, K) and what else it needs, update by update, and gives the
weights (T, K) of all updates.
"""

import itertools

import numpy as np


class Adam:
    def __init__(self, learning_rate=0.025, b1=0.9, b2=0.999, eps=1e-8):
        self.settings = learning_rate, b1, b2, eps
        self.m, self.v, self.t = 0.0, 0.0, 0

    def __call__(self, x, gradient):
        learning_rate, b1, b2, eps = self.settings
        self.t += 1
        self.m = b1 * self.m + (1 - b1) * gradient
        self.v = b2 * self.v + (1 - b2) * gradient**2
        m, v = self.m / (1 - b1**self.t), self.v / (1 - b2**self.t)
        return x - learning_rate * m / (np.sqrt(v) + eps)


def softmax(x):
    e = np.exp(x - np.max(x))
    return e / e.sum()


def uncertainty(losses, factors=0.5, initial=0.0):
    s, step, weights = np.full(losses.shape[1], initial), Adam(), []
    for loss in losses:
        w = factors * np.exp(-s)
        weights.append(w)
        s = step(s, -w * loss + 0.5)
    return np.array(weights)


def imtl_l(losses):
    s, step, weights = np.zeros(losses.shape[1]), Adam(), []
    for loss in losses:
        weights.append(np.exp(s))
        s = step(s, np.exp(s) * loss - 1)
    return np.array(weights)


def dwa(losses, temperature=2.0, window=1):
    count, weights = losses.shape[1], []
    for t in range(len(losses)):
        epoch = t // window
        if epoch < 2:
            weights.append(np.ones(count))
            continue
        last = losses[(epoch - 1) * window : epoch * window].mean(0)
        earlier = losses[(epoch - 2) * window : (epoch - 1) * window].mean(0)
        weights.append(count * softmax(last / earlier / temperature))
    return np.array(weights)


def softadapt(losses, beta=1.0, form="ratio", loss_weighted=False):
    count = losses.shape[1]
    weights = [np.ones(count)]
    for last, now in itertools.pairwise(losses):
        w = np.exp(beta * (now / (last + 1e-12) if form == "ratio" else now - last))
        w = w * now if loss_weighted else w
        weights.append(count * w / w.sum())
    return np.array(weights)


def relobralo(losses, keeps, alpha, temperature):
    """``keeps`` are the draws of rho."""
    count = losses.shape[1]

    def b(t, earlier):
        return count * softmax(losses[t] / (temperature * losses[earlier] + 1e-12))

    weights = [np.ones(count)]
    for t in range(1, len(losses)):
        a = 0.0 if t == 1 else alpha
        rho = float(keeps[t])
        past = rho * weights[-1] + (1 - rho) * b(t, 0)
        weights.append(a * past + (1 - a) * b(t, t - 1))
    return np.array(weights)


def uw_so(losses, temperature=1.0):
    return np.array([softmax(1 / (temperature * loss)) for loss in losses])


def cov(losses, decay=None):
    """From the whole past at every update; the authors' variance does not decay."""
    count, weights = losses.shape[1], []
    for t in range(len(losses)):
        if t < 2:
            weights.append(np.full(count, 1 / count))
            continue
        ratios = [np.ones(count)]
        for s in range(1, t):
            ratios.append(losses[s] / (shares(s, decay) @ losses[:s]))
        ratios = np.array(ratios)
        if decay is None:
            variance = np.mean((ratios - ratios.mean(0)) ** 2, axis=0)
        else:
            means = [shares(s, decay) @ ratios[:s] for s in range(1, t)]
            variance = decay * np.sum((ratios[1:] - means) ** 2, axis=0) / t
        w = np.sqrt(variance + 1e-8) / (shares(t, decay) @ ratios)
        weights.append(w / w.sum())
    return np.array(weights)


def shares(count, decay):
    """Of so many values, oldest first, in a mean that starts at the first of them."""
    if decay is None:
        return np.full(count, 1 / count)
    powers = decay ** np.arange(count - 1.0, -1, -1)
    return np.append(powers[:1], (1 - decay) * powers[1:])


def slaw(losses, decay=0.99, eps=1e-5):
    """Means of squared distances over the whole past at every update."""
    count, weights = losses.shape[1], [np.ones(losses.shape[1])]
    plain = round(1 / (1 - decay))
    for t in range(2, len(losses) + 1):
        first = min(t, plain)
        c = (1 - decay) * decay ** np.arange(t - 1.0, -1, -1)
        c[:first] = decay ** (t - first) / first
        mean = c @ losses[:t]
        s = np.sqrt(c @ (losses[:t] - mean) ** 2)
        s = np.maximum(s, eps * np.abs(mean))
        weights.append(count / s / np.sum(1 / s))
    return np.array(weights)


def famo(losses, gamma=1e-3, lower_bounds=0.0):
    """The losses of the next update are those after the step."""
    xi, step, weights = np.zeros(losses.shape[1]), Adam(), []
    gaps = losses - lower_bounds + 1e-8
    for t, gap in enumerate(gaps):
        if t > 0:
            z = softmax(xi)
            jacobian = np.diag(z) - np.outer(z, z)
            delta = np.log(gaps[t - 1]) - np.log(gap)
            xi = step(xi, jacobian.T @ delta + gamma * xi)
        z = softmax(xi)
        c = 1 / np.sum(z / gap)
        weights.append(c * z / gap)
    return np.array(weights)


def stch_log(losses, smoothing, warmup):
    count, weights = losses.shape[1], []
    nadir = losses[:warmup].mean(0) if warmup else np.ones(count)
    for t, loss in enumerate(losses):
        if t < warmup:
            weights.append(1 / loss)
        else:
            weights.append(count * softmax(np.log(loss / nadir) / smoothing) / loss)
    return np.array(weights)


def gradnorm(losses, norms, alpha=1.5):
    count, weights = losses.shape[1], []
    w, step = np.ones(count), Adam(eps=1e-16)
    for loss, n in zip(losses, norms, strict=True):
        weights.append(np.abs(w))
        norm = np.abs(w) * n
        rate = (loss / losses[0]) / np.mean(loss / losses[0])
        target = norm.mean() * rate**alpha
        w = step(w, np.sign(norm - target) * n * np.sign(w))
        w = count * w / np.abs(w).sum()
    return np.array(weights)


def averages(targets, decay=0.9):
    w, weights = np.ones(targets.shape[1]), []
    for target in targets:
        w = decay * w + (1 - decay) * target
        weights.append(w)
    return np.array(weights)


def grad_norm_balance(norms, decay=0.9, eps=1e-5):
    mean = norms.mean(1, keepdims=True)
    return averages(mean / (norms + eps * mean), decay)


def norm_ratios(norms, primary, share=1.0, decay=0.9, eps=1e-5):
    """Shares over running means of the norms, which begin as plain ones."""
    mean, weights = np.zeros(norms.shape[1]), []
    for count, n in enumerate(norms):
        keep = min(count / (count + 1), decay)
        mean = keep * mean + (1 - keep) * n
        size = share * mean[primary]
        w = size / (mean + eps * size)
        w[primary] = 1.0
        weights.append(w)
    return np.array(weights)


def metabalance(norms, primary, relax=0.7, decay=0.9):
    """The authors' averages from 0, whose ratios need no correction."""
    mean, weights = np.zeros(norms.shape[1]), []
    for n in norms:
        mean = decay * mean + (1 - decay) * n
        weights.append(relax * mean[primary] / mean + (1 - relax))
    return np.array(weights)


def inverse_dirichlet(std, decay=0.5):
    return averages(std.max(1, keepdims=True) / std, decay)


def encodec_balancer(norms, parts, total_norm=1.0, decay=0.999, eps=1e-12):
    """The authors' averager, sum over sum of weights, and their scales."""
    total, fix, weights = np.zeros(norms.shape[1]), 0.0, []
    for n in norms:
        total, fix = total * decay + n, fix * decay + 1
        weights.append(parts / parts.sum() * total_norm / (eps + total / fix))
    return np.array(weights)


def vqgan(reconstruction, adversarial, factor=1.0):
    """``calculate_adaptive_weight`` of two norms."""
    return factor * np.clip(reconstruction / (adversarial + 1e-4), 0.0, 1e4)


def lr_annealing(reference, max_abs, mean_abs, decay=0.9):
    """With ``mean_abs`` for ``max_abs`` as well, the mean over the mean."""
    targets = max_abs[:, [reference]] / mean_abs
    targets[:, reference] = 1.0
    return averages(targets, decay)
