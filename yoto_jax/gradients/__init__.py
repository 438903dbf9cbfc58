"""Per-loss gradients: their sources, their statistics and the combined update.

Data flows through the modules in this order::

    _value_and_grad  asks a source for a pass, a weighting for weights
    _output          reads losses off what the loss function returns
    _pass            what a source of gradients is, and what it gives
    _parameters      the source: gradients of the parameters
    _representation  the source: gradients of a representation
    _steering        the batch that a downstream gradient is taken on
    _statistics      statistics of the gradients, for the weighting
    _cross_gramian   the same of two batches
    _rows            arithmetic on the gradients
    _devices         axes of pmap and shard_map that they are averaged over
    _jacobian        all gradients, stacked
    _aggregate       the same weightings on gradients that are stacked already
    _per_loss        what each gradient goes through before
    _aggregate_momenta  the same of momenta, one of which is renewed in a step
    _grad_drop       one sign for each entry of stacked gradients
    _balanced_epsilon  initial weights from the gradients of a few batches
"""
