"""Races: several ways of weighting losses train side by side, the best one finishes.

Arms are loss weights, or weightings, or both. Each trains in a lane of its own: all
arrays have a leading axis of lanes, and the step of one run becomes that of all by
``jax.vmap``. At a few rungs the lanes that validate worst are dropped. Everything here
is a pure function on pytrees: the loop, the step and the validation stay the user's.

Data flows through the modules in this order::

    _plan       how many lanes train for how long, and what that costs
    _units      loss weights in units of gradient norms
    _portfolio  weightings to race when nothing is known
    _one_of     a weighting that is one of several
    _lanes      axes of lanes: put on, cut down, spread over devices, taken off
"""

from yoto_jax.racing._lanes import Kept as Kept
from yoto_jax.racing._lanes import keep as keep
from yoto_jax.racing._lanes import lane as lane
from yoto_jax.racing._lanes import spread as spread
from yoto_jax.racing._lanes import stack as stack
from yoto_jax.racing._lanes import start as start
from yoto_jax.racing._one_of import OneOfState as OneOfState
from yoto_jax.racing._one_of import alone as alone
from yoto_jax.racing._one_of import one_of as one_of
from yoto_jax.racing._plan import Plan as Plan
from yoto_jax.racing._plan import Rung as Rung
from yoto_jax.racing._plan import plan as plan
from yoto_jax.racing._plan import successive_halving as successive_halving
from yoto_jax.racing._portfolio import portfolio as portfolio
from yoto_jax.racing._units import gradient_norms as gradient_norms
from yoto_jax.racing._units import weights_by_norms as weights_by_norms

__all__ = [
    "Kept",
    "OneOfState",
    "Plan",
    "Rung",
    "alone",
    "gradient_norms",
    "keep",
    "lane",
    "one_of",
    "plan",
    "portfolio",
    "spread",
    "stack",
    "start",
    "successive_halving",
    "weights_by_norms",
]
