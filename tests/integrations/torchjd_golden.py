"""Weights of TorchJD in three steps, to be kept: ``python -m tests.integrations.torchjd_golden``.

Needs PyTorch, TorchJD and the solvers that it calls, and nothing of this library. The
numbers are what they are on the inputs that are stored beside them.
"""  # noqa: E501

import importlib
import importlib.metadata
import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

FILE = pathlib.Path(__file__).with_suffix(".json")
PACKAGES = ("torchjd", "torch", "numpy", "cvxpy", "clarabel", "ecos", "quadprog")
STEPS, LOSSES, PARAMETERS = 3, 3, 5
RATIOS = [1.0, 2.0, 3.0]


def inputs() -> dict[str, Any]:
    """Gradients of two batches, in conflict, and losses, before and after a step."""
    rng = np.random.default_rng(18)
    shape = STEPS, LOSSES, PARAMETERS
    jacobians = rng.normal(size=shape) * np.array([1.0, 0.4, 3.0])[:, None]
    jacobians -= 0.6 * jacobians.mean(1, keepdims=True)
    losses = rng.uniform(0.3, 3.0, shape[:2])
    made = {
        "jacobians": jacobians,
        "others": jacobians + 0.3 * rng.normal(size=shape),
        "losses": losses,
        "after": losses * rng.uniform(0.6, 1.1, shape[:2]),
    }
    return {name: np.round(x, 3).tolist() for name, x in made.items()}


def of_gradients(aggregation: Any, torch: Any) -> dict[str, Any]:
    """What gives weights, or directions, by the name and options that we give it."""
    ratios = torch.tensor(RATIOS, dtype=torch.float64)
    a = aggregation
    return {
        "equal": a.Mean(),
        "upgrad": a.UPGrad(),
        "upgrad, preference": a.UPGrad(ratios),
        "dual_proj": a.DualProj(),
        "dual_proj, preference": a.DualProj(ratios),
        "mgda": a.MGDA(epsilon=1e-12, max_iters=20_000),
        "cagrad": a.CAGrad(c=0.5),
        "config": a.ConFIG(),
        "config, preference": a.ConFIG(ratios),
        "imtl_g": a.IMTLG(),
        "nash_mtl": a.NashMTL(n_tasks=LOSSES),
        "aligned_mtl": a.AlignedMTL(),
        "aligned_mtl, preference": a.AlignedMTL(ratios),
        "aligned_mtl, median": a.AlignedMTL(scale_mode="median"),
        "fair_grad": a.FairGrad(alpha=2.0),
        "pcd": a.PCD(tau=0.5),
        "pcgrad of two": a.PCGrad(),
        "gradvac of two": a.GradVac(beta=0.01),
        "smooth": a.CRMOGMWeighting(a.UPGradWeighting(), alpha=0.9),
        "modo": a.MoDoWeighting(gamma=0.1, rho=0.1),
        "sdmgrad": a.SDMGradWeighting(lr=1.0),
    }


def of_losses(scalarization: Any, torch: Any) -> dict[str, Any]:
    ratios = torch.tensor(RATIOS, dtype=torch.float64)
    s = scalarization
    return {
        "geometric": s.GeometricMean(),
        "stch": s.STCH(mu=0.5, weights=ratios / 6, reference=0.1 * ratios),
        "dwa": s.DWA(),
        "uncertainty": s.UW(LOSSES).double(),
        "imtl_l": s.IMTLL(LOSSES).double(),
        "famo": s.FAMO(LOSSES).double(),
    }


def main() -> None:
    torch: Any = importlib.import_module("torch")
    of = lambda name: importlib.import_module(f"torchjd.{name}")
    given = inputs()
    data = {k: torch.tensor(x, dtype=torch.float64) for k, x in given.items()}
    found: dict[str, Any] = {}
    for name, method in of_gradients(of("aggregation"), torch).items():
        found[name] = [_weigh(name, method, data, step) for step in range(STEPS)]
    for name, method in of_losses(of("scalarization"), torch).items():
        sgd = [torch.optim.SGD(method.parameters(), 0.1)] if _learns(name) else []
        found[name] = [_scalarize(method, sgd, data, step) for step in range(STEPS)]
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    parts = {"versions": versions, "inputs": given, "found": found}
    blocks = [f'"{name}": {{\n{_lines(part)}\n}}' for name, part in parts.items()]
    FILE.write_text("{\n" + ",\n".join(blocks) + "\n}\n")


def _lines(part: dict[str, Any]) -> str:
    return ",\n".join(f" {json.dumps(k)}: {json.dumps(x)}" for k, x in part.items())


def _weigh(name: str, method: Any, data: Any, step: int) -> list[float]:
    jacobian = data["jacobians"][step]
    if name.endswith("of two"):
        jacobian = jacobian[:2]
    if name.startswith("config"):  # It gives a direction.
        return method(jacobian).tolist()
    if name in ("modo", "sdmgrad"):
        return method(jacobian @ data["others"][step].T).tolist()
    if name == "smooth":
        return method(jacobian @ jacobian.T).tolist()
    if hasattr(method, "gramian_weighting"):
        return method.gramian_weighting(jacobian @ jacobian.T).tolist()
    return [float(x) for x in method.weighting(jacobian)]


def _learns(name: str) -> bool:
    return name in ("uncertainty", "imtl_l")


def _scalarize(method: Any, sgd: list[Any], data: Any, step: int) -> list[float]:
    losses = data["losses"][step].clone().requires_grad_()
    method(losses).backward()
    for optimizer in sgd:
        optimizer.step()
        optimizer.zero_grad()
    advance: Callable[..., Any] | None = getattr(method, "step", None)
    if advance is not None:  # of DWA: an epoch is over
        advance()
    if hasattr(method, "update"):
        method.update(data["after"][step])
    return losses.grad.tolist()


if __name__ == "__main__":
    main()
