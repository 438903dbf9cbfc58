"""Weights are those of TorchJD 0.18, as stored: it need not be installed."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.integrations import torchjd_golden as golden
from yoto_jax import weightings as w

pytestmark = pytest.mark.usefixtures("quick_compilation")

STORED = json.loads(golden.FILE.read_text())
INPUTS = {name: np.array(x) for name, x in STORED["inputs"].items()}
FOUND = {name: np.array(x) for name, x in STORED["found"].items()}
RATIOS = golden.RATIOS

# Where TorchJD solves the equation as it stands, we do so too.
OURS = {
    "equal": w.equal(),
    "upgrad": w.upgrad(),
    "upgrad, preference": w.upgrad(preference=RATIOS),
    "dual_proj": w.dual_proj(),
    "dual_proj, preference": w.dual_proj(preference=RATIOS),
    "mgda": w.mgda(),
    "cagrad": w.cagrad(c=0.5),
    "config": w.config(),
    "config, preference": w.config(preference=RATIOS),
    "imtl_g": w.imtl_g(),
    "nash_mtl": w.nash_mtl(regularization=0.0),
    "aligned_mtl": w.aligned_mtl(),
    "aligned_mtl, preference": w.aligned_mtl(preference=RATIOS),
    "aligned_mtl, median": w.aligned_mtl(scale="median"),
    "fair_grad": w.fair_grad(alpha=2.0, regularization=0.0),
    "pcd": w.pcd(0, tau=0.5),
    "pcgrad of two": w.pcgrad(),
    "gradvac of two": w.gradvac(),
    "smooth": w.smooth(w.upgrad(), decay=0.9),
    "modo": w.modo(learning_rate=0.1, regularization=0.1),
    "sdmgrad": w.sdmgrad(learning_rate=1.0),
    "geometric": w.geometric(),
    "stch": w.stch(
        smoothing=0.5,
        preference=[p / 6 for p in RATIOS],
        ideal=[0.1 * p for p in RATIOS],
    ),
    "dwa": w.dwa(),
    "uncertainty": w.uncertainty(optimizer=optax.sgd(0.1)),
    "imtl_l": w.imtl_l(optimizer=optax.sgd(0.1)),
    "famo": w.famo(exact=True),
}
TOLERANCES = {  # relative to the largest; beyond rounding, those of TorchJD's solvers
    "mgda": 1e-3,  # Frank-Wolfe
    "cagrad": 2e-4,  # Clarabel: gaps of 1e-8 in the objective
    "nash_mtl": 1e-6,  # ECOS
    "fair_grad": 1e-8,  # SciPy's least squares
    "gradvac of two": 1e-7,  # 1e-8 more in its norms
    "sdmgrad": 1e-7,  # and in its squared scale
}
PAGE = golden.FILE.parents[2] / "docs" / "understand" / "others.md"


@functools.cache
def ours():
    """All weights, (steps, losses) each, from one program."""

    def three_steps(name, weighting, given):
        count = 2 if name.endswith("of two") else golden.LOSSES

        def step(state, given):
            rows = given["jacobians"][:count]
            seen = {
                "gramian": rows @ rows.T,
                "cross_gramian": rows @ given["others"][:count].T,
            }
            seen = {k: x for k, x in seen.items() if k in weighting.needs}
            losses = list(given["losses"][:count])
            weights, state = weighting.update(losses, state, **seen)
            if weighting.observe_step is not None:
                state = weighting.observe_step(list(given["after"]), state)
            weights = jnp.stack(weights)
            return state, weights @ rows if name.startswith("config") else weights

        return jax.lax.scan(step, weighting.init([jnp.ones(())] * count), given)[1]

    def every(given):
        return {name: three_steps(name, x, given) for name, x in OURS.items()}

    with jax.enable_x64(True):
        found = jax.jit(every)(jax.tree.map(jnp.asarray, INPUTS))
        return jax.tree.map(np.asarray, found)


@pytest.mark.parametrize("name", OURS)
def test_weights_are_those_of_torchjd(name):
    theirs = FOUND[name]
    tolerance = TOLERANCES.get(name, 1e-10) * np.abs(theirs).max()
    np.testing.assert_allclose(ours()[name], theirs, rtol=0, atol=tolerance)


def test_the_page_has_the_differences():
    rows = re.findall(r"^\| `(\w+)` \| (\de-\d\d) \|", PAGE.read_text(), re.MULTILINE)
    bounds = {name.removesuffix(" of two"): x for name, x in TOLERANCES.items()}
    assert {name: float(bound) for name, bound in rows} == bounds


def test_nothing_of_torchjd_is_left_out():
    assert STORED["versions"]["torchjd"] == "0.18.0"
    assert FOUND.keys() == OURS.keys()
    assert {name: x.tolist() for name, x in INPUTS.items()} == golden.inputs()
