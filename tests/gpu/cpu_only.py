"""Tests that say something of the CPU alone, by a part of their names, and why."""

from __future__ import annotations

_AHEAD = "only there are matrices factorised side by side"
_NO_TRAINER = "a step without a Trainer, which would bring the batch to the device"
_AUTOCAST = "it names the CPU's autocast; test_precisions.py has the device's"
_GENERATOR = "it sets or looks at the CPU's generator; test_random_states.py has the device's"
_NUMBERS = "its numbers are those of what the CPU's generator draws"
_PROCESSES = "its processes need a device each"

CPU_ONLY = {
    "test_side_by_side_is_the_same": _AHEAD,
    "test_nothing_ahead_where_memory": _AHEAD,
    "test_a_model_whose_spectra_have_no_room": _AHEAD,
    "test_training_loss_and_its_gradient": _NO_TRAINER,
    "test_hook_on_the_output_layer_is_gone": _NO_TRAINER,
    "test_prior_checks_know_tokens_apart": _NO_TRAINER,
    "test_grad_mode_and_autocast_belong": _AUTOCAST,
    "test_the_users_pass_is_the_only_one": _AUTOCAST,
    "test_a_step_that_draws_outside": _GENERATOR,
    "test_reference_is_svd_lowrank": _GENERATOR,
    "test_a_key_that_is_logged_as_something_else": _NUMBERS,
    "test_a_planted_effect_in_an_early_attention_matrix": _NUMBERS,
    "test_the_next_candidates_race_where_all_finalists": _NUMBERS,
    "test_processes_share_a_folder": _PROCESSES,
    "test_two_processes_find": _PROCESSES,
}
