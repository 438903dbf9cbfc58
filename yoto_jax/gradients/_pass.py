"""One batch, forward, and what can be had from it backward."""

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax

from yoto_jax._losses import Losses, Params, PyTree, State, Weights
from yoto_jax._weighting import LossWeighting
from yoto_jax.gradients._devices import Devices
from yoto_jax.gradients._output import check_losses, read_output


@dataclasses.dataclass(frozen=True, eq=False)
class Batch:
    """A loss function with its arguments, and how the step lies on the devices."""

    loss_fn: Callable[..., Any]
    has_aux: bool
    params: Params  # each device's own
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    devices: Devices
    weighting: LossWeighting
    trains: bool  # whether its gradients will reach the parameters

    def losses(self, *leading: Any) -> tuple[PyTree, tuple[Any, jax.Array | None]]:
        """Losses, and ``(aux, present)``, of ``leading`` before the arguments."""
        out = self.loss_fn(*leading, *self.args, **self.kwargs)
        losses, told = read_output(out, self.has_aux, self.devices.axes)
        check_losses(losses, self.params, self.devices)
        return losses, told


class Pass(abc.ABC):
    """The losses of a batch, and what can be had of their gradients.

    A source averages losses and gradients over the devices (``batch.devices``) itself.
    One that has a representation shows its gradient to ``weighting.observe``, if the
    weighting has that.
    """

    losses: Losses  # scalars, averaged over the devices
    aux: Any
    present: jax.Array | None  # bool (K,), whether a device has the loss; None: all

    @abc.abstractmethod
    def statistics(self, names: Sequence[str]) -> dict[str, jax.Array]:
        """Statistics of the gradients, by name."""

    @abc.abstractmethod
    def direction(self, position: int) -> PyTree:
        """The gradient of one loss, of all parameters that the weights act on."""

    @abc.abstractmethod
    def along(self, v: PyTree) -> tuple[jax.Array, jax.Array]:
        """Derivatives (K,) of the losses along ``v``, and its squared norm."""

    @abc.abstractmethod
    def combine(
        self, weights: Weights, state: State, weighting: LossWeighting
    ) -> tuple[PyTree, Any]:
        """The gradient of the weighted sum, and the state that has observed it."""


class GradientSource(Protocol):
    """Where per-loss gradients are taken.

    To add a source, write a frozen dataclass with this method, a :class:`Pass` for it
    to return, and a function in the public face that makes it.
    """

    def forward(self, batch: Batch) -> Pass:
        """Run the forward pass."""
        ...
