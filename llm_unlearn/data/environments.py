"""The unrelated data of ILU: sets, each an environment, by file, Hub source or name."""

import dataclasses
from pathlib import Path

from llm_unlearn.data.sources import HubOptions, Source, load_source
from llm_unlearn.data.splits import Split, read_split
from llm_unlearn.errors import UserError, unknown_name

NAMED = {"gsm8k": Split("openai/gsm8k", "main", "train", "qa", local=("gsm8k/train", "gsm8k"))}
"""{name: where the set lives}; GSM8K's training rows are those with which ILU was published."""


def load_environments(specs, data_args):
    """Load sets, each row with the number of its set as `environment`.

    Args:
        specs: names of NAMED, or what `load_source` takes.
        data_args: DataArguments; --max_train_samples limits each set.
    Returns:
        Source of all rows.
    Raises:
        UserError: see `load_source`; a name that is none.
    """
    rows, origins = [], []
    for number, spec in enumerate(specs):
        source = _load(spec, data_args)
        rows += [{**row, "environment": number} for row in source.rows]
        origins += source.origins
    return Source(rows, origins)


def are_at_hand(specs, data_args):
    """Return whether all sets lie on this machine."""
    return all(Path(spec).is_file() or (spec in NAMED and bool(data_args.data_dir)) for spec in specs)


def _load(spec, data_args):
    if spec in NAMED:
        try:
            # --dataset_revision speaks of the domain's own sets.
            return read_split(NAMED[spec], dataclasses.replace(data_args, dataset_revision=None))
        except UserError as error:
            raise UserError(f"{error}; --ilu_data FILE takes rows of your own in place of {spec}") from error
    if not (spec.startswith("hub:") or Path(spec).suffix or "," in spec):
        raise unknown_name("--ilu_data", spec, NAMED)
    hub = HubOptions(cache_dir=data_args.cache_dir, token=data_args.token)
    return load_source(spec, data_args.max_train_samples, hub)
