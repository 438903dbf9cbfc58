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
