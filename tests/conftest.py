import os

import jax
import jaxlib
import pytest

QUICK = bool(os.environ.get("YOTO_JAX_QUICK_XLA"))
"""Whether XLA is to compile quickly, and programs may be slow: see the Makefile."""

if QUICK and jaxlib.version.__version_info__ < (0, 11):  # Later ones have no other way.
    flags = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="module")
def quick_compilation():
    """For tests that compile many programs to run each of them a few times."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def full_compilation():
    """For tests of programs as users compile them; marks them ``compiled``."""
    assert not QUICK, "XLA has been told to compile quickly, in the whole process"
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


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
)


def pytest_collection_modifyitems(items):
    for item in items:
        if "full_compilation" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.compiled)
        if getattr(item, "originalname", "") in COSTLY:
            row = item.callspec.id.split("-")[0]
            if row not in STANDING_FOR_ALL:
                item.add_marker(pytest.mark.slow)


@pytest.fixture
def any_rank():
    """For models, which commonly add biases to batches."""
    with jax.numpy_rank_promotion("allow"):
        yield
