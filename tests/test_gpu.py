"""What needs a CUDA device: bf16 and tf32 for real, and 4-bit weights under LoRA. Skipped elsewhere."""

import json

import pytest
import torch
from tiny_world import command, terms

from llm_unlearn.cli.unlearn import main

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def test_bf16_and_tf32_run_on_the_device(tiny_world, tmp_path):
    words = command(tiny_world, "npo", tmp_path / "out", "--retain_loss", "kl", "--bf16", "True", "--tf32", "True")
    assert main(words) == 0
    record = json.loads((tmp_path / "out/unlearning.json").read_text())
    assert record["backend"]["device"] == "cuda" and record["flags"]["tf32"] is True
    assert terms(tmp_path / "out")[0]["loss/forget"] == pytest.approx(13.8629, abs=0.01)


def test_four_bit_lora(tiny_world, tmp_path):
    pytest.importorskip("bitsandbytes")
    words = command(tiny_world, "npo", tmp_path / "out", "--use_peft", "True", "--load_in_4bit", "True")
    assert main(words) == 0
    assert (tmp_path / "out/adapter_model.safetensors").is_file()
