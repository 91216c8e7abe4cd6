"""Train transformer probes for --unlearn_method probe_unlearn: from an early checkpoint's hidden states to the final's.

python utils/train_probe.py --model_name_or_path FINAL --early_model_name_or_path EARLY [--early_revision BRANCH] \
    --domain wmdp_bio --layers 7 11 15 19 23 27 --output_dir OUT

A layer L is the decoder layer of index L, counted from 0, and its state is what it hands on: hidden_states[L + 1] of
transformers, before the final norm for the last layer too. The probes learn from the forget set, of which every tenth
row is held out; OUT/config.json says how far their errors are below those of the identity map and of the mean. Under
torchrun each process holds both models whole and takes its share of every batch.
"""

import logging
import sys
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
from llm_unlearn.errors import UserError, run_cli
from llm_unlearn.processes import set_up_logging

logger = logging.getLogger("llm_unlearn.train_probe")
SCRIPT, LENGTH = "utils/train_probe.py", 512


@dataclass
class ProbeFlags(TokenizeFlags):
    """Flags of this script besides those of the data."""

    model_name_or_path: str | None = flag(None, "The final model, which probe_unlearn will make forget.")
    model_revision: str | None = flag(None, "Its branch, tag or commit on the Hub.")
    early_model_name_or_path: str | None = flag(None, "An earlier checkpoint of it, which knows nothing yet.")
    early_revision: str | None = flag(None, "Branch, tag or commit of the early checkpoint on the Hub.")
    layers: list[int] | None = field(
        default=None, metadata={"help": "Decoder layers, from 0, whose outputs get a probe each; default: all."}
    )
    output_dir: str | None = flag(None, "Where layer_<L>.safetensors and config.json go.")
    overwrite_output_dir: bool = flag(False, "Write into an output directory that is not empty.")
    learning_rate: float = flag(1e-3, "Of AdamW, constant.")
    num_train_epochs: int = flag(3, "Passes over the rows.")
    max_steps: int | None = flag(None, "End after so many steps, whatever --num_train_epochs says.")
    per_device_train_batch_size: int = flag(4, "Rows of a batch on each process.")
    seed: int = flag(42, "Of the first weights, of the order of the rows and of those held out.")
    dtype: str = flag(
        "float32", "Precision of both models' weights, auto for the checkpoints' own; the probes train in float32."
    )
    use_cpu: bool = flag(False, "Run on the CPU; implied where there is no accelerator.")
    push_to_hub: bool = flag(False, "Upload the probes once they are on disk.")
    hub_model_id: str | None = flag(None, "Repository, owner/name, of --push_to_hub; default: the folder's name.")
    hub_token: str | None = flag(
        None, "Access token of --push_to_hub; default: --token, or the one you logged in with."
    )
    hub_private_repo: bool = flag(False, "Make the repository private where it is new.")


def main(argv=None):
    """Train the probes; returns the exit code."""
    words = sys.argv[1:] if argv is None else list(argv)
    parsed = parse_script(words, ProbeFlags, FORGET_DATA, SCRIPT)
    if parsed is None:
        return None
    flags, data = parsed
    _check(flags)
    set_up_logging()
    import torch
    from accelerate import PartialState

    flags.use_cpu = flags.use_cpu or not torch.accelerator.is_available()
    state = PartialState(cpu=flags.use_cpu)
    check_output(flags)
    tokenizer, rows, held_out, facts = _read_rows(flags, data)
    probes, record = _train(flags, data, state, tokenizer, rows, held_out)
    if state.is_main_process:
        from llm_unlearn.manifests import write_manifest
        from llm_unlearn.probe import save_probes
        from llm_unlearn.records import command_line, package_versions

        record |= {**facts, "command": command_line(words, SCRIPT), "versions": package_versions()}
        save_probes(flags.output_dir, probes, record)
        write_manifest(flags.output_dir)
        _report(record["mean_squared_error"])
        logger.info("the probes are in %s", flags.output_dir)
        if flags.push_to_hub:
            from llm_unlearn.hub import push_checkpoint

            token = flags.hub_token or data.token
            push_checkpoint(flags.output_dir, flags.hub_model_id, token, flags.hub_private_repo or None)
    state.wait_for_everyone()
    return None


