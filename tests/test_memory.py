"""--estimate_memory: counts worked out by hand, the command, its mistakes, and the printed tables of docs/memory.md."""

import contextlib
import importlib.util
import io
import json
import os
import re
import resource
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from memory_cases import EMBEDDING, LAYER, LLAMA_8B, NORM, ROOT, SMALL, TOTAL, case, row
from transformers import Adafactor, AutoModelForCausalLM, LlamaConfig, TrainingArguments

from llm_unlearn.cli.unlearn import main
from llm_unlearn.memory.activations import activations
from llm_unlearn.memory.estimate import estimate
from llm_unlearn.memory.live_bytes import LiveBytes
from llm_unlearn.memory.optimizers import optimizer_memory
from llm_unlearn.memory.reading import make_case
from llm_unlearn.memory.request import split_request
from llm_unlearn.memory.shell import sizes_of
from llm_unlearn.models import load_model, quantization_config, with_lora
from llm_unlearn.parsing import parse

PAGE = (ROOT / "docs/memory.md").read_text(encoding="utf-8")


pytestmark = pytest.mark.usefixtures("one_cpu_process")


# ---- Parameters, gradients, optimizer: by hand ----


def test_small_llama_by_hand():
    found = estimate(case("--optim", "adamw_torch"))
    assert (found.sizes.total, found.sizes.trained, found.sizes.embeddings) == (TOTAL, TOTAL, 2 * EMBEDDING)
    inverse_frequencies = 2 * 4 * 8  # two float32 buffers of half a head
    assert row(found, "weights") == (4 * TOTAL + inverse_frequencies,) * 3
    assert row(found, "gradients") == (0, 4 * TOTAL, 4 * TOTAL)
    assert row(found, "optimizer") == (8 * TOTAL,) * 3


def test_tied_embeddings_count_once():
    found = sizes_of(case(tie_word_embeddings=True))
    assert (found.total, found.embeddings) == (TOTAL - EMBEDDING, EMBEDDING)


def test_lora_by_hand():
    found = estimate(case("--use_peft", "True", "--lora_r", "8", "--dtype", "bfloat16"))
    adapters = 5 * 8 * ((64 + 64) + (64 + 32))  # q_proj and v_proj
    assert (found.sizes.trained, found.sizes.total) == (adapters, TOTAL + adapters)
    assert found.sizes.by_dtype == {"bfloat16": 2 * TOTAL, "float32": 4 * adapters + 2 * 4 * 8}
    assert row(found, "gradients")[1] == 4 * adapters
    assert row(found, "optimizer") == (8 * adapters,) * 3
    assert row(found, "reference") == (0,) * 3


