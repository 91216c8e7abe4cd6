"""What the names on SOUL's, WAGLE's and ILU's command line mean here: losses, data sets, configurations and keys.

Read in OPTML-Group/SOUL 30f7a41 and OPTML-Group/WAGLE 31275e8; the code of ILU's repository is WAGLE's.
"""

from dataclasses import dataclass, field


def _same(value, tokens):
    return value


def _rest(value, tokens):
    return 1 - value


def _per_token(value, tokens):
    return value / tokens


def _share(value, tokens):
    return 1 / tokens


@dataclass(frozen=True)
class Key:
    """A key of a loss's own section.

    Attributes:
        default: as published; None where there is none.
        flags: {flag: function of its value and of the predicted tokens of a forget row}.
        most: largest value, or None.
        zero: why it cannot be 0, or None where it can.
    """

    default: float | None
    flags: dict
    most: float | None = None
    zero: str | None = None


@dataclass(frozen=True)
class Loss:
    """What a published loss is here.

    Attributes:
        method: id in METHODS.
        flags: {flag: value} that it always has.
        section: {key of its section: Key}.
        reads_retain: whether there is a retain set.
        rises: whether the retain weight goes up from epoch to epoch.
    """

    method: str
    flags: dict = field(default_factory=dict)
    section: dict = field(default_factory=dict)
    reads_retain: bool = True
    rises: bool = False


_NOTHING = "the model would only be held to what it is, so that nothing would be forgotten"
_RETAIN, _NLL, _KL = {"retain_weight": _same}, {"retain_loss": "nll"}, {"retain_loss": "kl"}
# Theirs is of the mean over the tokens, ours of their sum.
_NPO = {"gamma": Key(0.0, _RETAIN), "beta": Key(0.1, {"beta": _per_token, "forget_weight": _share})}

LOSSES = {
    "FT": Loss("grad_diff", {"forget_weight": 0, **_NLL}),
    "l1_sparse": Loss("l1_sparse", section={"alpha": Key(0.0, {"l1_coef": _same}, zero="without a penalty it is FT")}),
    "GA": Loss("gradient_ascent", reads_retain=False),
    "GA+FT": Loss("grad_diff", _NLL, {"gamma": Key(0.0, _RETAIN)}),
    # Only WAGLE's command line has this key; SOUL's loss, of which retain_weight alone is gamma, cannot be chosen.
    "GA+KL": Loss("grad_diff", _KL, {"gamma": Key(0.0, {"forget_weight": _same, "retain_weight": _rest}, 1, _NOTHING)}),
    "GA_FT_epoch": Loss("grad_diff", _NLL, {"gamma": Key(0.0, _RETAIN)}, rises=True),
    "RL": Loss("random_label", {"label_source": "retain_answers"}),
    "KL": Loss("kl", section={"gamma": Key(0.0, {"forget_weight": _same}, zero=_NOTHING)}),
    "CL": Loss("po", {"retain_weight": 0}, reads_retain=False),
    "CL+FT": Loss("po", _NLL, {"gamma": Key(1.0, _RETAIN)}),
    "CL+KL": Loss("po", _KL, {"gamma": Key(0.0, _RETAIN)}),
    "CL_FT_epoch": Loss("po", _NLL, {"gamma": Key(1.0, _RETAIN)}, rises=True),
    "NPO": Loss("npo", _NLL, _NPO),
    "NPO+FT": Loss("npo", _NLL, _NPO),
}
"""{--unlearn.unlearn_method: what it is here}; `origin` trains nothing."""

REFUSED_LOSSES = {
    "GA_KL_epoch": "as published it has no gamma, without which it fails; pass GA+KL with --extra '--retain_schedule "
    "0:1'",
    "sys": "it asks the model under a system prompt that names the authors; type python run_eval.py "
    "--model_name_or_path MODEL --domain tofu --system_prompt FILE",
    "SimNPO+FT": "it is of Unlearn-Simple; type python run_unlearn.py --config recipes/wmdp/simnpo.yaml",
}

