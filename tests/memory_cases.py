"""Models of which there is nothing but a config, and the Case of a command line on one of them."""

from pathlib import Path

from transformers import LlamaConfig

from llm_unlearn.memory.reading import make_case
from llm_unlearn.memory.request import split_request, write_config
from llm_unlearn.parsing import parse

ROOT = Path(__file__).parents[1]
SMALL = {
    "hidden_size": 64, "num_hidden_layers": 5, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 128, "vocab_size": 512, "max_position_embeddings": 256, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA_8B = {
    **SMALL, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "intermediate_size": 14336, "vocab_size": 128256, "max_position_embeddings": 131072,
}  # fmt: skip
EMBEDDING, LAYER, NORM = 512 * 64, 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128 + 2 * 64, 64
TOTAL = 2 * EMBEDDING + 5 * LAYER + NORM  # 250,560


def case(*flags, method="npo", asked="24", **config):
    """Return the Case of a command line on a model of which there is nothing but its config."""
    LlamaConfig(**{**SMALL, **config}).save_pretrained("model")
    words = ["--unlearn_method", method, "--target_model_name_or_path", "model", "--max_length", "64"]
    request, words, rest = split_request([*words, "--estimate_memory", asked, *map(str, flags)])
    return make_case(parse([*words, *write_config(rest, ".")]), request)


def row(found, name):
    return found.rows[name]
