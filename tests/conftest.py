import contextlib
import functools
import os

import jax
import jaxlib
import pytest
from jax._src.interpreters import mlir

QUICK = bool(os.environ.get("YOTO_JAX_QUICK_XLA"))
"""Whether XLA is to compile quickly, and programs may be slow: see the Makefile."""

if QUICK and jaxlib.version.__version_info__ < (0, 11):  # Later ones have no other way.
    flags = (
        "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    )
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"

# JAX makes a context of MLIR for each program, and keeps it. That takes a fifth of the
# time of small programs, and most of the memory.
if QUICK and hasattr(mlir, "make_ir_context"):
    mlir.make_ir_context = functools.cache(mlir.make_ir_context)

jax.config.update("jax_disable_most_optimizations", QUICK)
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


@contextlib.contextmanager
def without_optimisations(value):
    """XLA leaves out most optimisations, or none, until the end."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", value)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def quick_compilation():
    """For tests that compile many programs to run each of them a few times."""
    with without_optimisations(True):
        yield


@pytest.fixture
def optimised():
    """For tests whose numbers depend on how XLA optimises."""
    with without_optimisations(False):
        yield


@pytest.fixture
def full_compilation(optimised):
    """For tests of programs as users compile them; marks them ``compiled``."""
    assert not QUICK, "XLA has been told to compile quickly, in the whole process"


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
    "racing/test_races.py": ["test_nothing_is_lost_with_one_arm"],
    "weightings/test_gramian.py": ["test_golden_values"],
}


# Of weightings, one of each kind.
WEIGHTINGS = [
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

# Rows that stand for the others of their test in `make test`, by how their names begin:
# what differs from row to row is tested elsewhere, and each compiles for seconds.
STANDING_FOR_THE_TEST = {
    "contract/test_weightings.py": {
        "test_eager_equals_jit": ["famo", "upgrad"],
        "test_one_loss_and_twenty": [
            *(f"{name}-20" for name in WEIGHTINGS),
            "equal-1",
            "relobralo-1",
            "gradnorm-1",
            "upgrad-1",
            "grap-1",
        ],
        "test_low_precision_and_double": WEIGHTINGS,
        "test_scan_under_vmap_equals_a_loop": WEIGHTINGS,
        "test_the_gradient_is_the_weighted_sum": WEIGHTINGS,
        "test_eight_devices_equal_one": WEIGHTINGS,
        "test_without_a_loss_the_weights_are_those_for_the_others": WEIGHTINGS,
        "test_a_checkpoint_continues_bit_for_bit": WEIGHTINGS,
    },
    "core/test_by_hypergradient.py": {
        "test_algorithms_4_to_6_with_the_cosine": ["1000.0", "1.5-Adam"],
        "test_a_gradient_that_is_not_finite_teaches_nothing": ["nan"],
        "test_every_tree": ["none", "without", "empty"],
        "test_every_form": ["chain", "partition", "multi_steps", "leaf-wise mask"],
    },
    "devices/test_sharded_params.py": {
        "test_every_device_holds_a_part_and_gathers_the_whole": ["upgrad-False"],
        "test_jit_with_sharded_parameters": ["upgrad-False-Explicit"],
        "test_layers_cut_up_over_a_second_axis": ["gradnorm-False"],
    },
    "engine/test_gradients.py": {
        "test_eight_devices_equal_one": [
            "shard_map",
            "unchecked-losses alone",
            "unchecked-all",
            "unchecked-downstream, encoder",
            "pmap-losses alone",
            "pmap-none kept",
            "pmap-encoder, heads",
        ],
    },
    "engine/test_present.py": {
        "test_a_validation_batch_without_the_downstream_loss_teaches_nothing": [
            "auto_lambda-False",
            "auto_lambda-True",
        ],
        "test_devices_that_disagree_about_labels": ["shard_map", "pmap"],
    },
    "weightings/test_wrappers.py": {
        "test_log_is_the_weighting_of_the_logarithms_of_the_losses": [
            "equal",
            "mgda",
            "grad_norm_balance",
            "auto_lambda",
        ],
        "test_log_with_gradients_of_the_representation": ["mgda-False", "mgda-True"],
        "test_log_inside_and_around_wrappers": ["normalize"],
    },
    "monitoring/test_conflicts.py": {
        "test_eight_devices_equal_one": ["fixed"],
    },
    "weightings/test_gramian.py": {
        "test_equal_preferences_change_no_bit": ["imtl_g", "nash_mtl"],
        "test_pcd_is_the_closest_direction_that_meets_its_demands": ["1", "3", "40"],
        "test_pcd_satisfies_the_conditions_of_karush_kuhn_and_tucker": ["3", "10"],
        "test_cagrad_at_pareto_stationary_gradients_is_the_mean": [
            "2-1.0",
            "3-0.5",
            "10-2.0",
            "40-1.0",
        ],
    },
    "weightings/test_losses.py": {
        "test_weights_equal_an_independent_oracle_at_every_update": [
            "True",
            "False-dwa",
            "False-famo",
            "False-gradnorm",
            "False-lr_annealing",
            "False-ntk",
            "False-relobralo",
            "False-softadapt",
            "False-stch, logarithms and nadir",
            "False-uncertainty of both kinds",
        ],
    },
    "integrations/test_equinox.py": {
        "test_a_filtered_module_and_its_state": ["direct"],
    },
    "integrations/test_flax.py": {"test_nnx_without_its_optimizer": ["tx0"]},
    "integrations/test_nnx.py": {
        "test_gradients_and_state_are_those_of_nnx_grad": [
            "losses",
            "gramian",
            "encoder",
        ],
        "test_what_steers_leaves_no_trace_in_the_module": ["validation"],
    },
}


def is_left_out(item, file):
    """Whether another row stands for this one."""
    rows = STANDING_FOR_THE_TEST.get(file, {}).get(item.name.split("[")[0])
    if rows is None:
        return False
    return not any(f"{item.callspec.id}-".startswith(f"{row}-") for row in rows)


def pytest_collection_modifyitems(items):
    for item in items:
        file = "/".join(item.path.parts[-2:])
        if is_left_out(item, file):
            item.add_marker(pytest.mark.slow)
        if "full_compilation" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.compiled)
        chosen = SMOKE.get(file, ())
        if item.name in chosen or item.name.split("[")[0] in chosen:
            item.add_marker(pytest.mark.smoke)


@pytest.fixture
def any_rank():
    """For models, which commonly add biases to batches."""
    with jax.numpy_rank_promotion("allow"):
        yield
