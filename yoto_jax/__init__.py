"""Train once: loss weights learned with the model, for JAX and Optax."""

from yoto_jax._composite_loss import composite_loss as composite_loss
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
from yoto_jax._optimizers import adamw as adamw
from yoto_jax._optimizers import label_loss_logits as label_loss_logits
from yoto_jax._optimizers import sgdw as sgdw

__version__ = "0.1.0"

__all__ = [
    "HyperparameterDecayState",
    "LossLogits",
    "adamw",
    "add_hyperparameter_decay",
    "composite_loss",
    "init_loss_logits",
    "label_loss_logits",
    "loss_weights",
    "regularizer",
    "sgdw",
]
