"""Independent answers for Gramian weightings, in float64 and from J itself."""

import itertools

import numpy as np
from scipy.optimize import least_squares, linprog, minimize, nnls


def bounded_qp(matrix, linear, lower):
    """Minimise v^T A v / 2 - q^T v, v >= u, by an active set method (A regular)."""
    root = np.linalg.cholesky(matrix).T
    target = np.linalg.solve(root.T, linear - matrix @ lower)
    return lower + nnls(root, target, maxiter=100 * len(lower))[0]


def _regularized(jacobian, regularization):
    gramian = jacobian @ jacobian.T
    return gramian / np.trace(gramian) + regularization * np.eye(len(gramian))


def upgrad(jacobian, preference, regularization=1e-4):
    matrix = _regularized(jacobian, regularization)
    zero = np.zeros(len(matrix))
    return sum(bounded_qp(matrix, zero, row) for row in np.diag(preference))


def dual_proj(jacobian, preference, regularization=1e-4):
    matrix = _regularized(jacobian, regularization)
    return bounded_qp(matrix, np.zeros(len(matrix)), preference)


def mgda(jacobian):
    """The smallest convex combination: every face of the simplex is tried."""
    count, best, least = len(jacobian), None, np.inf
    for size in range(1, count + 1):
        for face in map(list, itertools.combinations(range(count), size)):
            rows = jacobian[face]
            w = np.linalg.lstsq(
                np.vstack([rows.T[:, 1:] - rows.T[:, :1]]), -rows[0], rcond=None
            )[0]
            w = np.r_[1 - w.sum(), w]
            value = ((w @ rows) ** 2).sum()
            if w.min() >= 0 and value < least:
                least, best = value, np.zeros(count)
                best[face] = w
    return best


def simplex_qp(matrix, linear):
    """Minimise w^T A w / 2 - q^T w on the simplex: every face is tried."""
    count, best, least = len(linear), None, np.inf
    for size in range(1, count + 1):
        for face in map(list, itertools.combinations(range(count), size)):
            part = matrix[np.ix_(face, face)]
            system = np.block([[part, np.ones((size, 1))], [np.ones(size), 0.0]])
            w = np.linalg.lstsq(system, np.r_[linear[face], 1], rcond=None)[0][:-1]
            value = w @ part @ w / 2 - linear[face] @ w
            if w.min() >= -1e-12 and abs(w.sum() - 1) < 1e-9 and value < least:
                least, best = value, np.zeros(count)
                best[face] = w
    return best


def epo(jacobian, losses, preference, horizon=1.0):
    rows, values = preference[:, None] * jacobian, preference * losses
    length = horizon * np.abs(values).sum() / (rows**2).sum()
    w = preference * simplex_qp(length * rows @ rows.T, values)
    return w / w.sum()


def epo_of_the_paper(jacobian, losses, preference, threshold=1e-4):
    """Its linear programmes, of the gradients as they come: balance, or descend."""
    count, gramian = len(losses), jacobian @ jacobian.T
    shares = preference * losses / (preference @ losses)
    unevenness = shares @ np.log(count * shares)
    gains = gramian @ (preference * (np.log(count * shares) - unevenness))
    if unevenness > threshold:
        value, least = gains, np.zeros(count)
        if (gains > 0).any():
            least = np.where(gains > 0, -np.inf, gains)
            least[shares == shares.max()] = 0
        rows, least = gramian[least > -np.inf], least[least > -np.inf]
    else:
        value = gramian.sum(1)
        rows = np.vstack([gramian, gains])
        least = np.r_[np.zeros(count), min(gains.max(), 0)]
    return linprog(-value, -rows, -least, np.ones((1, count)), [1.0]).x


def cagrad_objective(jacobian, w, c):
    mean, combined = jacobian.mean(0), w @ jacobian
    return combined @ mean + c * np.linalg.norm(mean) * np.linalg.norm(combined)


def cagrad_minimum(jacobian, c):
    count = len(jacobian)
    scale = (jacobian**2).sum()
    starts = [np.full(count, 1 / count), *(0.9 * np.eye(count) + 0.1 / count)]
    return min(
        minimize(
            lambda w: cagrad_objective(jacobian, w, c) / scale,
            start,
            method="SLSQP",
            bounds=[(0, 1)] * count,
            constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
            options={"ftol": 1e-15, "maxiter": 500},
        ).fun
        * scale
        for start in starts
    )


