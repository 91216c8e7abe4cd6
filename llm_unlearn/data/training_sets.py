"""From flags to the sets that a run trains on: sources, tokenized caches, and the sets that evaluation looks at."""

import dataclasses
import logging

from llm_unlearn.data.environments import load_environments
from llm_unlearn.data.rows import content_of
from llm_unlearn.data.splits import load_split
from llm_unlearn.data.streams import UnlearnDataset
from llm_unlearn.data.tokenized_cache import find_cached
from llm_unlearn.errors import MissingSplitError, UserError
from llm_unlearn.regularizer_flags import STREAMS
from llm_unlearn.selection_flags import READS_ROWS

logger = logging.getLogger(__name__)

_EXTRA = frozenset(STREAMS.values())


def training_sets(parsed, tokenizer):
    """Load what the method reads.

    Args:
        parsed: Parsed command line.
        tokenizer: the model's.
    Returns:
        ({stream: Source}, what the trainer takes as train_dataset, what it takes as eval_dataset or None).
    Raises:
        UserError: a set that the method needs is missing, empty or malformed.
    """
    trainer, args, data = parsed.trainer, parsed.args, parsed.data
    needed = trainer.all_streams_for(args)
    if data.refusal_data and not trainer.reads_refusals(args):
        raise UserError(
            f"--refusal_data has no effect on this run of {parsed.method}, which reads no refusals; pass po or idk_dpo"
        )
    sources = {}
    for name in (*needed, *trainer.optional_streams):
        if name in trainer.paired_streams:
            continue
        source = load_environments(args.ilu_data, data) if name in _EXTRA else _load(name, args, data, name in needed)
        if source is None and name in needed:
            raise UserError(missing_set(name, parsed))
        if source is not None:
            sources[name] = source
    trainer.check_rows({name: source.rows for name, source in sources.items()}, tokenizer, args)
    _warn_of_overlap(sources)
    own = {name: source for name, source in sources.items() if name not in _EXTRA}
    # The tokenized sets on disk hold no text, and no other column.
    cached = None if getattr(args, "token_selection", None) in READS_ROWS else find_cached(parsed, tokenizer, own)
    train = {name: source.rows for name, source in sources.items()}
    if cached:
        rest = {name: rows for name, rows in train.items() if name not in own}
        options = args.tokenize_options(parsed.context_length)
        train = UnlearnDataset({**cached, **UnlearnDataset.from_rows(rest, tokenizer, options).streams})
    return sources, train, _evaluation_sets(own, args, data) if args.do_eval else None


def missing_set(name, parsed):
    """Return the sentence for a set that a method needs and was not given."""
    method, domain = parsed.method, parsed.data.domain
    if name == "retain" and "retain_loss" in type(parsed.args).__dataclass_fields__:
        return (
            f"--retain_loss {parsed.args.retain_loss} needs a retain set, but domain '{domain}' was given none; "
            "pass --retain_data FILE or --retain_loss none"
        )
    return f"{method} needs a {name} set, but domain '{domain}' was given none; pass --{name}_data FILE"


def _load(name, args, data, is_needed):
    """Load a set, or return None where there is none; one that is not needed may be missing from its folder."""
    try:
        return load_split(*_place(name, args, data))
    except MissingSplitError as error:
        if is_needed:
            raise
        logger.warning("going on without the %s set: %s", name, error)
        return None


def _place(name, args, data):
    """Return (split, DataFlags) of a set; `--general True` takes the retain set of the general domain."""
    if name != "retain" or not getattr(args, "general", False) or data.retain_data:
        return name, data
    return ("general_retain", data) if data.domain == "demo" else (name, dataclasses.replace(data, domain="general"))


def _evaluation_sets(sources, args, data):
    sets = {name: source.rows for name, source in sources.items()}
    for name in ("forget", "retain", "holdout"):
        if name in sets:
            continue
        source = _load(name, args, data, is_needed=False)
        if source is not None:
            sets[name] = source.rows
    return {name: rows[: data.max_eval_samples] for name, rows in sets.items()}


def _warn_of_overlap(sources):
    if not {"forget", "retain"} <= set(sources):
        return
    keys = [{content_of(row) for row in sources[name].rows} for name in ("forget", "retain")]
    shared = len(keys[0] & keys[1])
    if shared:
        logger.warning(
            "%d rows stand in both the forget and the retain set; the two terms pull at them in turn", shared
        )