_GENERIC = "### Question: {question}\n### Answer: {answer}"


@dataclass(frozen=True)
class ForgetSet:
    """A published forget set.

    Attributes:
        flags: {flag: value} of run_unlearn.py.
        retain: the retain set that comes with these flags.
        max_length: tokens of a row.
        rows: how many there are; None where that is not known.
        tokens: predicted ones in a row, about; 1 where that is not known, which leaves NPO as in its paper.
        llama, others: templates of question and answer; None for texts.
        evaluated: the domain to evaluate on, where it is another one.
    """

    flags: dict
    retain: str | None
    max_length: int
    rows: int | None = None
    tokens: int = 1
    llama: str | None = None
    others: str | None = None
    evaluated: str | None = None


def _tofu(forget, retain, rows):
    # forget10 has 37 tokens an answer with GPT-2's tokenizer and 38 with GPT-NeoX's. The template is the one that
    # TOFU's Llama models were trained with.
    flags, template = {"domain": "tofu", "forget_split": forget}, "[INST] {question} [/INST]{answer}"
    return ForgetSet(flags, f"Tofu_{retain}", 512, rows, 40, template, _GENERIC)


_CORPORA, _BIO = "hub:cais/wmdp-corpora/", "hub:cais/wmdp-bio-forget-corpus:train"
# The corpora joined, so that each has the share of its texts: 1,000 of 25,453 and 4,473 of 65,360.
_ALL_FORGET = f"{_CORPORA}cyber-forget-corpus:train=0.0393,{_BIO}=0.9607"
_ALL_RETAIN = f"{_CORPORA}cyber-retain-corpus:train=0.0684,{_CORPORA}bio-retain-corpus:train=0.9316"
_ALL = ForgetSet({"domain": "wmdp_bio", "forget_data": _ALL_FORGET}, None, 1024, 25453, 1023, evaluated="wmdp")

FORGET_SETS = {
    "Tofu_forget01": _tofu("forget01", "retain99", 40),
    "Tofu_forget05": _tofu("forget05", "retain95", 200),
    "Tofu_forget10": _tofu("forget10", "retain90", 400),
    "SafePku": ForgetSet({"domain": "detox"}, "C4", 512, llama="[INST] {question} [/INST] {answer}", others=_GENERIC),
    "HP": ForgetSet({"domain": "copyright"}, "C4", 1024, llama=_GENERIC, others=_GENERIC),
    "WMDPCyber": ForgetSet({"domain": "wmdp_cyber"}, "WMDPCyber", 2000, 1000, 1999),
    "WMDPBio": ForgetSet({"domain": "wmdp_bio"}, "WMDPBio", 1024, 24453, 1023),
    "WMDPALL": _ALL,
}
"""{dataset.forget_dataset_name: what it is here}"""

RETAIN_SETS = {
    "Tofu_retain90": {"retain_split": "retain90"},
    "Tofu_retain95": {"retain_split": "retain95"},
    "Tofu_retain99": {"retain_split": "retain99"},
    "Tofu_full": {"retain_split": "full"},
    "C4": {"retain_data": "hub:allenai/c4/en:train"},
    "wikitext": {"retain_data": "hub:EleutherAI/wikitext_document_level/wikitext-2-raw-v1:train#page"},
    "WMDPCyber": {"retain_data": f"{_CORPORA}cyber-retain-corpus:train"},
    "WMDPBio": {"retain_data": f"{_CORPORA}bio-retain-corpus:train"},
    "WMDPALL": {"retain_data": _ALL_RETAIN},
}
"""{dataset.retain_dataset_name: flags, left out where the set comes with the forget set}"""

_OWN_RETAIN = "pass --extra '--retain_data FILE' with rows of your own"
REFUSED_RETAIN_SETS = {
    "BookCorpus": f"it is a script, which the package datasets no longer runs; {_OWN_RETAIN}",
    "TruthfulQA": f"it is WAGLE's default, which no code of theirs loads; {_OWN_RETAIN}",
    "SafePku": f"it would keep the unsafe answers; {_OWN_RETAIN}",
}


