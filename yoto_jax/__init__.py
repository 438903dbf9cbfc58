"""Train once: loss weights learned with the model, for JAX and Optax."""

import importlib
import typing

from yoto_jax import weightings as weightings
from yoto_jax._by_hypergradient import HypergradientState as HypergradientState
from yoto_jax._by_hypergradient import by_hypergradient as by_hypergradient
from yoto_jax._choice_decay import add_choice_decay as add_choice_decay
from yoto_jax._choice_decay import choice_regularizer as choice_regularizer
from yoto_jax._choice_logits import ChoiceLogits as ChoiceLogits
from yoto_jax._choice_logits import ChoiceWeights as ChoiceWeights
from yoto_jax._choice_logits import HardChoice as HardChoice
from yoto_jax._choice_logits import init_choice_logits as init_choice_logits
from yoto_jax._choose import apply_choice as apply_choice
from yoto_jax._choose import choose as choose
from yoto_jax._choose import harden as harden
from yoto_jax._choose import steer_choices as steer_choices
from yoto_jax._composite_loss import composite_loss as composite_loss
from yoto_jax._group_advantages import group_advantages as group_advantages
from yoto_jax._hyperparameter_decay import (
    HyperparameterDecayState as HyperparameterDecayState,
)
from yoto_jax._hyperparameter_decay import (
    add_hyperparameter_decay as add_hyperparameter_decay,
)
from yoto_jax._hyperparameter_decay import regularizer as regularizer
from yoto_jax._loss_logits import LossLogits as LossLogits
from yoto_jax._loss_logits import init_loss_logits as init_loss_logits
from yoto_jax._loss_logits import loss_weights as loss_weights
from yoto_jax._loss_spec import LossSpec as LossSpec
from yoto_jax._make_weighting import make_weighting as make_weighting
from yoto_jax._masked_mean import MaskedLosses as MaskedLosses
from yoto_jax._masked_mean import masked_mean as masked_mean
from yoto_jax._optimizers import adamw as adamw
from yoto_jax._optimizers import label_loss_logits as label_loss_logits
from yoto_jax._optimizers import sgdw as sgdw
from yoto_jax._outliers import OutlierRule as OutlierRule
from yoto_jax._outliers import SkipOutliersState as SkipOutliersState
from yoto_jax._skip_outliers import skip_outliers as skip_outliers
from yoto_jax._weighting import LossWeighting as LossWeighting
from yoto_jax._weighting import WeightingState as WeightingState
from yoto_jax.gradients._aggregate import aggregate as aggregate
from yoto_jax.gradients._aggregate_momenta import MomentaState as MomentaState
from yoto_jax.gradients._aggregate_momenta import aggregate_momenta as aggregate_momenta
from yoto_jax.gradients._balanced_epsilon import balanced_epsilon as balanced_epsilon
from yoto_jax.gradients._cross_gramian import cross_gramian as cross_gramian
from yoto_jax.gradients._grad_drop import GradDropState as GradDropState
from yoto_jax.gradients._grad_drop import grad_drop as grad_drop
from yoto_jax.gradients._jacobian import value_and_jacobian as value_and_jacobian
from yoto_jax.gradients._parameters import of_parameters as of_parameters
from yoto_jax.gradients._per_loss import per_loss as per_loss
from yoto_jax.gradients._representation import of_representation as of_representation
from yoto_jax.gradients._steering import on_training as on_training
from yoto_jax.gradients._steering import on_validation as on_validation
from yoto_jax.gradients._value_and_grad import value_and_grad as value_and_grad

if typing.TYPE_CHECKING:
    from yoto_jax import conditional as conditional
    from yoto_jax import monitoring as monitoring
    from yoto_jax import racing as racing
    from yoto_jax import testing as testing

__version__ = "0.1.0"

__all__ = [
    "ChoiceLogits",
    "ChoiceWeights",
    "GradDropState",
    "HardChoice",
    "HypergradientState",
    "HyperparameterDecayState",
    "LossLogits",
    "LossSpec",
    "LossWeighting",
    "MaskedLosses",
    "MomentaState",
    "OutlierRule",
    "SkipOutliersState",
    "WeightingState",
    "adamw",
    "add_choice_decay",
    "add_hyperparameter_decay",
    "aggregate",
    "aggregate_momenta",
    "apply_choice",
    "balanced_epsilon",
    "by_hypergradient",
    "choice_regularizer",
    "choose",
    "composite_loss",
    "conditional",
    "cross_gramian",
    "grad_drop",
    "group_advantages",
    "harden",
    "init_choice_logits",
    "init_loss_logits",
    "label_loss_logits",
    "loss_weights",
    "make_weighting",
    "masked_mean",
    "monitoring",
    "of_parameters",
    "of_representation",
    "on_training",
    "on_validation",
    "per_loss",
    "racing",
    "regularizer",
    "sgdw",
    "skip_outliers",
    "steer_choices",
    "testing",
    "value_and_grad",
    "value_and_jacobian",
    "weightings",
]


if not typing.TYPE_CHECKING:  # With it, type checkers would take any name.

    def __getattr__(name: str) -> typing.Any:
        """The parts that few programs need are imported when they are asked for."""
        if name not in ("conditional", "monitoring", "racing", "testing"):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return importlib.import_module(f"{__name__}.{name}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
