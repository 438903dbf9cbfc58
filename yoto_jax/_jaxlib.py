"""Versions of jaxlib that compute wrong gradients."""

MISCOMPILING = ("0.10.2",)
"""On a CPU, ``jit`` of a ``vmap`` over a pullback is silently wrong with these.

Small shapes do not show it; products with a statistic of a row, as in a normalisation,
do from moderate sizes on.
"""
