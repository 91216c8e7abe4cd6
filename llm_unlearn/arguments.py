"""Our own flags that every method shares, declared without torch so that `--help` is quick."""

from dataclasses import dataclass, field


def flag(default, text, **metadata):
    """Declare a command-line flag: a dataclass field with its help."""
    return field(default=default, metadata={"help": text, **metadata})


@dataclass
class UnlearnFlags:
    """Flags of every trainer besides TrainingArguments: tokenization, and names that transformers 5 dropped."""

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
    overwrite_output_dir: bool = flag(False, "Write into an output directory that is not empty.")
    warmup_ratio: float | None = flag(
        None, "Share of the steps spent warming up, in [0, 1); the older name of a --warmup_steps below 1."
    )
    fsdp_transformer_layer_cls_to_wrap: str | None = flag(
        None, "Decoder layer class that FSDP wraps; goes into fsdp_config."
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
    dataset_revision: str | None = flag(None, "Branch, tag or commit of the Hub data sets; default: the newest.")
    forget_data: str | None = flag(
        None, "Rows to forget: a file, hub:owner/name[/config]:split[#column], or a mixture."
    )
    retain_data: str | None = flag(
        None, "Rows to keep: a file, hub:owner/name[/config]:split[#column], or a mixture A=0.75,B=0.25."
    )
    holdout_data: str | None = flag(None, "Rows that the model never saw, for evaluation; the same forms.")
    forget_split: str | None = flag(
        None, "Split to forget: forget01, forget05 or forget10 for tofu (default forget10)."
    )
    retain_split: str | None = flag(None, "Split to keep; default: the one that matches the forget split.")
    max_train_samples: int | None = flag(
        None, "Use only the first rows of each set; also how many a Hub source streams."
    )
    max_eval_samples: int | None = flag(None, "Score only the first rows of each set during training.")
    demo_seed: int = flag(0, "Seed of the demo world, independent of --seed.")
    tokenized_dataset: str = flag(
        "./tokenized_dataset", "Where utils/save_tokenized_dataset.py wrote; used where it matches."
    )
    overwrite_cache: bool = flag(
        False, "Tokenize anew where the tokenized data set does not match, instead of refusing."
    )


@dataclass
class ModelFlags:
    """Flags that say which model, besides TRL's ModelConfig."""

    target_model_name_or_path: str | None = flag(
        None,
        "The model that must forget; --model_name_or_path is taken where it is missing (retrain starts from that).",
    )
    tokenizer_name: str | None = flag(None, "Tokenizer, if it does not lie beside the model.")
    trust_remote_code: bool = flag(False, "Run model code from the Hub; needs a pinned --model_revision.")
    output_suffix: str | None = flag(None, "Appended to the automatic output directory.")


@dataclass
class RunFlags:
    """Flags of run_unlearn.py itself."""

    unlearn_method: str = flag("", "Which method; also package.module:MyTrainer for one of your own.")


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
