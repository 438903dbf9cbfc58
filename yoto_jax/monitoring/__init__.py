"""Monitoring of loss weights and conflicts: on the device, read on the host."""

from yoto_jax.monitoring._conflicts import Conflicts as Conflicts
from yoto_jax.monitoring._conflicts import WatchedState as WatchedState
from yoto_jax.monitoring._conflicts import conflicts as conflicts
from yoto_jax.monitoring._conflicts import measure_conflicts as measure_conflicts
from yoto_jax.monitoring._conflicts import watched as watched
from yoto_jax.monitoring._diagnose import diagnose as diagnose
from yoto_jax.monitoring._findings import Finding as Finding
from yoto_jax.monitoring._findings import LossWeightWarning as LossWeightWarning
from yoto_jax.monitoring._findings import check as check
from yoto_jax.monitoring._findings import warn as warn
from yoto_jax.monitoring._history import History as History
from yoto_jax.monitoring._history import history as history
from yoto_jax.monitoring._plot import plot_loss_weights as plot_loss_weights
from yoto_jax.monitoring._plot_conflicts import plot_conflicts as plot_conflicts
from yoto_jax.monitoring._record import HistoryState as HistoryState
from yoto_jax.monitoring._record import RecordedState as RecordedState
from yoto_jax.monitoring._record import record as record
from yoto_jax.monitoring._record import recorded as recorded
from yoto_jax.monitoring._tensorboard import Writer as Writer
from yoto_jax.monitoring._tensorboard import write_scalars as write_scalars

__all__ = [
    "Conflicts",
    "Finding",
    "History",
    "HistoryState",
    "LossWeightWarning",
    "RecordedState",
    "WatchedState",
    "Writer",
    "check",
    "conflicts",
    "diagnose",
    "history",
    "measure_conflicts",
    "plot_conflicts",
    "plot_loss_weights",
    "record",
    "recorded",
    "warn",
    "watched",
    "write_scalars",
]
