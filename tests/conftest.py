"""Without a GPU, use the interpreter for the kernels. This must be set before Triton is imported.

Use one thread, because the tensors are small. `pytest -m fast` runs tests that together need 90 seconds of
one core: everything that is not listed here.
"""

import os
from collections.abc import Iterable
from fnmatch import fnmatch

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
torch.set_num_threads(1)

FIRST_TEST = ("test_kernel_*",)  # only the first test of these files is fast
FIRST_VARIANTS = (  # only the first variant of each test in these files
    "test_attention_options",
    "test_benchmark*",
    "test_blocks",
    "test_chat",
    "test_decoding",
    "test_delta_rule",
    "test_deltanet",
    "test_export",
    "test_linear_scan",
    "test_mamba2",
    "test_packing_operations",
    "test_parallel",
    "test_parts",
    "test_published*",
    "test_retention",
    "test_short_convolution",
)
SLOW = {  # file -> tests that are not fast
    "test_benchmark_session": "a_rehearsal_runs_every_branch a_wrong_kernel_loses_its_own_rows_alone "
    "the_sweep_times_the_settings_of_the_kernel_file again_checks_only_what_is_not_known_to_be_right "
    "a_failed_check_costs_its_kernel_alone a_session_goes_on_after_a_failed_check",
    "test_benchmarks": "throughput_writes_rows_that_plot_draws throughput_compares_paths "
    "peak_memory_is_that_of_the_call every_sweep_measures_the_points_of_the_first "
    "a_claim_leaves_rows_that_plot_draws what_does_not_fit_is_a_row "
    "routing_decisions_are_those_of_all_batches_scored",
    "test_every_option": "every_option_of_training_has_an_effect",
    "test_first_hour": "a_signal_saves a_loss_that_is_not_finite_is_not_saved",
    "test_house": "the_fast_tier_has_a_test_of_every_file",
    "test_laws": "compiles_to_one_graph overfits_one_batch",
    "test_blocks": "blocks_compiled_one_by_one_compute_the_same",
    "test_fit": "a_trial_trains_the_model",
    "test_parallel": "ranks_have_the_losses_and_gradient_norms_of_one_process "
    "a_split_context_gives_the_outputs_and_gradients_of_the_whole "
    "torchrun_takes_the_steps_of_one_process_which_continues_its_run "
    "a_rank_that_dies_ends_the_job_with_its_number_and_reason "
    "a_rank_that_raises_ends_the_job_with_its_number_and_reason sigterm_to_torchrun_saves",
    "test_packing_operations": "attention_of_documents_compiles_to_one_graph",
    "test_published": "loading_never_holds_two_copies",
    "test_train": "main_path a_compiled_run_takes_the_same_steps resuming_is_exact "
    "refuses_to_resume_what_is_damaged_or_another_run refuses_options_of_another_kind "
    "minutes_end_a_run_and_shape_its_schedule",
}


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    """Chunks of 16 steps in the scan, so that short texts have several."""
    monkeypatch.setattr("minimodels.ops.scan.WORK", 1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mark_fast(items)
    skip_kernels(items)


def mark_fast(items: Iterable[pytest.Item]) -> None:
    """Mark the tests of the fast tier."""
    from models import NAMES

    seen: set[tuple[str, ...]] = set()
    for item in items:
        if item.get_closest_marker("nightly"):
            continue
        file, name = item.path.stem, getattr(item, "originalname", item.name)
        first_test, first_variant = (file,) not in seen, (file, name) not in seen
        seen |= {(file,), (file, name)}
        if file == "test_laws" and hasattr(item, "callspec"):
            fast = item.callspec.params.get("layers", NAMES[0]) in NAMES
        elif any(fnmatch(file, pattern) for pattern in FIRST_TEST):
            fast = first_test
        else:
            fast = first_variant or not any(fnmatch(file, each) for each in FIRST_VARIANTS)
        if fast and name.removeprefix("test_") not in SLOW.get(file, "").split():
            item.add_marker(pytest.mark.fast)


def skip_kernels(items: Iterable[pytest.Item]) -> None:
    """Skip the tests of kernels if these can be neither compiled nor interpreted, and say why."""
    from minimodels.kernels import require

    from minimodels.errors import InputError

    try:
        require("rmsnorm", torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    except InputError as error:
        for item in items:
            if item.path.name.startswith("test_kernel_"):
                item.add_marker(pytest.mark.skip(reason=str(error)))
