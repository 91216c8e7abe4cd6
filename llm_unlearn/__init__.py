"""LLM unlearning as Hugging Face Trainer subclasses; importing this package does not import torch."""

import importlib

__version__ = "0.1.0"

_LAZY = {
    "METHODS": "llm_unlearn.methods",
    "trainer_class": "llm_unlearn.methods",
    "UnlearnArguments": "llm_unlearn.training_arguments",
    "RetainArguments": "llm_unlearn.training_arguments",
    "UnlearnTrainer": "llm_unlearn.trainer",
    "UnlearnDataset": "llm_unlearn.data.streams",
    "UnlearnCollator": "llm_unlearn.data.streams",
    "UserError": "llm_unlearn.errors",
    "NonFiniteError": "llm_unlearn.errors",
}


def __getattr__(name):
    """Resolve the public names on first use (PEP 562), trainers and their arguments by the METHODS table."""
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name.endswith(("Trainer", "Arguments")):
        from llm_unlearn.methods import METHODS

        for target in METHODS.values():
            module, _, class_name = target.partition(":")
            if name in (class_name, class_name.removesuffix("Trainer") + "Arguments"):
                return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module 'llm_unlearn' has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *_LAZY])
