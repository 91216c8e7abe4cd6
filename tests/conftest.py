"""Fixtures that several test files share."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")


@pytest.fixture
def one_cpu_process(monkeypatch, tmp_path):
    """One process without an accelerator, wherever the tests run, in an empty folder."""
    import torch

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def shared_data():
    """The folder with real data beside the project, or a skip that says so."""
    folder = Path(os.environ.get("LLM_UNLEARN_TEST_DATA", Path(__file__).parents[1].parent / "shared/data"))
    if not folder.is_dir():
        pytest.skip(f"real data is absent ({folder}); set LLM_UNLEARN_TEST_DATA")
    return folder


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory):
    """Paths of the small untrained model and the ragged rows of tiny_world.py."""
    from tiny_world import make_tiny_world

    return make_tiny_world(tmp_path_factory.mktemp("tiny_world"))


@pytest.fixture(scope="session")
def start_weights(tiny_world):
    """The tensors from which every run on the tiny world starts."""
    from tiny_world import weights

    return weights(tiny_world["model"])


@pytest.fixture(scope="session")
def sums(tmp_path_factory):
    """Two files of ragged sums, 7 rows and 6."""
    import json
    import random

    numbers, paths = random.Random(0), []
    for name, count in (("sums", 7), ("more", 6)):
        rows = []
        for _ in range(count):
            first, second = numbers.randrange(90), numbers.randrange(90)
            answer = f"{first} plus {second} is {first + second}. " * numbers.randint(1, 4)
            rows.append({"question": f"What is {first} plus {second}?", "answer": answer.strip()})
        path = tmp_path_factory.mktemp("sums") / f"{name}.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        paths.append(str(path))
    return paths


@pytest.fixture(scope="session")
def story_tokenizer(shared_data):
    """Llama tokenizer of 512 pieces with byte fallback; it writes <s> first."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(shared_data / "models" / "stories260K-hf")


@pytest.fixture(scope="session")
def demo_tokenizer():
    """Byte-level BPE trained on the demo world: no BOS, no chat template; set either on a copy."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from llm_unlearn.data.synthetic import corpus, make_world

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=800,
        special_tokens=["<s>", "</s>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(make_world(0)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )


LONG = {
    "test_sequential_backward.py::test_the_update_is_that_of_the_joint_backward": ("[npo_kl-", "[ascent_plus_descent-"),
    "test_sequential_backward.py::test_a_micro_batch_is_one_forward_of_the_policy": ("-full]", "[npo-lora]"),
    "test_sequential_backward.py::test_on_two_processes": (),
    "test_generation.py::test_on_tofu": (),
    "test_interruption.py::test_an_interrupted_run_continues_as_if_nothing_had_happened": ("-0]", "-1]"),
    "test_memory.py::test_printed_tables_of_the_page": ("[0]",),
    "test_distributed.py::test_the_full_suite_during_training_scores_sharded_models_alike": ("zero3", "fsdp"),
    "test_memory_measured.py": (),
    "test_harness.py::test_zero_shot_is_the_list_of_soul": (),
    "test_harness.py::test_two_processes_equal_one": (),
    "test_harness_tasks.py::test_our_arithmetic_equals_lm_eval_on_mmlu": (),
    "test_training_benchmarks.py::test_training_pads_little_on_tofu": (),
    "test_training_benchmarks.py::test_flops_of_a_run_are_those_of_its_computed_steps": (),
    "test_training_benchmarks.py::test_steps_cost_what_the_table_of_the_specification_says": (),
    "test_elements_stack.py": (),
    "test_run_eval_two_processes.py": (),
    "test_harness.py::test_mistakes_are_said_before_anything_is_scored": (),
    "test_sophia.py::test_two_processes_equal_one": (),
    "test_benchmarks.py::test_the_benchmark_of_passes_agrees_with_the_suite_and_counts_both": (),
    "test_sequential.py::test_an_interrupted_sequence_goes_on": (),
    "test_distributed.py::test_torchrun_does_what_forked_ranks_do": (),
    "test_distributed.py::test_two_processes_equal_one": ("[npo_kl-", "[lora-fsdp2]", "[adamw-zero3]"),
    "test_distributed.py::test_the_seven_published_commands_under_fsdp2": ("[gradient_ascent]", "divergence --general"),
    "test_distributed.py::test_bf16_computes_policy_and_reference_alike": ("[fsdp2]", "[zero3]"),
    "test_distributed.py::test_a_diverging_run_stops_on_every_rank_and_saves_nothing": ("[fsdp2]", "[zero3]"),
    "test_distributed.py::test_resume_on_two_processes_is_bit_equal": ("[fsdp2]", "[zero3]"),
    "test_early_stop.py::test_two_processes_equal_one_on_every_backend": ("[fsdp2]",),
    "test_reference_cache.py::test_two_processes_make_the_cache_of_one": ("[fsdp2]",),
    "test_resume_elsewhere.py::test_fsdp2_on_two_continues_on_four": (),
    "test_resume_elsewhere.py::test_a_sharded_fsdp2_run_is_stopped_by_sigterm_and_continues_on_four": (),
    "test_truncated_training.py::test_two_ranks_train_the_truncated_model_and_save_the_whole": ("[fsdp2-gpt2]",),
    "test_demo.py::test_demo": (),
    "test_downstream.py::test_two_tasks_from_the_same_start": (),
    "test_interruption.py::test_the_loaders_workers_live_on_when_the_whole_group_is_told": (),
    "test_memory.py::test_an_8b_model_takes_seconds_and_little_memory": (),
    "test_resume_elsewhere.py::test_the_averages_of_adamw_follow_under_fsdp2": (),
    "test_sequential_layers.py::test_two_processes_equal_one_and_hold_the_other_layers_still": (),
    "test_tamper_sweeps.py::test_a_killed_sweep_goes_on": (),
}
"""{test, or file: the cases of it that `make test` runs}: what takes longest, and that smaller cases tell too."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Leave the longest cases to `make test-full`."""
    for item in items:
        for name in (item.path.name, f"{item.path.name}::{getattr(item, 'originalname', '')}"):
            if name in LONG and not any(kept in item.nodeid for kept in LONG[name]):
                item.add_marker(pytest.mark.full)


def pytest_terminal_summary(terminalreporter):
    """Say by how much each backend differed from one process at most (test_matrix.py)."""
    worst = {}
    for report in (report for reports in terminalreporter.stats.values() for report in reports):
        for name, value in getattr(report, "user_properties", ()):
            if name == "deviation" and getattr(report, "when", None) == "call":
                backend, what, deviation = value
                worst[backend, what] = max(deviation, worst.get((backend, what), 0.0))
    for (backend, what), deviation in sorted(worst.items()):
        terminalreporter.write_line(f"worst deviation of {backend}, {what}: {deviation:.1e}")
