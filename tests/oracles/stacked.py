"""Methods that are no weights of one batch, in float64, as their authors write them."""

import numpy as np

from tests.oracles import gramian


def grad_drop(jacobian, uniform, leak):
    """Algorithm 1, lines 10 to 15."""
    purity = 0.5 * (1 + jacobian.sum(0) / np.abs(jacobian).sum(0))
    total = np.zeros(jacobian.shape[1])
    for row, own in zip(jacobian, leak, strict=True):
        mask = (purity > uniform) * (row > 0) + (purity < uniform) * (row < 0)
        total += (own + (1 - own) * mask) * row
    return total


class PseudoMomentum:
    """``PseudoMomentumOperator`` of ConFIG: one gradient at a time."""

    def __init__(self, count, size, combine=gramian.config, b1=0.9, b2=0.999):
        self.b1, self.b2, self.combine = b1, b2, combine
        self.m = np.zeros((count, size))
        self.s, self.fake_m = np.zeros(size), np.zeros(size)
        self.t, self.t_grads = 0, np.zeros(count, int)

    def step(self, index, grad):
        self.t_grads[index] += 1
        self.m[index] = self.b1 * self.m[index] + (1 - self.b1) * grad
        if 0 in self.t_grads:
            return np.zeros_like(self.s)
        self.t += 1
        m_hats = self.m / (1 - self.b1**self.t_grads)[:, None]
        final = self.combine(m_hats)
        fake_m = final * (1 - self.b1**self.t)
        fake_grad = (fake_m - self.b1 * self.fake_m) / (1 - self.b1)
        self.fake_m = fake_m
        self.s = self.b2 * self.s + (1 - self.b2) * fake_grad**2
        s_hat = self.s / (1 - self.b2**self.t)
        return final / (np.sqrt(s_hat) + 1e-8)


def project_to_simplex(y):
    """``_projection2simplex`` of MoCo and MoDo."""
    count, ordered = len(y), np.sort(y)[::-1]
    threshold, total = (y.sum() - 1) / count, 0.0
    for i in range(count - 1):
        total += ordered[i]
        found = (total - 1) / (i + 1)
        if found > ordered[i + 1]:
            threshold = found
            break
    return np.maximum(y - threshold, 0)


def moco(gradients, beta, gamma, rho):
    """The directions of the authors' ``MoCo.backward``, without normalisation."""
    y, lambd = 0.0, np.full(len(gradients[0]), 1 / len(gradients[0]))
    for g in gradients:
        y = y - beta * (y - g)
        lambd = project_to_simplex(lambd - gamma * (y @ (y.T @ lambd) + rho * lambd))
        yield lambd, lambd @ y


def modo(pairs, gamma, rho):
    """The authors' ``MoDo.backward``: its directions are sums over both batches."""
    lambd = np.full(len(pairs[0][0]), 1 / len(pairs[0][0]))
    for first, second in pairs:
        slope = first @ (second.T @ lambd) + rho * lambd
        lambd = project_to_simplex(lambd - gamma * slope)
        yield lambd, lambd @ (first + second)


def db_mtl(gradients, beta, beta_sigma):
    """LibMTL's ``DB_MTL.backward``, by its authors, from gradients of logarithms."""
    buffer = np.zeros_like(gradients[0])
    for step, g in enumerate(gradients, 1):
        buffer = g + beta / step**beta_sigma * (buffer - g)
        norms = np.linalg.norm(buffer, axis=1)
        alpha = norms.max() / (norms + 1e-8)
        yield alpha @ buffer


def adatask(gradients, rate, b1=0.9, b2=0.999, eps=1e-8):
    """What AdaTask's ``step`` adds to the shared parameters."""
    m = v = np.zeros_like(gradients[0])
    for step, g in enumerate(gradients, 1):
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        denominator = np.sqrt(v) / np.sqrt(1 - b2**step) + eps
        yield -rate / (1 - b1**step) * (m / denominator).sum(0)


def sdmgrad(matrices, lamda, preference, rate=10.0):
    """LibMTL's ``SDMGrad``, with the learning rate of its authors: weights."""
    w = np.full(len(preference), 1 / len(preference))
    for cross in matrices:
        scale = np.sqrt(np.maximum(np.diag(cross), 0)).mean()
        a = cross / (scale**2 + 1e-8)
        velocity = np.zeros_like(w)
        for _ in range(20):
            velocity = 0.5 * velocity + a @ w + lamda * (a @ preference)
            w = project_to_simplex(w - rate * velocity)
        yield (w + lamda * preference) / (1 + lamda)
