"""The failures that docs/results/reliability.md answers for, and the tests that show each."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """A failure, how it is provoked, and the tests: ``file::function`` below tests/."""

    failure: str
    how: str
    tests: tuple[str, ...]


def _of(file: str, *functions: str) -> tuple[str, ...]:
    return tuple(f"{file}::{function}" for function in functions)


_RESUME, _CHECKPOINT = "resume/test_resume.py", "robust/test_checkpoint.py"
_ERRORS, _FUZZ = "robust/test_run_errors.py", "unit/test_config_fuzz.py"

ROWS = (
    Row(
        "kill -9 of one rank or all, at any instant",
        "two gloo ranks, tiny networks: both, rank 0 or rank 1 is killed at a random step, at a random "
        "moment of it, or while starting; the same command again, many times in one "
        "folder; sha256 of all state (networks, queue and its position, optimiser, scaler, step, best "
        "values) against a run without interruption",
        (
            *_of("resume/test_kills.py", "test_random_kills_of_two_ranks"),
            *_of(
                _RESUME,
                "test_killed_at_random_and_resumed",
                "test_two_ranks_killed_and_resumed",
                "test_a_probe_killed_and_resumed",
            ),
        ),
    ),
    Row(
        "kill at the worst instant",
        "a two-rank run with a checkpoint after every step: killed before and after each fsync, rename and "
        "removal in turn, resumed, compared; the same of a single save and of the retention",
        (
            *_of("resume/test_crash_points.py", "test_every_crash_point_of_two_ranks"),
            *_of(
                _CHECKPOINT,
                "test_kill_at_any_instant_of_a_new_save",
                "test_kill_at_any_instant_of_the_first_save",
                "test_kill_at_any_instant_of_saving_a_step_again",
                "test_kill_at_any_instant_of_prune",
            ),
        ),
    ),
    Row(
        "kill of one rank under a launcher",
        "torchrun --max-restarts=3 with real processes, kill -9 of one of the two in turn",
        _of("e2e/test_restarts.py", "test_killed_workers_are_started_again"),
    ),
    Row(
        "an item of the state is lost (the control)",
        "each item is dropped from a checkpoint in turn: the comparison of the rows above has to notice",
        _of(
            _RESUME,
            "test_the_comparison_notices_each_item_that_is_lost",
            "test_the_best_values_so_far_survive",
        ),
    ),
    Row(
        "a torn or rotten checkpoint",
        "the newest checkpoint of a run, or its record, with one flipped bit or cut short; swapped, missing, "
        "replaced by a folder; none valid",
        (
            *_of("robust/test_rot.py", "test_much_damage_to_the_newest_checkpoint_of_a_run"),
            *_of(
                _CHECKPOINT,
                "test_each_rejected_checkpoint_is_logged_with_its_reason",
                "test_missing_json_means_it_never_happened",
                "test_none_valid_stops_with_every_reason",
                "test_published_files_without_json_are_checked_by_their_checksums",
            ),
            *_of(_ERRORS, "test_only_damaged_checkpoints_stop_the_run"),
        ),
    ),
    Row(
        "a full disk, a full log",
        "a small tmpfs that is full for some steps, and limits of the file size",
        (
            *_of(
                "robust/test_full_disk.py",
                "test_a_full_disk_at_a_checkpoint_and_at_the_logs",
                "test_logs_that_take_no_byte_are_reported_once_each",
            ),
            *_of(
                _ERRORS,
                "test_a_full_disk_at_a_checkpoint_is_an_error_line_and_the_run_goes_on",
                "test_a_disk_that_stays_full_is_no_success",
            ),
            *_of(
                _CHECKPOINT,
                "test_full_disk_raises_oserror_and_leaves_the_old",
                "test_full_disk_at_the_json_leaves_no_half",
            ),
        ),
    ),
    Row(
        "SIGTERM, SIGUSR1, SIGINT",
        "twenty at random moments to one rank or both, with loader workers and k-NN evaluations; also in a "
        "save, an evaluation, an update; twice",
        (
            *_of("resume/test_random_signals.py", "test_signals_at_random_times"),
            *_of(
                _RESUME,
                "test_a_signal_stops_after_the_step_and_the_run_goes_on",
                "test_a_signal_in_the_middle_of_something_waits_for_its_end",
                "test_both_ranks_stop_at_the_step_of_the_one_that_was_asked",
                "test_a_second_signal_stops_at_once",
            ),
        ),
    ),
    Row(
        "another number of processes",
        "saved by two processes, gone on with by two, one (with loader workers) and four for twenty steps; a "
        "transformer, whose norms know no batch",
        (
            *_of(
                "resume/test_world_size.py",
                "test_the_run_goes_on_with_another_number_of_processes",
                "test_a_global_batch_that_does_not_divide_is_refused_with_sizes_that_do",
            ),
            *_of(
                "data/test_global_batches.py", "test_global_batches_do_not_depend_on_the_world_size"
            ),
        ),
    ),
    Row(
        "another number of loader workers",
        "0, 1 and 2 workers, also across a kill",
        (
            *_of(_RESUME, "test_workers_change_nothing_even_across_a_kill"),
            *_of("data/test_global_batches.py", "test_global_batches_do_not_depend_on_workers"),
        ),
    ),
    Row(
        "NaN, Inf, overflow",
        "the loss of one rank or all is multiplied; a gradient scaler that never recovers; states",
        (
            *_of(
                _ERRORS,
                "test_a_loss_that_is_not_finite_stops_before_the_update",
                "test_a_loss_scale_that_never_recovers_stops_the_run",
            ),
            *_of(_CHECKPOINT, "test_non_finite_tensors_are_refused_by_name"),
            "e2e/test_replay.py",
        ),
    ),
    Row(
        "a dead or hung loader worker",
        "SIGKILL, and a worker that sleeps past DATA.TIMEOUT",
        (
            *_of("data/test_bad_images.py", "test_dead_and_hung_workers_give_a_clear_error"),
            *_of(_ERRORS, "test_a_dead_loader_worker"),
        ),
    ),
    Row(
        "a hung rank",
        "a rank that sleeps in a step, a save, an evaluation",
        ("e2e/test_hung_rank.py",),
    ),
    Row(
        "spoilt images",
        "mutated JPEG and PNG files of eleven kinds through the loader's decoder in a process of their own, "
        "twice; bombs, empty files, HTML, cut, vanished and unreadable ones in a folder; the budget",
        (
            *_of(
                "data/test_image_fuzz.py",
                "test_ten_thousand_spoilt_images_are_decoded_or_refused",
                "test_special_files_are_read_or_replaced_alike_with_workers",
                "test_a_file_that_may_not_be_read_is_an_error_of_that_file",
            ),
            *_of(
                "data/test_bad_images.py",
                "test_bad_images_are_replaced_by_a_fixed_rule",
                "test_past_the_budget_the_run_stops",
            ),
            *_of(_ERRORS, "test_too_many_corrupt_images_stop_the_run"),
        ),
    ),
    Row(
        "a malicious checkpoint",
        "twelve objects that would run code if unpickled, in two file formats, led to every command that "
        "opens a file; pickle programs; huge declared sizes; the syntax tree of every file of the product",
        (
            *_of("robust/test_hostile_loaders.py", "test_no_command_executes_a_hostile_file"),
            *_of(
                "robust/test_foreign.py",
                "test_the_hostile_objects_would_work_if_run",
                "test_hostile_objects_are_never_executed",
                "test_raw_programs_are_never_executed_and_change_nothing",
                "test_huge_declared_sizes_are_refused",
                "test_damaged_files_raise_only_our_error",
            ),
            *_of(
                "unit/test_structure.py",
                "test_file_keeps_the_rules",
                "test_the_safety_rule_can_fail",
            ),
        ),
    ),
    Row(
        "malformed configurations and overrides",
        "mutated yaml files and KEY VALUE pairs; _BASE_ cycles, alias bombs, 5,000 nested brackets, python "
        "files; names that are no folder name",
        _of(
            _FUZZ,
            "test_ten_thousand_files",
            "test_ten_thousand_overrides",
            "test_cycles_bombs_and_code_are_refused",
            "test_no_tag_or_name_leaves_the_output_folder",
        ),
    ),
    Row(
        "another configuration on resume",
        "every key of the tree is flipped for each of the four programs",
        _of(
            "unit/test_config_resume.py",
            "test_every_key_has_exactly_one_class",
            "test_changing_a_key_on_resume_does_what_its_class_says",
        ),
    ),
    Row(
        "the data set has changed",
        "a file is renamed, added, removed between two starts",
        _of(_ERRORS, "test_a_changed_data_set_is_refused"),
    ),
    Row(
        "two jobs in one folder",
        "a second start while the first trains, a third after kill -9 of the first",
        _of(_ERRORS, "test_one_folder_one_run"),
    ),
    Row(
        "several ranks write",
        "an audit hook on every open, rename and removal of each rank",
        _of("robust/test_one_writer.py", "test_only_rank_0_writes"),
    ),
    Row(
        "out of memory",
        "torch's error raised in a step",
        _of(_ERRORS, "test_out_of_memory_names_the_remedy"),
    ),
    Row(
        "collapse of the representation",
        "broken variants of the methods against healthy ones",
        ("unit/test_collapse.py",),
    ),
    Row(
        "uneven evaluation shards",
        "101 images on two processes in batches of eight",
        (
            *_of(
                "robust/test_uneven_shards.py",
                "test_accuracy_of_uneven_shards_is_that_of_one_process",
            ),
            *_of("unit/test_evaluate.py", "test_uneven_shards_give_the_single_process_numbers"),
        ),
    ),
    Row(
        "an odd place",
        "umask 077, C locale, another time zone, blanks and umlauts in the path, a linked output folder, "
        "read-only images",
        _of("robust/test_odd_places.py", "test_a_run_in_an_odd_place"),
    ),
    Row(
        "a leak",
        "20,000 steps of the engine with logs, checkpoints, TensorBoard and evaluations, on one process",
        _of("robust/test_long_run.py", "test_twenty_thousand_steps_without_growth"),
    ),
    Row(
        "weights that hang a reader or take memory",
        "files of a few hundred bytes that declare gigabytes, nest, repeat calls or loop; safetensors "
        "with untrue sizes; the bytes that are copied are counted; all under a limit of memory",
        (
            *_of(
                "robust/test_hostile_weights.py",
                "test_small_files_neither_hang_nor_take_memory",
                "test_safetensors_are_read_in_proportion_to_their_size",
                "test_safetensors_whose_sizes_are_untrue_are_refused",
            ),
            *_of(
                "robust/test_hostile_calls.py",
                "test_a_call_that_is_repeated_does_not_multiply_its_arguments",
            ),
            *_of(
                "robust/test_foreign.py", "test_compressed_archives_are_refused_before_they_unpack"
            ),
        ),
    ),
    Row(
        "images that start programs or never end",
        "an EPS named .jpg, formats outside the list, JPEGs of thousands of scans, huge tiles in a small "
        "TIFF, more pixels than DATA.MAX_PIXELS, files far larger than their pixels, deep images",
        (
            *_of(
                "data/test_decode.py",
                "test_an_eps_starts_no_program",
                "test_other_formats_are_refused",
                "test_jpegs_of_more_than_100_scans_are_refused",
                "test_scans_cannot_be_hidden_from_the_count",
                "test_a_small_tiff_of_a_huge_tile_is_refused",
                "test_images_of_too_many_pixels_are_refused_from_their_header",
                "test_deep_images_are_refused_not_clipped",
            ),
            *_of(
                "data/test_bad_images.py",
                "test_deep_images_are_named_and_replaced",
                "test_images_above_max_pixels_are_named_and_replaced",
                "test_no_batch_is_empty",
            ),
        ),
    ),
    Row(
        "an odd image folder",
        "folders without permission, links in circles and to one folder twice, FIFOs and devices, what "
        "systems leave behind, a class that val lacks, unknown extensions",
        ("data/test_odd_folders.py",),
    ),
    Row(
        "a damaged or hostile archive or pack",
        "damaged, cut and oversized entries, in every cache mode; other labels in val; odd headers and "
        "indexes of a pack; files that are cut while they are mapped",
        (
            "data/test_archives.py",
            *_of(
                "data/test_packed.py",
                "test_an_odd_header_is_one_clear_error",
                "test_a_header_of_nested_lists_is_one_clear_error",
                "test_an_odd_index_is_one_clear_error",
                "test_no_flipped_bit_goes_unnoticed",
                "test_a_pack_that_is_cut_while_in_use_ends_no_process",
            ),
            *_of(
                "unit/test_feature_cache.py",
                "test_features_that_are_cut_while_in_use_end_no_process",
            ),
        ),
    ),
    Row(
        "an evaluation that fails, a kill around it",
        "k-NN raises at the end of an epoch; killed before and after each write around an evaluation "
        "and while later checkpoints are set aside; the logged means after a resume",
        ("resume/test_evaluations.py",),
    ),
    Row(
        "records and locks that are not as they should be",
        "records of megabytes, with odd steps or odd values; file systems without locks; a lock file "
        "that vanishes under a running job",
        (
            *_of(
                _CHECKPOINT,
                "test_a_record_of_megabytes_is_no_record",
                "test_a_record_with_an_odd_step_is_no_record",
                "test_a_sealed_record_that_replaces_something_odd_is_passed_over",
                "test_only_numbers_of_a_record_are_an_evaluation",
            ),
            *_of(
                "unit/test_run.py",
                "test_a_file_system_without_locks_is_a_warning",
                "test_a_lock_that_vanished_is_noticed_before_anything_is_written",
                "test_a_lock_that_fails_otherwise_is_an_error_in_its_own_words",
                "test_an_evaluation_is_not_noted_where_the_lock_vanished",
            ),
            *_of(
                "unit/test_feature_cache.py",
                "test_a_file_system_without_locks_is_said_and_waits_for_nobody",
            ),
            "resume/test_resume_file.py",
        ),
    ),
    Row(
        "one head of a grid diverges",
        "a probe with a learning rate far too high beside good ones, resumed, and alone; a sweep whose "
        "point diverges",
        (
            *_of(
                "e2e/test_probe_grid.py",
                "test_a_diverging_head_is_closed_and_leaves_the_others_alone",
                "test_a_grid_with_a_closed_head_resumes_bit_identically",
                "test_a_grid_whose_heads_all_diverge_stops",
            ),
            *_of("unit/test_sweep.py", "test_a_point_that_diverged_has_lost"),
        ),
    ),
    Row(
        "odd names and encodings",
        "names with escapes, newlines and bytes that are no UTF-8, names that lead to other folders, "
        "lists with byte order marks and in other encodings, cells that begin with =",
        (
            "unit/test_names.py",
            "unit/test_reading.py",
            *_of(
                "unit/test_logger.py",
                "test_a_name_is_one_visible_line_on_terminal_and_file",
                "test_a_traceback_keeps_its_lines_but_no_control_characters",
            ),
            *_of("unit/test_sweep.py", "test_no_cell_is_a_formula_or_two_cells"),
        ),
    ),
    Row(
        "closed outputs, a failing TensorBoard",
        "standard output or error closed, a closed pipe, a full disk below standard output, TensorBoard "
        "that fails on import or while it writes",
        (
            "unit/test_streams.py",
            *_of("robust/test_odd_places.py", "test_a_run_without_standard_output_and_error"),
            *_of(
                "unit/test_logger.py",
                "test_a_closed_standard_error_is_no_reason_to_stop",
                "test_a_tensorboard_that_fails_in_any_way_is_one_warning",
            ),
        ),
    ),
    Row(
        "limits of the machine",
        "/dev/shm too small for the loader's workers, a batch that cannot be sent, a tensor larger than "
        "the memory",
        (
            *_of(
                "data/test_bad_images.py",
                "test_a_batch_that_cannot_be_sent_is_noticed_before_the_time_is_out",
                "test_shared_memory_too_small_for_the_workers_is_refused_before_they_start",
                "test_an_error_in_a_worker_is_one_line",
            ),
            *_of(_ERRORS, "test_a_tensor_too_large_for_the_memory_of_a_cpu_is_out_of_memory"),
        ),
    ),
)

NOT_TESTED = (
    "NCCL: its watchdog, time-outs and flight recorder; SyncBatchNorm of CUDA; pinned memory; CUDA's "
    "out-of-memory. All ranks of this page are gloo processes on CPUs.",
    "Mixed precision on a GPU. The gradient scaler's state is tested with fp16 on a CPU.",
    "Power loss. fsync is called on files and folders before and after the rename, a kill at each call is "
    "survived; what a disk does without power was not observed.",
    "Network file systems: their rename and their locks.",
    "A real Slurm. Its signals are sent by hand.",
    "More than four processes, more than one machine.",
    "Hours. The longest run of this page has 20,000 steps.",
)
