"""What benchmarks run on: a model and rows that are given, or made on the spot without network."""

import dataclasses
import json
from pathlib import Path

import torch

from llm_unlearn.arguments import DataFlags
from llm_unlearn.cli.demo import make_base_model
from llm_unlearn.data.splits import load_split
from llm_unlearn.data.synthetic import write_world
from llm_unlearn.errors import UserError
from llm_unlearn.evaluation.benchmarks import load_parts
from llm_unlearn.models import load_model, load_tokenizer

LAYERS, HIDDEN, HEAD, CONTEXT = 8, 256, 32, 1024
_ENDS = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>")


def load_subject(model, tokenizer, folder):
    """Return (model, tokenizer), on the CPU in float32.

    Args:
        model: folder of a model with its tokenizer; None makes a Llama with random weights.
        tokenizer: tokenizer.json of the random model; None takes the demo world's.
        folder: for temporary files.
    Raises:
        UserError: a model or a file that cannot be read.
    """
    if model:
        return load_model(model), load_tokenizer(model)
    wrapped = load_tokenizer_alone(tokenizer, folder)
    return random_llama(wrapped), wrapped


def load_tokenizer_alone(path, folder):
    """Return a tokenizer without a model.

    Args:
        path: tokenizer.json; None makes the demo world's.
        folder: for temporary files.
    """
    if path:
        return _tokenizer_of(Path(path))
    make_base_model(folder, 0)
    return load_tokenizer(folder)


def random_llama(tokenizer, hidden_size=HIDDEN, **changes):
    """Return a Llama of 8 layers with random weights: at hidden size 256 21 million with the vocabulary of GPT-2.

    Args:
        tokenizer: gives the vocabulary.
        hidden_size: D.
        **changes: further fields of its config.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    fields = {
        "vocab_size": len(tokenizer), "intermediate_size": 4 * hidden_size, "num_hidden_layers": LAYERS,
        "num_attention_heads": max(1, hidden_size // HEAD), "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": True, "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(hidden_size=hidden_size, **fields | changes))


def _tokenizer_of(path):
    from transformers import PreTrainedTokenizerFast

    try:
        added = json.loads(path.read_text(encoding="utf-8"))["added_tokens"]
        special = [token["content"] for token in added if token["special"]]
        end = next((name for name in special if name in _ENDS), special[0])
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise UserError(f"--tokenizer '{path}' is no tokenizer.json with a special token") from error
    return PreTrainedTokenizerFast(tokenizer_file=str(path), eos_token=end)


def load_tofu(data_dir, forget_split, holdout_data, max_eval_samples, folder):
    """Return (parts, missing) of TOFU, see `benchmarks.load_parts`; invented authors where there is no data_dir.

    Args:
        data_dir: TOFU's files; None writes the demo world to `folder`.
        forget_split: forget01, forget05 or forget10.
        holdout_data: file of unseen rows, or None.
        max_eval_samples: rows of each set at most, or None.
        folder: for temporary files.
    """
    if not data_dir:
        write_world(folder)
    data = DataFlags(
        domain="tofu", data_dir=data_dir or folder, forget_split=forget_split, holdout_data=holdout_data,
        max_eval_samples=max_eval_samples,
    )  # fmt: skip
    return load_parts(data)


def load_training_rows(data_dir, forget_split, folder):
    """Return {"forget": rows, "retain": rows} of TOFU's training sets; invented authors where there is no data_dir.

    Args:
        data_dir: TOFU's files; None writes the demo world to `folder`.
        forget_split: forget01, forget05 or forget10; the retain set is what is left. The demo world has one split.
        folder: for temporary files.
    """
    if not data_dir:
        write_world(folder)
        forget_split = "forget01"
    data = DataFlags(domain="tofu", data_dir=data_dir or folder, forget_split=forget_split)
    return {name: load_split(name, data).rows for name in ("forget", "retain")}


def first_rows(parts, count):
    """Return the parts with their first rows only."""
    return [dataclasses.replace(part, rows=part.rows[:count]) for part in parts]
