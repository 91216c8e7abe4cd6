"""Our own flags that every method shares, declared without torch so that `--help` is quick."""

from dataclasses import dataclass, field
from pathlib import Path

from llm_unlearn.command_line import load_json
from llm_unlearn.data.tokenize import TokenizeOptions
from llm_unlearn.errors import UserError
from llm_unlearn.optimizer_flags import OptimizerFlags
from llm_unlearn.regularizer_flags import RegularizerFlags
from llm_unlearn.selection_flags import SelectionFlags
from llm_unlearn.weight_mask_flags import WeightMaskFlags

REFERENCE_MODES = ("live", "adapter_off", "cached")


def flag(default, text, **metadata):
    """Declare a command-line flag: a dataclass field with its help."""
    return field(default=default, metadata={"help": text, **metadata})


def text_or_file(given):
    """Return the contents of the file that a flag names, else the flag itself as text; None stays None.

    Raises:
        UserError: what looks like a file is not there.
    """
    try:
        is_file = bool(given) and Path(given).is_file()
    except (OSError, ValueError):  # too long for a name, or with a zero byte: a text
        return given
    if given and not is_file and " " not in given and given.endswith((".txt", ".md")):
        raise UserError(f"the file '{given}' does not exist")
    return Path(given).read_text(encoding="utf-8").strip() if is_file else given


@dataclass
class TokenizeFlags:
    """Flags that say how rows become tokens, the same in training and in evaluation."""

    max_length: int | None = flag(
        None, "Tokens per sequence; default 4096 for text and 512 for question and answer, never beyond the model's."
    )
    question_template: str | None = flag(
        None,
        "Text with {question} and {answer}, used instead of the chat template; default 'Question: {question}\\nAnswer: "
        "{answer}' where the tokenizer has no chat template.",
    )
    chat_template_kwargs: str | None = flag(
        None,
        'JSON object for the chat template, \'{"date_string": "10 Apr 2025"}\' for example; the date is fixed anyway.',
    )
    system_prompt: str | None = flag(
        None,
        "Text, or a file with one, that stands before every question and text and does not count: the system message "
        "of a chat template. In evaluation alone it is the baseline that is only told what not to reveal.",
    )

    def tokenize_options(self, model_length):
        """Return how rows become tokens under these flags.

        Args:
            model_length: the model's context in tokens, or None.
        Returns:
            TokenizeOptions.
        Raises:
            UserError: chat_template_kwargs that are no JSON object.
        """
        kwargs = load_json(self.chat_template_kwargs) or {}
        if not isinstance(kwargs, dict):
            raise UserError(f"--chat_template_kwargs must be a JSON object, but is {self.chat_template_kwargs!r}")
        return TokenizeOptions(
            self.max_length,
            self.question_template,
            model_length,
            tuple(kwargs.items()),
            text_or_file(self.system_prompt),
        )


@dataclass
class UnlearnFlags(TokenizeFlags, RegularizerFlags, SelectionFlags, WeightMaskFlags, OptimizerFlags):
    """Flags of every trainer besides TrainingArguments: tokenization, and names that transformers 5 dropped."""

    overwrite_output_dir: bool = flag(False, "Write into an output directory that is not empty.")
    warmup_ratio: float | None = flag(
        None, "Share of the steps spent warming up, in [0, 1); the older name of a --warmup_steps below 1."
    )
    fsdp_transformer_layer_cls_to_wrap: str | None = flag(
        None, "Decoder layer class that FSDP wraps; goes into fsdp_config."
    )
    eval_suite: str = flag(
        "light",
        "What --do_eval scores: light, the NLL and probability of forget, retain and holdout set; full, all metrics of "
        "the domain as run_eval.py has them.",
        choices=["light", "full"],
    )
    retain_reference: str | None = flag(
        None, "results.json of a retrained model, for the forget quality and privacy of --eval_suite full."
    )
    reference: str | None = flag(
        None,
        "The frozen model before unlearning: cached, its answers on the rows that will be visited, computed once; "
        "adapter_off, the model with its LoRA adapters off; live, a second model. Default: adapter_off with LoRA, else "
        "cached.",
        choices=list(REFERENCE_MODES),
    )
    reference_cache: str | None = flag(
        None, "Folder of --reference cached, kept for later runs; default: in the output directory, until it is done."
    )
    max_retain_rows: int | None = flag(
        None,
        "Use only so many rows of the retain set, drawn by the seed; they repeat, so that a cached reference is asked "
        "about fewer.",
    )
    sequential_backward: bool = flag(
        False,
        "Forward and backward one stream after the other: the same gradients with half the activations, for twice as "
        "many gathers of sharded weights.",
    )
    estimate_memory: str | None = flag(
        None,
        "Print how much memory the run takes on each device, and what to change where that is too much; nothing is "
        "loaded. True asks about this machine, 24 about a GPU of 24 GB, 8x80 about eight processes with 80 GB each.",
    )
    decoder_layers: str | None = flag(
        None,
        "Attribute that holds the decoder layers, as model.layers, where a model's architecture is not recognized.",
    )
    do_unlearn: bool = flag(True, "Train; the ACL 2024 commands pass it. False only prepares and checks.")


