"""Per-loss gradients: where they come from, what is told of them, one update.

Data flows through the rooms in this order::

    _value_and_grad  asks a source for a pass, a weighting for weights
    _sources         the gradients of the parameters, or of a representation
    _statistics      what a weighting is told of them
    _rows            arithmetic on them
    _devices         axes of pmap and shard_map that they are averaged over
    _aggregate       the same weightings on gradients that are stacked already
"""