@pytest.mark.parametrize(("nested", "scales"), [(False, 4 / 64), (True, 1 / 64 + 4 / 64 / 256)])
def test_four_bits_by_hand(nested, scales):
    quantized, rest = 5 * (LAYER - 2 * 64), 2 * EMBEDDING + 11 * 64
    flags = ["--use_peft", "True", "--load_in_4bit", "True", "--use_bnb_nested_quant", nested, "--dtype", "bfloat16"]
    found = sizes_of(case(*flags))
    # What is not quantized becomes float32 in peft's prepare_model_for_kbit_training; adapters and buffers are too.
    assert found.by_dtype["float32"] == 4 * rest + 4 * found.trained + 2 * 4 * 8
    assert found.by_dtype["uint8"] == pytest.approx(quantized * (0.5 + scales), rel=1e-2)
    assert found.total == TOTAL + found.trained


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("nested", ["False", "True"])
@pytest.mark.parametrize("flags", [[], ["--dtype", "bfloat16", "--bf16", "True"]], ids=" ".join)
def test_four_bits_against_bitsandbytes(flags, nested, monkeypatch):
    import bitsandbytes

    # bitsandbytes 0.50 repacks the weights of a CPU with this instruction set for inference, without a gradient.
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: False)
    found = case("--use_peft", "True", "--load_in_4bit", "True", "--use_bnb_nested_quant", nested, *flags)
    AutoModelForCausalLM.from_config(found.source.config).save_pretrained("model")
    loaded = load_model("model", found.source.flags.dtype, quantization_config=quantization_config(found.lora_flags()))
    model = with_lora(loaded, found.lora_flags()).train()
    states = [m.weight.quant_state for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    scales = [scale for state in states for scale in (state.absmax, *([state.state2.absmax] if state.nested else []))]
    known = [*model.parameters(), *model.buffers(), *scales]
    assert sizes_of(found).weight_bytes == sum(tensor.numel() * tensor.element_size() for tensor in known)
    mask = torch.ones(found.rows, found.width, dtype=torch.long)
    mask[0, -3:] = 0
    with LiveBytes(known) as live, torch.autocast("cpu", torch.bfloat16, enabled=found.autocast is not None):
        hidden = model.get_base_model().base_model(
            input_ids=torch.ones_like(mask), attention_mask=mask, use_cache=False
        )
    assert activations(found).kept == pytest.approx(live.live, rel=0.01)
    assert hidden[0].requires_grad


SHAPES = (((512, 64), torch.float32, True), ((100, 64), torch.float32, False), ((64,), torch.float32, False))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("adamw_torch", 8 * (512 * 64 + 6400 + 64)),
        ("adamw_torch_fused", 8 * (512 * 64 + 6400 + 64)),
        ("sgd", 0),
        ("rmsprop", 4 * (512 * 64 + 6400 + 64)),
        ("adafactor", 4 * (512 + 64 + 100 + 64 + 64)),
        # The embedding and what is smaller than 4096 numbers keep 32 bits; 6400 / 256 = 25 scales.
        ("adamw_bnb_8bit", 2 * 4 * (512 * 64 + 64) + 2 * (6400 + 25 * 4)),
        ("paged_adamw_8bit", 2 * 4 * (512 * 64 + 64) + 2 * (6400 + 25 * 4)),
        ("lion_8bit", 4 * (512 * 64 + 64) + 6400 + 25 * 4),
        ("paged_adamw_32bit", 8 * (512 * 64 + 6400 + 64)),
        ("lion_32bit", 4 * (512 * 64 + 6400 + 64)),
        ("lomo", 0),
    ],
)
def test_optimizer_states(name, expected):
    found = optimizer_memory(name, TrainingArguments(output_dir="x", use_cpu=True), SHAPES, "cuda")
    assert found.state == pytest.approx(expected)
    assert (found.is_known, found.is_paged) == (True, "paged" in name)


def test_momentum_comes_from_optim_args_and_unknown_names_are_said():
    args = TrainingArguments(output_dir="x", use_cpu=True, optim_args="momentum=0.9")
    assert optimizer_memory("sgd", args, SHAPES, "cpu").state == 4 * (512 * 64 + 6400 + 64)
    unknown = optimizer_memory("galore_adamw", args, SHAPES, "cpu")
    assert (unknown.is_known, unknown.state) == (False, 8 * (512 * 64 + 6400 + 64))
    assert "8 bytes" in " ".join(estimate(case("--optim", "galore_adamw")).notes)


def test_adafactor_against_its_own_state():
    weights = [torch.nn.Parameter(torch.zeros(shape)) for shape, _, _ in SHAPES]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer = Adafactor(weights, lr=1e-3, scale_parameter=False, relative_step=False)
    optimizer.step()
    held = [v for state in optimizer.state.values() for v in state.values() if torch.is_tensor(v) and v.dim()]
    found = optimizer_memory("adafactor", TrainingArguments(output_dir="x", use_cpu=True), SHAPES, "cpu")
    assert found.state == sum(value.numel() * 4 for value in held)


def test_updating_all_weights_at_once_takes_memory():
    args = TrainingArguments(output_dir="x", use_cpu=True)
    shapes = (((128, 64), torch.float32, False),) * 20
    at_once, one_by_one = (optimizer_memory("adamw_torch", args, shapes, device) for device in ("cuda", "cpu"))
    assert at_once.step == pytest.approx(4 * 20 * 128 * 64, rel=0.01)
    assert one_by_one.step <= 3 * 4 * 128 * 64
    assert optimizer_memory("adamw_torch_fused", args, shapes, "cuda").step < 1000


