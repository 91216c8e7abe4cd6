"""Train a tuned lens for --unlearn_method tuned_lens: at every depth the model's own output, read off a hidden state.

python utils/train_tuned_lens.py --model_name_or_path MODEL --domain wmdp_bio --output_dir LENS
torchrun --nproc_per_node 8 utils/train_tuned_lens.py ... --push_to_hub --hub_model_id OWNER/NAME

The lens learns from the forget set, as the published one did. LENS/lens.json says which weights it belongs to, and how
far each depth is from the model's output before training (the logit lens) and after. Under torchrun each process holds
the model whole and takes its share of every batch.
"""

import logging
import sys
import time
from dataclasses import asdict, dataclass, field

from llm_unlearn.arguments import TokenizeFlags, flag
from llm_unlearn.cli.script_flags import (
    FORGET_DATA,
    check_counts,
    check_output,
    check_training_flags,
    parse_script,
    require_flags,
)
from llm_unlearn.command_line import Folds
from llm_unlearn.errors import MissingSplitError, UserError, run_cli
from llm_unlearn.processes import set_up_logging

logger = logging.getLogger("llm_unlearn.train_tuned_lens")
SCRIPT, LENGTH, SCORED_ROWS = "utils/train_tuned_lens.py", 2048, 64
DATA = (*FORGET_DATA, "holdout_data", "max_eval_samples")
PUBLISHED = {"upload_to_hf": "push_to_hub", "hf_repo_id": "hub_model_id", "torch_dtype": "dtype", "no_cuda": "use_cpu"}


@dataclass
class LensFlags(TokenizeFlags):
    """Flags of this script besides those of the data."""

    model_name_or_path: str | None = flag(None, "The model, as tuned_lens will start from it.")
    model_revision: str | None = flag(None, "Its branch, tag or commit on the Hub.")
    dtype: str = flag(
        "auto", "Precision of the model's weights: auto (the checkpoint's), float32, bfloat16, float16, float64."
    )
    layers: list[int] | None = field(
        default=None,
        metadata={"help": "Decoder layers, from 0, whose output gets a translator; default: all, and the embeddings."},
    )
    output_dir: str | None = flag(None, "Where lens.safetensors and lens.json go.")
    overwrite_output_dir: bool = flag(False, "Write into an output directory that is not empty.")
    optimizer: str = flag(
        "adam",
        "adam, with amsgrad; sgd, the tuned-lens package's default; muon, with AdamW for the biases, as EleutherAI's.",
        choices=["adam", "sgd", "muon"],
    )
    learning_rate: float | None = flag(None, "At the first step, falling linearly to 0; default 1e-3, for sgd 0.1.")
    max_steps: int = flag(250, "Optimizer steps.")
    per_device_train_batch_size: int = flag(8, "Rows of a batch on each process.")
    seed: int = flag(42, "Of the order of the rows.")
    use_cpu: bool = flag(False, "Run on the CPU; implied where there is no accelerator.")
    push_to_hub: bool = flag(False, "Upload the lens once it is on disk.")
    hub_model_id: str | None = flag(None, "Repository, owner/name, of --push_to_hub; default: the folder's name.")
    hub_token: str | None = flag(
        None, "Access token of --push_to_hub; default: --token, or the one you logged in with."
    )
    hub_private_repo: bool = flag(False, "Make the repository private where it is new.")


def main(argv=None):
    """Train a lens; returns the exit code."""
    words = sys.argv[1:] if argv is None else list(argv)
    parsed = _parse(words)
    if parsed is None:
        return None
    flags, data = parsed
    set_up_logging()
    import torch
    from accelerate import PartialState

    flags.use_cpu = flags.use_cpu or not torch.accelerator.is_available()
    state = PartialState(cpu=flags.use_cpu)
    check_output(flags, flags.model_name_or_path)
    tokenizer, rows, scored, facts = _read_rows(flags, data)
    lens, record = _train(flags, data, state, tokenizer, rows, scored)
    if not state.is_main_process:
        return None
    from llm_unlearn.lens_files import save_lens
    from llm_unlearn.records import command_line, package_versions

    record["training"] |= {**facts, "command": command_line(words, SCRIPT), "versions": package_versions()}
    save_lens(flags.output_dir, lens, record)
    logger.info("the lens is in %s", flags.output_dir)
    if flags.push_to_hub:
        from llm_unlearn.hub import push_checkpoint

        token = flags.hub_token or data.token
        push_checkpoint(flags.output_dir, flags.hub_model_id, token, flags.hub_private_repo or None)
    return None