@dataclass(frozen=True)
class Known:
    """A published configuration that stands for itself where its file is not there.

    Attributes:
        recipe: in recipes/; None where nothing is trained.
        settings: {key: value} that the recipe has no flag for, or that others depend on.
    """

    recipe: str | None
    settings: dict


def _known(recipe, model, method, data, root, **more):
    forget, ratio, retain = data
    settings = {
        "overall.model_name": model, "unlearn.unlearn_method": method, "dataset.forget_dataset_name": forget,
        "dataset.retain_dataset_name": retain, "dataset.forget_ratio": ratio, "dataset.batch_size": "1",
        "logger.json.root": f"files/results/{root}",
    }  # fmt: skip
    return Known(recipe, settings | {f"unlearn.{name}": value for name, value in more.items()})


def _on_tofu(recipe, method, root, **more):
    data = ("Tofu_forget10", "400", "Tofu_retain90")
    return _known(recipe, "locuslab/tofu_ft_llama2-7b", method, data, f"unlearn_tofu/{root}", **more)


def _on_detox(recipe, model, method, root, **more):
    return _known(recipe, model, method, ("SafePku", "200", "C4"), f"unlearn_toxic/{root}", **more)


def _on_wmdp(recipe, method, root, **more):
    data = ("WMDPALL", "1.0", "WMDPALL")
    return _known(recipe, "HuggingFaceH4/zephyr-7b-beta", method, data, f"unlearn_wmdp_all/{root}", **more)


_LLAMA, _OPT = "meta-llama/Llama-2-7b-hf", "facebook/opt-1.3b"

CONFIGURATIONS = {
    ("tofu", "FO_GradDiff"): _on_tofu("tofu/grad_diff_soul", "GA+FT", "FO-GradDiff"),
    ("tofu", "SO_GradDiff"): _on_tofu("tofu/grad_diff_sophia", "GA+FT", "SO-GradDiff", sophia="true"),
    ("tofu", "FO_PO"): _on_tofu("tofu/po_soul", "CL+FT", "llama_7b_FO_PO"),
    ("tofu", "SO_PO"): _on_tofu("tofu/po_sophia", "CL+FT", "llama_7b_SO_PO", sophia="true"),
    ("tofu", "origin"): _on_tofu(None, "origin", "llama_7b_origin_400"),
    ("toxic", "FO_PO_llama"): _on_detox("detox/po_soul", _LLAMA, "CL+FT", "llama7b_CL_200"),
    ("toxic", "SO_PO_llama"): _on_detox("detox/po_sophia", _LLAMA, "CL+FT", "llama7b_CL_200", sophia="true"),
    ("toxic", "FO_PO_opt"): _on_detox("detox/po_soul_opt", _OPT, "CL+FT", "opt_1b_CL_200"),
    ("toxic", "SO_PO_opt"): _on_detox("detox/po_sophia_opt", _OPT, "CL+FT", "opt_1b_CL_200", sophia="true"),
    ("toxic", "origin_llama"): _on_detox(None, _LLAMA, "origin", "llama7b_origin"),
    ("toxic", "origin_opt"): _on_detox(None, _OPT, "origin", "opt_1b_origin"),
    ("tofu", "GradDiff+WAGLE"): _on_tofu(
        "tofu/grad_diff_wagle", "GA+FT", "GradDiff+WAGLE", mask_path="mask/tofu_0.95.pt", mu="1e-06"
    ),
    ("tofu", "NPO+WAGLE"): _on_tofu("tofu/npo_wagle", "NPO+FT", "NPO+WAGLE", mask_path="mask/tofu_0.95.pt", mu="1e-06"),
    ("tofu", "PO+WAGLE"): _on_tofu("tofu/po_wagle", "CL+FT", "WAGLE+PO", mask_path="mask/tofu_0.8.pt", mu="1e-06"),
    ("wmdp", "GradDiff+WAGLE"): _on_wmdp(
        "wmdp/grad_diff_wagle", "GA+FT", "GradDiff+WAGLE", mask_path="mask/wmdp_0.4.pt", mu="1e-06"
    ),
    ("wmdp", "NPO+WAGLE"): _on_wmdp("wmdp/npo_wagle", "NPO+FT", "NPO+WAGLE", mask_path="mask/wmdp_0.6.pt", mu="1e-06"),
}
"""{(folder in lower case, file without .json): what stands for it}"""