# ---- Sharding: by hand ----


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ([], (1, 1, 1)),
        (["--fsdp", "full_shard auto_wrap"], (4, 4, 4)),
        (["--fsdp", "shard_grad_op"], (4, 4, 4)),
        (["--deepspeed", str(ROOT / "ds_configs/zero1.json")], (1, 1, 4)),
        (["--deepspeed", str(ROOT / "ds_configs/zero2.json")], (1, 4, 4)),
        (["--deepspeed", str(ROOT / "ds_configs/zero3.json")], (4, 4, 4)),
    ],
)
def test_what_is_divided_by_the_processes(flags, parts):
    found = estimate(case(*flags, asked="4x24"))
    whole = sizes_of(found.case)
    master = 4 * TOTAL / 4 if "--deepspeed" in flags else 0
    assert row(found, "weights")[0] == whole.weight_bytes / parts[0]
    assert row(found, "gradients")[2] == 4 * TOTAL / parts[1]
    assert row(found, "optimizer")[0] == 8 * TOTAL / parts[2] + master


def test_gathers_and_buckets():
    alone, ddp, fsdp, grad_op, zero2, zero3 = (
        row(estimate(case("--bf16", "True", *flags, asked=asked)), "gathered, buffers")
        for asked, flags in (
            ("24", []),
            ("4x24", []),
            ("4x24", ["--fsdp", "full_shard"]),
            ("4x24", ["--fsdp", "shard_grad_op"]),
            ("4x24", ["--deepspeed", str(ROOT / "ds_configs/zero2.json")]),
            ("4x24", ["--deepspeed", str(ROOT / "ds_configs/zero3.json")]),
        )
    )
    assert alone == (0, 0, 0)
    assert ddp == (4 * TOTAL,) * 3
    root = 4 * (2 * EMBEDDING + NORM) + 64
    assert fsdp[0] == (root + 2 * 4 * LAYER) / 2
    assert grad_op[0] == (4 * TOTAL + 64) / 2
    assert zero2 == (0, 2 * 5e8 * 4, 0)
    assert zero3[0] == 4 * TOTAL + 64 + 5e8 * 4


def test_offload_leaves_the_device():
    found = estimate(case("--deepspeed", ROOT / "ds_configs/zero3_offload.json", asked="2x24"))
    assert row(found, "weights") == row(found, "optimizer") == (0, 0, 0)
    assert found.host == pytest.approx((4 + 4 + 8 + 4) * TOTAL / 2, rel=1e-3)


# ---- Reference ----


@pytest.mark.parametrize(
    ("flags", "mode", "held"),
    [
        ([], "cached", 0),
        (["--retain_loss", "kl"], "cached", 4 * EMBEDDING),
        (["--retain_loss", "kl", "--bf16", "True"], "cached", 2 * EMBEDDING),
        (["--reference", "live"], "live", 4 * TOTAL + 64),
        (["--use_peft", "True", "--retain_loss", "kl"], "adapter_off", 0),
    ],
)
def test_reference_modes(flags, mode, held):
    found = estimate(case(*flags))
    assert (found.case.reference_mode, row(found, "reference")[0]) == (mode, held)


def test_methods_without_a_reference_and_their_streams():
    assert case(method="gradient_ascent").reference_mode == "none"
    assert case(method="gradient_ascent").streams == (("forget", 8),)
    assert case("--positive_ratio", 3, method="ascent_plus_descent").streams == (("forget", 8), ("retain", 24))
    assert case("--retain_weight", 0).streams == (("forget", 8),)
    assert (case().rows, case("--sequential_backward", "True").rows) == (16, 8)


# ---- The command ----


def command(*flags):
    return ["--unlearn_method", "npo", "--target_model_name_or_path", "model", "--max_length", "64", *flags]