@dataclass
class DataFlags:
    """Flags that say what is to be forgotten and what is to be kept."""

    domain: str | None = flag(None, "Which benchmark's data, or 'custom' for your own files.")
    data_dir: str | None = flag(
        None, "Folder that replaces the Hub: <config>/<split>.jsonl or <config or split>.jsonl."
    )
    cache_dir: str | None = flag(None, "Where downloads from the Hub are kept, models and data alike.")
    token: str | None = flag(None, "Access token of the Hub; default: the one that you logged in with.")
    dataset_revision: str | None = flag(
        None, "Branch, tag or commit of the Hub data sets; default: the newest, but pinned for PKU-SafeRLHF and C4."
    )
    forget_data: str | None = flag(
        None, "Rows to forget: a file, hub:owner/name[/config]:split[#column], or a mixture."
    )
    retain_data: str | None = flag(
        None, "Rows to keep: a file, hub:owner/name[/config]:split[#column], or a mixture A=0.75,B=0.25."
    )
    holdout_data: str | None = flag(None, "Rows that the model never saw, for evaluation; the same forms.")
    forget_split: str | None = flag(
        None,
        "Split to forget: forget01, forget05 or forget10 for tofu (default forget10); sust_1..4 or scal_1..4, the "
        "sequential and the growing requests, for muse_news.",
    )
    retain_split: str | None = flag(None, "Split to keep; default: the one that matches the forget split.")
    refusal_data: str | None = flag(
        None,
        "File with one refusal a line, plain text or JSON Lines, for the `preferred` column of the forget set; default "
        "for detox: twelve of our own, for other domains none.",
    )
    max_train_samples: int | None = flag(
        None, "Use only the first rows of each set; also how many a Hub source streams."
    )
    max_eval_samples: int | None = flag(None, "Score only the first rows of each set.")
    demo_seed: int = flag(0, "Seed of the demo world, independent of --seed.")
    tokenized_dataset: str = flag(
        "./tokenized_dataset", "Where utils/save_tokenized_dataset.py wrote; used where it matches."
    )
    overwrite_cache: bool = flag(
        False, "Tokenize anew where the tokenized data set does not match, instead of refusing."
    )


@dataclass
class TokenizerFlags:
    """Flags of every script that loads a model, besides TRL's ModelConfig."""

    tokenizer_name: str | None = flag(None, "Tokenizer, if it does not lie beside the model.")
    trust_remote_code: bool = flag(False, "Run model code from the Hub; needs a pinned --model_revision.")


@dataclass
class ModelFlags(TokenizerFlags):
    """Flags that say which model is trained."""

    target_model_name_or_path: str | None = flag(
        None,
        "The model that must forget; --model_name_or_path is taken where it is missing (retrain starts from that).",
    )
    output_suffix: str | None = flag(None, "Appended to the automatic output directory.")


@dataclass
class RunFlags:
    """Flags of run_unlearn.py itself."""

    unlearn_method: str = flag("", "Which method; also package.module:MyTrainer for one of your own.")


@dataclass
class ScoringFlags(TokenizeFlags):
    """Flags of the scripts that score a checkpoint."""

    output_dir: str | None = flag(
        None,
        "Where results.json goes; default: eval/<domain> (or mia/<domain>) in the model's folder, or below "
        "eval_results/<model>.",
    )
    overwrite_output_dir: bool = flag(False, "Replace the results of another model or domain.")
    do_eval: bool = flag(True, "Score; the ACL 2024 commands pass it. False only loads and checks.")
    per_device_eval_batch_size: int | None = flag(
        None, "Sequences in a batch at most; default: as many as --max_tokens_per_batch admits."
    )
    max_tokens_per_batch: int = flag(16384, "Tokens in a batch at most, padding included.")
    statistics_dir: str | None = flag(
        None,
        "Where what the model answered is kept for a later run of either script; default: statistics/ in --output_dir, "
        "without it in the model's folder.",
    )
    use_cpu: bool = flag(False, "Run on the CPU; implied where there is no accelerator.")
    seed: int = flag(42, "Seed of the bootstrap and of lm_eval.")
    tf32: bool | None = flag(None, "Use TF32 on NVIDIA GPUs.")