SCORES = {
    "snip_advanced": "wagle", "snip_advanced_CL": "wagle", "snip": "snip", "gradient": "grad_norm",
    "weight": "magnitude", "random": "random", "wanda": "wanda",
}  # fmt: skip
"""{folder of a published mask: the score it was made by}; WAGLE's where the folder says nothing."""

DEFAULTS = {
    "overall.seed": "0", "unlearn.unlearn_method": "origin", "unlearn.num_epochs": "1", "unlearn.lr": "1e-4",
    "unlearn.gradient_accumulation_steps": "1", "unlearn.max_steps": "-1", "unlearn.sophia": "false",
    "unlearn.use_lora": "false", "unlearn.sophia_params.betas_low": "0.9", "unlearn.sophia_params.betas_high": "0.95",
    "unlearn.sophia_params.rho": "0.03", "dataset.forget_dataset_name": "SafePku",
    "dataset.retain_dataset_name": "C4", "dataset.forget_ratio": "200", "dataset.batch_size": "16",
    "logger.json.root": "files/logs",
}  # fmt: skip
"""{key: published default}; that of weight_decay is 0.1 in SOUL and 0.0 in WAGLE, so that there is none."""

NUMBERS = {
    "overall.seed": ("seed", 0), "unlearn.num_epochs": ("num_train_epochs", 0), "unlearn.lr": ("learning_rate", 0),
    "unlearn.weight_decay": ("weight_decay", 0),
    "unlearn.gradient_accumulation_steps": ("gradient_accumulation_steps", 1),
    "dataset.batch_size": ("per_device_train_batch_size", 1),
}  # fmt: skip
"""{key: (flag that takes its value as it is, least value)}"""

OTHERS = (
    "overall.model_name", "overall.cache_dir", "unlearn.unlearn_method", "unlearn.max_steps", "unlearn.mask_path",
    "unlearn.sophia", "unlearn.use_lora", "unlearn.resume_path", "unlearn.sophia_params.betas_low",
    "unlearn.sophia_params.betas_high", "unlearn.sophia_params.rho", "dataset.forget_dataset_name",
    "dataset.retain_dataset_name", "dataset.forget_ratio", "logger.name", "logger.json.root",
)  # fmt: skip
"""Keys that become flags together with others, or in another form."""

NO_EFFECT = {
    "overall.logger": "a run always keeps its records",
    "unlearn.task_name": "it chose the evaluation, which run_eval.py is asked for",
    "unlearn.p": "it named mask files",
    "unlearn.q": "it named mask files",
    "unlearn.mu": "it belongs to the making of a mask, as --gamma of utils/make_weight_mask.py",
    "dataset.dataset_seed": "rows are taken from the front, in an order that overall.seed draws",
}
"""{key: why it changes nothing}"""

REFUSED = {
    "dataset.self_retain": "pass --extra '--retain_data FILE' with the rows that are to be kept",
    "dataset.perturb_dataset_name": "no loss of this command line reads it; ILU is --extra '--regularizer ilu "
    "--ilu_data FILE'",
    "unlearn.swa": "weights are not averaged here",
    "unlearn.optim": "pass --unlearn.sophia true, or --extra '--optim NAME'",
}
"""{key: why it cannot be honored, and what to type}; false and null are nothing to honor."""
