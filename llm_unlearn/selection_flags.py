"""Flags that say which tokens of the forget set count, declared without torch."""

import math
from dataclasses import dataclass, field

from llm_unlearn.command_line import refuse_unread
from llm_unlearn.data.selectors_text import patterns
from llm_unlearn.errors import UserError, unknown_name

_CACHED = ("selection_cache",)
_LISTS = ("keywords", "keyword_regex")
TAKES = {
    "keywords": _LISTS,
    "activation": (*_LISTS, "selection_layer", "selection_threshold", *_CACHED),
    "probe": ("selection_probe", "selection_fraction", *_CACHED),
    "sae": ("selection_sae", "selection_latents", "selection_layer", "selection_fraction", *_CACHED),
    "loss_delta": ("selection_reference_model", "selection_fraction", *_CACHED),
    "column": ("token_weights_use",),
}
"""{kind of selection: the flags that it reads}"""

NAMED = {
    "keywords": _LISTS,
    "activation": ("selection_threshold",),
    "probe": ("selection_fraction",),
    "sae": ("selection_latents",),
    "loss_delta": ("selection_fraction",),
    "column": ("token_weights_use",),
}
"""{kind of selection: the flags to name where it selects no token, or every one}"""

READS_ROWS = ("keywords", "activation", "column")
"""Kinds that read the rows themselves, which a tokenized data set on disk does not hold."""

USES = ("weight", "sign_positive", "sign_negative")
_NEEDS = {
    "keywords": [_LISTS],
    "activation": [_LISTS],
    "probe": [("selection_probe",)],
    "sae": [("selection_sae",), ("selection_latents",)],
    "loss_delta": [("selection_reference_model",)],
}
_DEFAULTS = {
    "activation": {"selection_threshold": 0.2, "selection_cache": "./token_selection"},
    "probe": {"selection_fraction": 0.105, "selection_cache": "./token_selection"},
    "sae": {"selection_fraction": 0.115, "selection_cache": "./token_selection"},
    "loss_delta": {"selection_fraction": 0.105, "selection_cache": "./token_selection"},
    "column": {"token_weights_use": "weight"},
}


def _flag(text, **metadata):
    return field(default=None, metadata={"help": text, **metadata})


@dataclass
class SelectionFlags:
    """Flags of token selection, which goes with any method that trains on a forget set.

    Stands before TrainingArguments in the bases of what inherits it, whose `__post_init__` is called from here.

    Raises:
        UserError: a flag that the selection does not read, one that it lacks, or a value out of range.
    """

    token_selection: str | None = _flag(
        "Which tokens of the forget set count: keywords, those that overlap a keyword; activation, those whose hidden "
        "state is like the keywords'; probe, those that a linear probe finds (utils/train_token_probe.py); sae, those "
        "on which listed latents of a sparse autoencoder fire; loss_delta, those that the model knows better than "
        "--selection_reference_model; column, by the rows' token_weights. Default: all. Each token is seen anyway.",
        choices=list(TAKES),
    )
    keywords: str | None = _flag(
        "Keywords of --token_selection keywords or activation, found in any case: a text file with one on each line, a "
        "CSV file with a column 'keyword', or a list with commas."
    )
    keyword_regex: str | None = _flag(
        "Regular expression of --token_selection keywords or activation, in any case; with --keywords, either counts."
    )
    selection_layer: int | None = _flag(
        "Decoder layer, counted from 0, whose output --token_selection activation (default: the middle one, 16 of 32) "
        "or sae (default: what stands in its cfg.json) reads."
    )
    selection_threshold: float | None = _flag(
        "Least cosine with the keywords' mean state at which --token_selection activation keeps a token; default 0.2."
    )
    selection_fraction: float | None = _flag(
        "Share of the tokens that --token_selection probe, loss_delta (default 0.105) or sae (default 0.115) keeps, "
        "those of the highest score; tokens that tie with the last of them are kept too."
    )
    selection_probe: str | None = _flag("Folder of the linear probe of --token_selection probe.")
    selection_sae: str | None = _flag(
        "Sparse autoencoder of --token_selection sae: a safetensors file with encoder.weight, encoder.bias and b_dec, "
        "beside it cfg.json with k, or their folder."
    )
    selection_latents: str | None = _flag(
        "Latents that --token_selection sae counts: their numbers with commas, or a file with one on each line."
    )
    selection_reference_model: str | None = _flag(
        "Model of the same tokenizer that has not seen the forget set, for --token_selection loss_delta."
    )
    token_weights_use: str | None = _flag(
        "How --token_selection column uses the token_weights of the rows, one for each token: weight, the loss of a "
        "token times its weight, which is not negative (default); sign_positive or sign_negative, only tokens of a "
        "weight above or below 0, as attribution scores are used.",
        choices=list(USES),
    )
    selection_cache: str | None = _flag(
        "Folder that keeps what --token_selection activation, probe, sae or loss_delta asked the model, for later "
        "runs on the same data and model; default ./token_selection."
    )

    def __post_init__(self):
        self._check_selection()
        super().__post_init__()

    def _check_selection(self):
        kind = self.token_selection
        if kind is not None and kind not in TAKES:
            raise unknown_name("--token_selection", kind, TAKES)
        refuse_unread(self, "token_selection", TAKES)
        for names in _NEEDS.get(kind, ()):
            if not any(getattr(self, name) for name in names):
                raise UserError(f"--token_selection {kind} needs {' or '.join(f'--{name}' for name in names)}")
        for name, value in _DEFAULTS.get(kind, {}).items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        self._check_values()
        patterns(self.keywords, self.keyword_regex)

    def _check_values(self):
        if self.selection_fraction is not None and not 0 < self.selection_fraction < 1:
            raise UserError(f"--selection_fraction must lie between 0 and 1, but is {self.selection_fraction}")
        threshold = self.selection_threshold
        if threshold is not None and not (math.isfinite(threshold) and -1 < threshold < 1):
            raise UserError(f"--selection_threshold is a cosine between -1 and 1, but is {threshold}")
        if self.selection_layer is not None and self.selection_layer < 0:
            raise UserError(f"--selection_layer counts from 0, but is {self.selection_layer}")
        if self.token_weights_use not in (None, *USES):
            raise unknown_name("--token_weights_use", self.token_weights_use, USES)