def _parse(words):
    """Return (LensFlags, DataFlags), or None where --help was asked for and printed."""
    folds, notes = Folds(PUBLISHED, {}, {}), []
    parsed = parse_script([folds.word(word, notes) for word in words], LensFlags, DATA, SCRIPT)
    if parsed is not None:
        _check(*parsed)
    return parsed


def _check(flags, data):
    from llm_unlearn.data.splits import check_trainable

    require_flags(flags, ("model_name_or_path", "output_dir"))
    check_trainable(data.domain)
    check_counts(flags, ("max_steps", "per_device_train_batch_size", "max_length"))
    check_counts(data, ("max_eval_samples",))
    check_training_flags(flags)


def _hub(flags, data):
    return {"revision": flags.model_revision, "cache_dir": data.cache_dir, "token": data.token}


def _read_rows(flags, data):
    """Return (tokenizer, tokenized rows, those that are scored, where both came from) before any model is loaded."""
    from llm_unlearn.data.splits import load_split
    from llm_unlearn.data.tokenize import tokenize_rows
    from llm_unlearn.models import context_length, load_tokenizer

    tokenizer = load_tokenizer(flags.model_name_or_path, **_hub(flags, data))
    limit = context_length(flags.model_name_or_path, **_hub(flags, data))
    flags.max_length = flags.max_length or min(LENGTH, limit or LENGTH)
    options = flags.tokenize_options(limit)
    source = load_split("forget", data)
    if source is None:
        raise UserError(
            f"a lens needs a forget set, but domain '{data.domain}' was given none; pass --forget_data FILE"
        )
    rows = tokenize_rows(source.rows, tokenizer, options, "forget")
    try:
        unseen = load_split("holdout", data)
    except MissingSplitError:
        unseen = None
    if unseen is None:
        logger.info("there is no holdout set: the lens is scored on rows that it learns from")
    scored = tokenize_rows(unseen.rows, tokenizer, options, "holdout") if unseen else rows
    scored = scored[: data.max_eval_samples or SCORED_ROWS]
    facts = {"data": source.origins, "scored_on": unseen.origins if unseen else "the rows that it learned from"}
    return tokenizer, rows, scored, facts


def _train(flags, data, state, tokenizer, rows, scored):
    """Train and measure; returns (TunedLens, what lens.json is to say)."""
    from llm_unlearn.lens import TunedLens
    from llm_unlearn.lens_files import base_model_identity
    from llm_unlearn.lens_training import LEARNING_RATES, DepthStates, LensOptions, fit, measure
    from llm_unlearn.models import check_vocabulary, checked_layers, load_model
    from llm_unlearn.probe_training import Batches

    model = load_model(flags.model_name_or_path, flags.dtype, **_hub(flags, data))
    check_vocabulary(model, tokenizer)
    identity = base_model_identity(model, with_files=True) if state.is_main_process else None
    model.to(state.device)
    lens = TunedLens.of(model)
    lens.require_agreement(model)
    depth = lens.num_layers
    # The last layer's output goes to the model's own norm and head.
    outputs = [layer + 1 for layer in dict.fromkeys(checked_layers(flags.layers, depth)) if layer + 1 < depth]
    indices = [0, *outputs] if flags.layers is None else outputs
    if not indices:
        raise UserError(f"--layers {flags.layers[0]} is the last layer, whose output needs no translator; name another")
    lens.add_translators(indices)
    rate = flags.learning_rate or LEARNING_RATES[flags.optimizer]
    options = LensOptions(flags.optimizer, rate, flags.max_steps, flags.per_device_train_batch_size, flags.seed)
    states = DepthStates(model, lens)
    batches, unseen = (Batches(part, tokenizer, state, options) for part in (rows, scored))
    tokens = sum(len(row["input_ids"]) for row in rows)
    logger.info(
        "a lens of %s with %d translators: %d sequences / %d tokens; %d steps",
        flags.model_name_or_path, len(indices), len(rows), tokens, flags.max_steps,
    )  # fmt: skip
    before, started = measure(lens, states, unseen), time.time()
    losses = fit(lens, states, batches, options, progress=state.is_main_process)
    seconds, after = time.time() - started, measure(lens, states, unseen)
    for index in indices:
        logger.info("hidden_states[%d]: KL %.4f nats as the logit lens, %.4f tuned", index, before[index], after[index])
    training = {
        **asdict(options), "processes": state.num_processes, "rows": len(rows), "tokens": tokens,
        "max_length": flags.max_length, "dtype": str(model.dtype).removeprefix("torch."), "seconds": round(seconds, 1),
        "loss": losses, "kl_before": before, "kl_after": after,
    }  # fmt: skip
    return lens, {"base_model": identity, "training": training}


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
