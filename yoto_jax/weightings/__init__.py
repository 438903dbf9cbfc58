"""Loss weightings: one function for each method, all with the same use.

A weighting goes into :func:`yoto_jax.value_and_grad` or :func:`yoto_jax.aggregate`.
:func:`methods` tells what is known of each.
"""

import typing

from yoto_jax.weightings._registry import HOMES as _HOMES
from yoto_jax.weightings._registry import Method as Method
from yoto_jax.weightings._registry import Paper as Paper
from yoto_jax.weightings._registry import find as _find
from yoto_jax.weightings._registry import methods as methods

if typing.TYPE_CHECKING:  # For type checkers: the names that the registry has.
    from yoto_jax.weightings._aligned_mtl import aligned_mtl as aligned_mtl
    from yoto_jax.weightings._auto_lambda import AutoLambdaState as AutoLambdaState
    from yoto_jax.weightings._auto_lambda import auto_lambda as auto_lambda
    from yoto_jax.weightings._averages import AverageState as AverageState
    from yoto_jax.weightings._cagrad import cagrad as cagrad
    from yoto_jax.weightings._causal import causal as causal
    from yoto_jax.weightings._config import config as config
    from yoto_jax.weightings._cov import CovState as CovState
    from yoto_jax.weightings._cov import cov as cov
    from yoto_jax.weightings._db_mtl import db_mtl as db_mtl
    from yoto_jax.weightings._dual_proj import dual_proj as dual_proj
    from yoto_jax.weightings._dwa import DwaState as DwaState
    from yoto_jax.weightings._dwa import dwa as dwa
    from yoto_jax.weightings._encodec_balancer import (
        encodec_balancer as encodec_balancer,
    )
    from yoto_jax.weightings._epo import epo as epo
    from yoto_jax.weightings._fair_grad import fair_grad as fair_grad
    from yoto_jax.weightings._famo import FamoState as FamoState
    from yoto_jax.weightings._famo import famo as famo
    from yoto_jax.weightings._geometric import geometric as geometric
    from yoto_jax.weightings._grad_norm_balance import NormsState as NormsState
    from yoto_jax.weightings._grad_norm_balance import calibrated as calibrated
    from yoto_jax.weightings._grad_norm_balance import (
        grad_norm_balance as grad_norm_balance,
    )
    from yoto_jax.weightings._gradnorm import GradNormState as GradNormState
    from yoto_jax.weightings._gradnorm import gradnorm as gradnorm
    from yoto_jax.weightings._gradvac import GradVacState as GradVacState
    from yoto_jax.weightings._gradvac import gradvac as gradvac
    from yoto_jax.weightings._grap import GrapState as GrapState
    from yoto_jax.weightings._grap import grap as grap
    from yoto_jax.weightings._grap_closed_form import (
        GrapClosedFormState as GrapClosedFormState,
    )
    from yoto_jax.weightings._grap_closed_form import (
        grap_closed_form as grap_closed_form,
    )
    from yoto_jax.weightings._imtl_g import imtl_g as imtl_g
    from yoto_jax.weightings._imtl_l import ImtlLState as ImtlLState
    from yoto_jax.weightings._imtl_l import imtl_l as imtl_l
    from yoto_jax.weightings._inverse_dirichlet import (
        inverse_dirichlet as inverse_dirichlet,
    )
    from yoto_jax.weightings._log import LogState as LogState
    from yoto_jax.weightings._log import log as log
    from yoto_jax.weightings._lr_annealing import lr_annealing as lr_annealing
    from yoto_jax.weightings._metabalance import metabalance as metabalance
    from yoto_jax.weightings._mgda import mgda as mgda
    from yoto_jax.weightings._moco import MocoState as MocoState
    from yoto_jax.weightings._moco import moco as moco
    from yoto_jax.weightings._moco import modo as modo
    from yoto_jax.weightings._nash_mtl import nash_mtl as nash_mtl
    from yoto_jax.weightings._ntk import ntk as ntk
    from yoto_jax.weightings._ntk import ntk_diagonal as ntk_diagonal
    from yoto_jax.weightings._ntk import ntk_surrogate as ntk_surrogate
    from yoto_jax.weightings._pcd import PcdState as PcdState
    from yoto_jax.weightings._pcd import pcd as pcd
    from yoto_jax.weightings._pcgrad import PCGradState as PCGradState
    from yoto_jax.weightings._pcgrad import pcgrad as pcgrad
    from yoto_jax.weightings._random import RandomState as RandomState
    from yoto_jax.weightings._random import random as random
    from yoto_jax.weightings._relobralo import RelobraloState as RelobraloState
    from yoto_jax.weightings._relobralo import relobralo as relobralo
    from yoto_jax.weightings._scale_invariant import scale_invariant as scale_invariant
    from yoto_jax.weightings._sdmgrad import sdmgrad as sdmgrad
    from yoto_jax.weightings._skip_outliers import (
        SkipOutliersState as SkipOutliersState,
    )
    from yoto_jax.weightings._skip_outliers import skip_outliers as skip_outliers
    from yoto_jax.weightings._slaw import SlawState as SlawState
    from yoto_jax.weightings._slaw import slaw as slaw
    from yoto_jax.weightings._softadapt import SoftAdaptState as SoftAdaptState
    from yoto_jax.weightings._softadapt import softadapt as softadapt
    from yoto_jax.weightings._softmax_alignment import (
        SoftmaxAlignmentState as SoftmaxAlignmentState,
    )
    from yoto_jax.weightings._softmax_alignment import (
        softmax_alignment as softmax_alignment,
    )
    from yoto_jax.weightings._static import equal as equal
    from yoto_jax.weightings._static import static as static
    from yoto_jax.weightings._stch import StchState as StchState
    from yoto_jax.weightings._stch import stch as stch
    from yoto_jax.weightings._uncertainty import UncertaintyState as UncertaintyState
    from yoto_jax.weightings._uncertainty import uncertainty as uncertainty
    from yoto_jax.weightings._upgrad import upgrad as upgrad
    from yoto_jax.weightings._uw_so import uw_so as uw_so
    from yoto_jax.weightings._wrappers import EveryState as EveryState
    from yoto_jax.weightings._wrappers import HoldState as HoldState
    from yoto_jax.weightings._wrappers import NormalizeState as NormalizeState
    from yoto_jax.weightings._wrappers import SmoothState as SmoothState
    from yoto_jax.weightings._wrappers import every as every
    from yoto_jax.weightings._wrappers import hold as hold
    from yoto_jax.weightings._wrappers import normalize as normalize
    from yoto_jax.weightings._wrappers import smooth as smooth
    from yoto_jax.weightings._yoto import YotoState as YotoState
    from yoto_jax.weightings._yoto import yoto as yoto

__all__ = ["Method", "Paper", "methods", *_HOMES]


if not typing.TYPE_CHECKING:  # With it, type checkers would take any name.

    def __getattr__(name: str) -> typing.Any:
        """A method is imported when it is first asked for: there are many of them."""
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = _find(name)
        return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
