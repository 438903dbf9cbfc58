"""Which tests of the benchmarks are left to ``make test-all``.

What all benchmarks share is tested by one whole run of one of them, the digits, in its
quick preset; the whole runs of the others take half a minute each, and their trainings
seconds.
"""

import pytest

# Fixtures that train: the tests that read what they made are as slow as they are.
TRAINED = {
    "ablated",
    "finished",
    "folder",
    "overhead_folder",
    "trained_params",
}
QUICK = "test_command_line.py"  # whose folder is that of the digits

SLOW = {
    "test_beta_vae.py": ["test_one_linear_vae_is_the_best_one_for_every_beta"],
    "test_command_line.py": [
        "test_a_sweep_trains_as_a_single_run_does",
        "test_one_seed_and_one_method_are_enough",
        "test_rho_writes_its_results",
    ],
    "test_compression.py": [
        "test_coding_block_by_block_follows_the_model_of_the_training"
    ],
    "test_conditional_rule.py": [
        "test_without_a_range_it_is_training_with_constant_weights"
    ],
    "test_experiment.py": [
        "test_costs_are_ratios_for_every_round",
        "test_the_digits_on_eight_devices",
    ],
    "test_pinn.py": [
        "test_every_method_can_be_traced_and_keeps_its_state",
        "test_the_kernel_is_that_of_the_whole_jacobian",
        "test_the_residual_is_that_of_derivatives_point_by_point",
    ],
    "test_pretraining.py": [
        "test_a_view_of_no_reach_is_the_image",
        "test_constant_weights_are_those_of_the_losses_with_their_names",
        "test_constant_weights_train_all_but_the_classifier",
        "test_images_without_label_do_not_enter_the_classification",
        "test_the_downstream_loss_trains_its_classifier_and_nothing_else",
    ],
    "test_robustness.py": [
        "test_with_skip_outliers_every_fault_comes_to_the_same",
    ],
    "test_scaling.py": [
        "test_a_finished_run_is_left_alone",
        "test_loss_driven_weightings_add_one_all_reduce_of_as_many_numbers_as_losses",
        "test_memory_is_what_the_guide_says",
    ],
    "test_scenes.py": ["test_depth_and_labels_agree_with_an_independent_ray_caster"],
    "test_styles.py": ["test_conditions_give_images_and_follow_their_key"],
    "test_toy.py": [
        "test_it_writes_its_results",
        "test_methods_end_where_they_did",
        "test_nash_keeps_the_symmetry_between_losses_of_different_scale",
        "test_upgrad_for_two_losses_follows_pcgrad",
    ],
    "test_units.py": ["test_a_benchmark_that_was_killed_ends_with_the_same_numbers"],
}


def pytest_collection_modifyitems(items):
    here = [x for x in items if x.path.parent.name == "benchmarks"]
    for item in here:
        trained = TRAINED & set(item.fixturenames)
        if item.path.name == QUICK:
            trained -= {"folder"}
        name = getattr(item, "originalname", item.name)
        if trained or name in SLOW.get(item.path.name, ()):
            item.add_marker(pytest.mark.slow)
