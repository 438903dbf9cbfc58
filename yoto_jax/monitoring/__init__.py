"""Monitoring of loss weights: recorded on the device, read and checked on the host."""

from yoto_jax.monitoring._findings import Finding as Finding
from yoto_jax.monitoring._findings import LossWeightWarning as LossWeightWarning
from yoto_jax.monitoring._findings import check as check
from yoto_jax.monitoring._findings import warn as warn
from yoto_jax.monitoring._history import History as History
from yoto_jax.monitoring._history import history as history
from yoto_jax.monitoring._plot import plot_loss_weights as plot_loss_weights
from yoto_jax.monitoring._record import HistoryState as HistoryState
from yoto_jax.monitoring._record import RecordedState as RecordedState
from yoto_jax.monitoring._record import record as record
from yoto_jax.monitoring._record import recorded as recorded
from yoto_jax.monitoring._tensorboard import Writer as Writer
from yoto_jax.monitoring._tensorboard import write_scalars as write_scalars

__all__ = [
    "Finding",
    "History",
    "HistoryState",
    "LossWeightWarning",
    "RecordedState",
    "Writer",
    "check",
    "history",
    "plot_loss_weights",
    "record",
    "recorded",
    "warn",
    "write_scalars",
]
