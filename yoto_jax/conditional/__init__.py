"""Loss-conditional training: one model for every weighting of its losses."""

from yoto_jax.conditional._dirichlet import Dirichlet as Dirichlet
from yoto_jax.conditional._distributions import Distribution as Distribution
from yoto_jax.conditional._distributions import Fixed as Fixed
from yoto_jax.conditional._distributions import LogUniform as LogUniform
from yoto_jax.conditional._distributions import Uniform as Uniform
from yoto_jax.conditional._encoding import encode as encode
from yoto_jax.conditional._encoding import encoding_size as encoding_size
from yoto_jax.conditional._film import concatenate as concatenate
from yoto_jax.conditional._film import film as film
from yoto_jax.conditional._film import gate as gate
from yoto_jax.conditional._film import init_film as init_film
from yoto_jax.conditional._film import init_gate as init_gate
from yoto_jax.conditional._film import modulate as modulate
from yoto_jax.conditional._modulation import init_modulation as init_modulation
from yoto_jax.conditional._modulation import modulated as modulated
from yoto_jax.conditional._narrow import narrow as narrow
from yoto_jax.conditional._objective import conditional_loss as conditional_loss
from yoto_jax.conditional._objective import cosmos as cosmos
from yoto_jax.conditional._objective import focal_loss as focal_loss
from yoto_jax.conditional._objective import group_mean as group_mean
from yoto_jax.conditional._objective import pbi as pbi
from yoto_jax.conditional._objective import pinball_loss as pinball_loss
from yoto_jax.conditional._objective import smooth_chebyshev as smooth_chebyshev
from yoto_jax.conditional._objective import weighted_sum as weighted_sum
from yoto_jax.conditional._pareto import hypervolume as hypervolume
from yoto_jax.conditional._pareto import pareto_front as pareto_front
from yoto_jax.conditional._set import smooth_chebyshev_set as smooth_chebyshev_set
from yoto_jax.conditional._sweep import concavity_violations as concavity_violations
from yoto_jax.conditional._sweep import cross_matrix as cross_matrix
from yoto_jax.conditional._sweep import gap as gap
from yoto_jax.conditional._sweep import (
    monotonicity_violations as monotonicity_violations,
)
from yoto_jax.conditional._sweep import select as select
from yoto_jax.conditional._sweep import sweep as sweep

__all__ = [
    "Dirichlet",
    "Distribution",
    "Fixed",
    "LogUniform",
    "Uniform",
    "concatenate",
    "concavity_violations",
    "conditional_loss",
    "cosmos",
    "cross_matrix",
    "encode",
    "encoding_size",
    "film",
    "focal_loss",
    "gap",
    "gate",
    "group_mean",
    "hypervolume",
    "init_film",
    "init_gate",
    "init_modulation",
    "modulate",
    "modulated",
    "monotonicity_violations",
    "narrow",
    "pareto_front",
    "pbi",
    "pinball_loss",
    "select",
    "smooth_chebyshev",
    "smooth_chebyshev_set",
    "sweep",
    "weighted_sum",
]