def aligned_mtl(jacobian, preference, scale=np.min):
    """The singular vectors of J, with one singular value for all."""
    u, s, vt = np.linalg.svd(jacobian, full_matrices=False)
    kept = s > 1e-6 * s[0]
    sigma = np.sqrt(scale(s[kept] ** 2))
    return preference @ (sigma * u[:, kept] @ vt[kept])  # the direction


def units(jacobian):
    return jacobian / np.linalg.norm(jacobian, axis=1, keepdims=True)


def config(jacobian, direction_weights=1.0):
    targets = np.broadcast_to(direction_weights, len(jacobian))
    x = np.linalg.pinv(units(jacobian)) @ targets
    x /= np.linalg.norm(x)
    return (jacobian @ x).sum() * x  # the direction


def imtl_g(jacobian):
    """The differences to the first projection vanish, and the weights sum to 1."""
    unit = units(jacobian)
    count = len(jacobian)
    equations = np.vstack([(unit[:1] - unit[1:]) @ jacobian.T, np.ones(count)])
    return np.linalg.solve(equations, np.eye(count)[-1])


def pcgrad(jacobian, orders):
    total = np.zeros(jacobian.shape[1])
    for i, order in enumerate(orders):
        g = jacobian[i].copy()
        for j in order:
            if j != i and g @ jacobian[j] < 0:
                g -= (g @ jacobian[j]) / (jacobian[j] @ jacobian[j]) * jacobian[j]
        total += g
    return total


def all_pcgrads(jacobian):
    count = len(jacobian)
    others = [
        list(itertools.permutations(set(range(count)) - {i})) for i in range(count)
    ]
    return [pcgrad(jacobian, orders) for orders in itertools.product(*others)]


def gradvac_pair(jacobian, targets, decay):
    """Two losses: no chance in the order. Returns the direction and new targets."""
    targets, total = targets.copy(), 0.0
    for i, j in ((0, 1), (1, 0)):
        g, other = jacobian[i].copy(), jacobian[j]
        phi = g @ other / np.linalg.norm(g) / np.linalg.norm(other)
        t = targets[i, j]
        if phi < t:
            wanted = t * np.sqrt(1 - phi**2) - phi * np.sqrt(1 - t**2)
            g = (
                g
                + np.linalg.norm(g)
                * wanted
                / (np.linalg.norm(other) * np.sqrt(1 - t**2))
                * other
            )
        targets[i, j] = decay * t + (1 - decay) * phi
        total = total + g
    return total, targets


def pcd(jacobian, squares, primary, tau, eps=1e-8):
    """The direction: projection onto the demands (Lawson, Hanson), then rescaled."""
    if len(jacobian) == 1:
        return jacobian[0]
    scaled = jacobian / np.sqrt(squares + eps)[:, None]
    others = np.delete(scaled, primary, 0)
    demands = np.delete(np.broadcast_to(tau, len(scaled)), primary)
    lacking = demands * (others**2).sum(1) - others @ scaled[primary]
    system = np.vstack([others.T, lacking])
    wanted = np.r_[np.zeros(len(system) - 1), 1]
    rest = system @ nnls(system, wanted, maxiter=100 * len(jacobian))[0] - wanted
    if np.linalg.norm(rest) < 1e-9:  # they contradict each other
        return jacobian[primary]
    direction = scaled[primary] - rest[:-1] / rest[-1]
    length = np.linalg.norm(jacobian[primary])
    return direction * length / np.linalg.norm(direction)


def pivrg(jacobian, scores, bound=2.0, least_temperature=10.0):
    """The weights of MTLlib: least squares of the equation of FairGrad, alpha = 2."""
    gramian, scores = jacobian @ jacobian.T, np.asarray(scores)
    temperature = max(np.ptp(scores) / np.log(bound), least_temperature)
    parts = np.exp((scores - scores.max()) / temperature)
    parts *= len(scores) / parts.sum()
    return least_squares(
        lambda x: gramian @ x - np.sqrt(parts / x),
        np.full(len(scores), 1 / len(scores)),
        bounds=(0, np.inf),
        ftol=1e-15,
        xtol=1e-15,
        gtol=1e-15,
    ).x
