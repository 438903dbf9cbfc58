"""Checks of the contract of a weighting, for authors of new ones.

:func:`check_weighting` runs all of :func:`checks`; those of weightings that need the
Gramian may also have some of the properties of :func:`gramian_properties`.
"""

from yoto_jax.testing._checks import check_weighting as check_weighting
from yoto_jax.testing._checks import checks as checks
from yoto_jax.testing._gramian import (
    check_gramian_properties as check_gramian_properties,
)
from yoto_jax.testing._gramian import gramian_properties as gramian_properties
from yoto_jax.testing._trial import Trial as Trial

__all__ = [
    "Trial",
    "check_gramian_properties",
    "check_weighting",
    "checks",
    "gramian_properties",
]
