"""Which rows of the contract are left to ``make test-all``."""

import pytest

# Tests of the contract that compile a program or two for every weighting. Some stand
# for all of one kind in `make test`; `make test-all` has them all.
STANDING_FOR_ALL = [
    "equal",
    "famo",
    "relobralo",
    "yoto",
    "gradnorm",
    "lr_annealing",
    "ntk_surrogate",
    "pcgrad",
    "nash_mtl",
    "aligned_mtl",
    "upgrad",
    "grap",
]
COSTLY = (
    "test_one_loss_and_forty",
    "test_low_precision_and_double",
    "test_scan_under_vmap_equals_a_loop",
    "test_the_gradient_is_the_weighted_sum",
    "test_eight_devices_equal_one",
    "test_without_a_loss_the_weights_are_those_for_the_others",
    "test_a_checkpoint_continues_bit_for_bit",
)


def pytest_collection_modifyitems(items):
    rows = [x for x in items if x.path.match("contract/test_weightings.py")]
    for item in rows:
        if item.originalname in COSTLY:
            row = item.callspec.id.split("-")[0]
            if row not in STANDING_FOR_ALL:
                item.add_marker(pytest.mark.slow)
