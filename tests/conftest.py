import os

import jax
import jaxlib
import pytest

QUICK = bool(os.environ.get("YOTO_JAX_QUICK_XLA"))
"""Whether XLA is to compile quickly, and programs may be slow: see the Makefile."""

if QUICK and jaxlib.version.__version_info__ < (0, 11):  # Later ones have no other way.
    flags = (
        "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    )
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


# Of every room what breaks first, and the compiled path at the size of real models.
SMOKE = {
    "checkpoints/test_checkpoints.py": ["test_a_restored_run_continues_bit_for_bit"],
    "conditional/test_distributions.py": ["test_weights_come_in_any_container"],
    "contract/test_optimizers.py": ["test_one_trace_over_100_steps"],
    "core/test_composite_loss.py": [
        "test_jit_vmap_and_scan_agree_with_eager",
    ],
    "core/test_hyperparameter_decay.py": [
        "test_value_and_gradient_equal_equations_7_and_8"
    ],
    "core/test_optimizers.py": ["test_sgdw_is_algorithm_1"],
    "devices/test_devices.py": ["test_shard_map"],
    "engine/test_gradients.py": ["test_gradients_of_the_representation"],
    "engine/test_present.py": ["test_the_engine_weighs_what_is_there[all]"],
    "engine/test_real_sizes.py": [
        "test_gradients_of_parameters[all-float32]",
        "test_masked_means_of_reshaped_arrays",
    ],
    "monitoring/test_monitoring.py": ["test_a_healthy_run_is_left_alone"],
    "project/test_layers.py": ["test_imports_go_down"],
    "weightings/test_gramian.py": ["test_golden_values"],
}


def pytest_collection_modifyitems(items):
    for item in items:
        if "full_compilation" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.compiled)
        chosen = SMOKE.get("/".join(item.path.parts[-2:]), ())
        if item.name in chosen or item.name.split("[")[0] in chosen:
            item.add_marker(pytest.mark.smoke)


@pytest.fixture
def any_rank():
    """For models, which commonly add biases to batches."""
    with jax.numpy_rank_promotion("allow"):
        yield