@dataclass
class EvalFlags(ScoringFlags):
    """Flags of run_eval.py itself."""

    retain_reference: str | None = flag(
        None,
        "Results of a model retrained without the forget set, which forget quality and privacy are measured against: "
        "results.json of ours, TOFU_EVAL.json of open-unlearning, or an evaluation log of TOFU.",
    )
    reference_model: str | None = flag(
        None, "That retrained model itself, scored first where there are no results of it; excludes --retain_reference."
    )
    legacy_metrics: bool = flag(False, "Score with open-unlearning's definitions where ours differ from them.")
    max_new_tokens: int | None = flag(
        None, "Tokens that are generated at most; default 200, and what a benchmark says where it says something."
    )
    cap_loops: bool = flag(
        True, "Decode no further where a generation repeats itself; its text continues the loop, and is counted."
    )
    lm_eval_tasks: str | None = flag(
        None, "Tasks of the lm_eval package to run besides, separated by commas; zero_shot names SOUL's list."
    )
    include_path: str | None = flag(None, "Folder with more lm_eval task files.")
    lm_eval_data_dir: str | None = flag(
        None, "Folder from which the lm_eval tasks of ours read their rows; default: --data_dir of wmdp, or the Hub."
    )
    lm_eval_limit: int | None = flag(None, "Score only the first rows of each lm_eval task.")
    toxicity_model: str | None = flag(None, "Folder of a classifier that scores the toxicity of generations.")
    embedding_model: str | None = flag(None, "Folder of an encoder that judges which answer a generation is near to.")


@dataclass
class MIAFlags(ScoringFlags):
    """Flags of run_mia.py itself."""

    reference_model: str | None = flag(
        None, "Model that did not train on the members, for the reference attack; it must have the same tokenizer."
    )
    retain_reference: str | None = flag(
        None, "results.json that run_mia.py wrote for a retrained model, against which every attack is judged."
    )
    lowercase: bool = flag(True, "Run the lowercase attack, which costs a second forward of every sequence.")
    grad_norm: bool = flag(False, "Run the gradient-norm attack, which costs a backward of every sequence.")


SHARED_FLAGS = (RunFlags, DataFlags, ModelFlags, UnlearnFlags)

# Names of the ACL 2024 command line that have a successor here.
RENAMED = {
    "torch_dtype": "dtype",
    "model_max_length": "max_length",
    "block_size": "max_length",
    "output_sufix": "output_suffix",
    "use_lora": "use_peft",
    "no_cuda": "use_cpu",
    "evaluation_strategy": "eval_strategy",
}
# Names of that command line which changed nothing there and can change nothing here, with what to type instead.
REFUSED = {
    "train_file": "pass --domain custom --forget_data FILE",
    "validation_file": "pass --holdout_data FILE",
    "validation_split_percentage": "pass --holdout_data FILE",
    "streaming": "name the source as hub:owner/name:split, which is streamed",
    "model_type": "the model's own config is read",
    "config_name": "the model's own config is read",
    "config_overrides": "the model's own config is read",
    "use_soft_labels": "soft labels were never published; use --top_k K --top_p P",
    "unlearned_model_name_or_path": "run_eval.py takes it as --model_name_or_path",
    "do_unlearn_eval": "pass --do_eval True --eval_strategy steps",
    "logging_dir": "set the environment variable TENSORBOARD_LOGGING_DIR",
}
# Names of that command line which say what happens anyway.
ACCEPTED = {
    "preprocessing_num_workers": "tokenization runs in this process",
    "keep_linebreaks": "line breaks are always kept",
    "use_fast_tokenizer": "the fast tokenizer is always used where there is one",
    "use_auth_token": "the token that you logged in with is always used; --token gives another",
    "low_cpu_mem_usage": "models are always loaded so",
    "dataset_name": "the data sources are written into the model card",
    "dataset_config_name": "the data sources are written into the model card",
    "save_safetensors": "weights are always written as safetensors",
}

# The same for run_eval.py.
EVAL_RENAMED = {
    "torch_dtype": "dtype",
    "model_max_length": "max_length",
    "block_size": "max_length",
    "no_cuda": "use_cpu",
    "target_model_name_or_path": "model_name_or_path",
    "unlearned_model_name_or_path": "model_name_or_path",
    "output_sufix": "output_suffix",
}
EVAL_REFUSED = {
    "do_train": "run_unlearn.py trains",
    "do_unlearn": "run_unlearn.py unlearns",
    "unlearn_method": "run_unlearn.py unlearns",
    "output_suffix": "pass --output_dir",
    "validation_file": "pass --domain custom --holdout_data FILE",
    "train_file": "pass --domain custom --forget_data FILE",
    "fsdp": "every process holds the whole model; rows are split over them",
    "deepspeed": "every process holds the whole model; rows are split over them",
}
EVAL_ACCEPTED = {
    **{name: reason for name, reason in ACCEPTED.items() if name not in ("save_safetensors",)},
    "config_name": "the model's own config is read",
    "report_to": "the results are files; nothing is reported elsewhere",
    "run_name": "the results are files; nothing is reported elsewhere",
    "logging_steps": "nothing is trained",
    "max_train_samples": "nothing is trained",
    "bf16": "pass --dtype bfloat16 for weights in bfloat16; log-probabilities are float32 anyway",
    "fp16": "pass --dtype float16 for weights in float16; log-probabilities are float32 anyway",
    "bf16_full_eval": "pass --dtype bfloat16 for weights in bfloat16; log-probabilities are float32 anyway",
    "fp16_full_eval": "pass --dtype float16 for weights in float16; log-probabilities are float32 anyway",
    "ddp_timeout": "rows are split over processes that wait for each other only at the end",
    "dataloader_num_workers": "rows are tokenized before the model is asked",
}