def _check(flags):
    require_flags(flags, ("model_name_or_path", "early_model_name_or_path", "output_dir"))
    check_counts(flags, ("num_train_epochs", "max_steps", "per_device_train_batch_size", "max_length"))
    check_training_flags(flags)


def _hub(data, revision):
    return {"revision": revision, "cache_dir": data.cache_dir, "token": data.token}


def _read_rows(flags, data):
    """Return (tokenizer, tokenized rows, held-out ones, {"model", "early_model", "data"}) after checking the models."""
    from llm_unlearn.affine import identity
    from llm_unlearn.data.splits import check_trainable, load_split
    from llm_unlearn.data.tokenize import tokenize_rows
    from llm_unlearn.models import context_length, load_tokenizer
    from llm_unlearn.probe_training import split_rows

    check_trainable(data.domain)
    names = {"model": (flags.model_name_or_path, flags.model_revision)}
    names["early_model"] = (flags.early_model_name_or_path, flags.early_revision)
    facts = {key: identity(name, **_hub(data, revision)) for key, (name, revision) in names.items()}
    if facts["model"]["fingerprint"] == facts["early_model"]["fingerprint"]:
        raise UserError("--early_model_name_or_path is the final model itself; pass an earlier checkpoint of it")
    tokenizers = [load_tokenizer(name, **_hub(data, revision)) for name, revision in names.values()]
    source = load_split("forget", data)
    if source is None:
        raise UserError(f"domain '{data.domain}' was given no forget set; pass --forget_data FILE")
    limit = context_length(flags.model_name_or_path, **_hub(data, flags.model_revision))
    flags.max_length = flags.max_length or min(LENGTH, limit or LENGTH)
    options = flags.tokenize_options(limit)
    parts = split_rows(source.rows, flags.seed)
    rows, held_out = (tokenize_rows(part, tokenizers[0], options, "forget") for part in parts)
    is_same = tokenizers[0].get_vocab() == tokenizers[1].get_vocab()
    if not is_same or held_out != tokenize_rows(parts[1], tokenizers[1], options, "forget"):
        raise UserError("the early and the final model have different tokenizers; pass two checkpoints of one model")
    return tokenizers[0], rows, held_out, facts | {"data": source.origins}


def _train(flags, data, state, tokenizer, rows, held_out):
    """Train and measure; returns ({layer: TransformerProbe}, what config.json is to say)."""
    from llm_unlearn.models import load_model
    from llm_unlearn.probe_training import Batches, FitOptions, StatePairs, fit, make_probes, measure

    models = [
        load_model(name, flags.dtype, **_hub(data, revision))
        for name, revision in (
            (flags.early_model_name_or_path, flags.early_revision),
            (flags.model_name_or_path, flags.model_revision),
        )
    ]
    layers = sorted(set(flags.layers or range(models[0].config.get_text_config(decoder=True).num_hidden_layers)))
    pairs = StatePairs(*models, layers, state.device)
    options = FitOptions(
        flags.learning_rate, flags.num_train_epochs, flags.per_device_train_batch_size, flags.max_steps, flags.seed
    )
    batches, unseen = (Batches(part, tokenizer, state, options) for part in (rows, held_out))
    steps = flags.max_steps or flags.num_train_epochs * len(batches)
    logger.info(
        "probes of layers %s of %s: %d sequences, %d held out; %d steps",
        " ".join(map(str, layers)), flags.model_name_or_path, len(rows), len(held_out), steps,
    )  # fmt: skip
    probes = make_probes(pairs, flags.seed)
    steps, constants = fit(probes, pairs, batches, options, progress=state.is_main_process)
    seen = Batches(rows[: len(held_out)], tokenizer, state, options)
    report = {"train": measure(probes, pairs, seen, constants), "held_out": measure(probes, pairs, unseen, constants)}
    record = {"max_length": flags.max_length, "dtype": flags.dtype, "steps": steps, "options": asdict(options)}
    return probes, {**record, "processes": state.num_processes, "mean_squared_error": report}


def _report(errors):
    for layer, held_out in errors["held_out"].items():
        train = errors["train"][layer]
        logger.info(
            "layer %s: mean squared error %.4g on rows of training, %.4g on held-out ones, where the identity has %.4g "
            "and the mean %.4g", layer, train["probe"], held_out["probe"], held_out["identity"], held_out["mean"],
        )  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