@pytest.mark.parametrize(("asked", "verdict"), [("24", "fits: "), ("0.5", "does not fit: "), ("True", "fits: ")])
def test_the_command_prints_and_writes_nothing(asked, verdict, capsys):
    LlamaConfig(**SMALL).save_pretrained("model")
    assert main([*command("--domain", "tofu", "--output_dir", "out"), "--estimate_memory", asked]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith(verdict)
    assert ("computes the same" in "\n".join(lines)) == (verdict != "fits: ")
    assert os.listdir() == ["model"]


def test_a_config_asks_too_and_keeps_its_backend(capsys):
    LlamaConfig(**SMALL).save_pretrained("model")
    config = {"unlearn_method": "npo", "target_model_name_or_path": "model", "max_length": 64, "fsdp": "full_shard"}
    Path("recipe.yaml").write_text(json.dumps({**config, "estimate_memory": "2x24"}), encoding="utf-8")
    assert main(["--config", "recipe.yaml"]) == 0
    assert "2 processes FSDP2" in capsys.readouterr().out


def test_no_estimate_leaves_the_words_alone():
    for words in (command("--estimate_memory", "False"), command("--max_steps", "1")):
        assert split_request(words)[:2] == (None, words)
    request, words, _ = split_request(command("--estimate_memory", "--fsdp=full_shard", "--estimate-memory=8x80"))
    assert (request.processes, request.device_bytes, words) == (8, 80e9, command())


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--estimate_memory", "much"], "--estimate_memory must be True, the gigabytes of a device (24) or"),
        (["--estimate_memory", "0"], None),
        (["--estimate_memory", "0x24"], "--estimate_memory must be True"),
        (["--estimate_memory", "24", "--target_model_name_or_path", "./none"], "the model folder './none' does not"),
        (["--estimate_memory", "24", "--load_in_4bit", "True"], "--load_in_4bit has no effect without --use_peft"),
        (["--estimate_memory", "2x24", "--fsdp", "sharded"], "unknown --fsdp option 'sharded'"),
        (["--estimate_memory", "2x24", "--fsdp", "full_shard", "--deepspeed", "x.json"], "exclude each other"),
        (["--estimate_memory", "2x24", "--deepspeed", "x.json"], "configuration file 'x.json' does not exist"),
        (["--estimate_memory", "24", "--max_length", "512"], "beyond the model's context of 256 tokens"),
        (["--estimate_memory", "24", "--lora_target_modules", "none", "--use_peft", "True"], "LoRA cannot wrap"),
        (["--estimate_memory", "24", "--bta", "1"], "unknown flag '--bta'"),
    ],
)
def test_mistakes_are_one_sentence(flags, reason, capsys):
    LlamaConfig(**SMALL).save_pretrained("model")
    if reason is None:
        assert split_request(command(*flags))[0] is None
        return
    assert main(command(*flags)) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert reason in said


def test_a_broken_config_is_one_sentence(capsys):
    Path("model").mkdir()
    Path("model/config.json").write_text('{"model_type": "llama", "hidden_size": 65, "num_attention_heads": 4}')
    assert main(command("--estimate_memory", "24")) == 2
    assert "model" in capsys.readouterr().err.strip().splitlines()[-1]


def test_the_longest_row_of_local_data(tiny_world, capsys):
    words = ["--unlearn_method", "npo", "--target_model_name_or_path", tiny_world["model"], "--domain", "custom"]
    words += ["--forget_data", tiny_world["forget"], "--retain_data", tiny_world["retain"], "--estimate_memory", "24"]
    request, rest, _ = split_request(words)
    found = make_case(parse(rest), request)
    assert found.source.width_from == "the longest row of the data"
    assert found.width < 512 and found.width % 8 == 0


# ---- docs/memory.md ----

EXAMPLES = re.findall(r"```bash\n(python run_unlearn\.py [^\n]+)\n```\n+```text\n(.*?)\n```", PAGE, re.DOTALL)


def test_the_page_has_the_targets():
    assert len(EXAMPLES) >= 3


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_printed_tables_of_the_page(number):
    words, printed = EXAMPLES[number]
    Path("Llama-3.1-8B").mkdir()
    Path("Llama-3.1-8B/config.json").write_text(json.dumps({**LLAMA_8B, "model_type": "llama"}), encoding="utf-8")
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main(shlex.split(words)[2:]) == 0
    made, expected = (re.sub(r"-{3,}|\s+", " ", text).strip() for text in (out.getvalue(), printed))
    number = r"\d+\.\d+"
    assert re.sub(number, "#", made) == re.sub(number, "#", expected)
    # Other versions of the libraries keep a little more or less.
    assert [float(n) for n in re.findall(number, made)] == pytest.approx(
        [float(n) for n in re.findall(number, expected)], rel=0.03, abs=0.05
    )


def test_an_8b_model_takes_seconds_and_little_memory():
    Path("Llama-3.1-8B").mkdir()
    Path("Llama-3.1-8B/config.json").write_text(json.dumps({**LLAMA_8B, "model_type": "llama"}), encoding="utf-8")
    words = [str(ROOT / "run_unlearn.py"), *shlex.split(EXAMPLES[0][0])[2:]]
    run = subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=".")
    assert run.returncode == 0, run.stderr
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 1.5e6  # kilobytes; most of it are the libraries
