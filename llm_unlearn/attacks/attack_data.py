"""What an attack trains on: the forget set, its topic, something else altogether, a file, or a mixture of these."""

import dataclasses
import random
from dataclasses import dataclass, field

from llm_unlearn.data.rows import content_of
from llm_unlearn.data.sources import HubOptions, Source, load_source, mixture_parts, share_counts
from llm_unlearn.data.splits import check_trainable, load_split
from llm_unlearn.data.tokenize import tokenize_rows
from llm_unlearn.errors import MissingSplitError, UserError

NAMED = ("forget", "retain", "related", "benign")
"""What --tamper_data and --repair_data name besides files."""
RELATED = {
    "arxiv": ("approximate",),
    "github": ("approximate",),
    "books": ("approximate",),
    "tofu": ("retain",),
    "wmdp_bio": ("retain",),
    "wmdp_cyber": ("retain",),
    "wmdp_chem": ("retain",),
    "muse_news": ("retain",),
    "muse_books": ("retain",),
    "copyright": ("holdout",),
    "demo": ("holdout",),
    "custom": ("holdout", "retain"),
}
"""Domain -> its sets on the topic of the forget set, of which the first that is there is taken."""


@dataclass
class AttackData:
    """Sequences to train on.

    Attributes:
        rows: list of {"input_ids", "labels"}, in the order drawn; a sequence may stand there several times.
        distinct: how many different ones there are.
        origins: where they come from, as `sources.Source` has it, with the sequences of each.
    """

    rows: list
    distinct: int
    origins: list = field(default_factory=list)


def load_attack_data(spec, data, tokenizer, options, count=0, benign_data=None, flag="--tamper_data"):
    """Load and tokenize what an attack trains on; documents are cut into chunks of the model's length, whole.

    Args:
        spec: a name of `NAMED`, what `sources.load_source` takes, or a mixture `forget=0.5,benign=0.5` of both, whose
            shares are of sequences.
        data: DataFlags.
        tokenizer: of the model.
        options: TokenizeOptions.
        count: sequences to draw, in an order that `data` alone decides; beyond what is there they go round again.
            0: all, once; of a mixture as many as hold its shares.
        benign_data: what `benign` names; None: the general domain's retain set.
        flag: that spec was given with, for messages.
    Returns:
        AttackData.
    Raises:
        UserError: a set that the domain does not have, with what to pass; an unreadable file.
    """
    shares = mixture_parts(spec) or [(spec, 1.0)]
    pools, origins = [], []
    for name, share in shares:
        source = load_named(name, data, benign_data, flag)
        pools.append(tokenize_rows(source.rows, tokenizer, options, name))
        origins += [{**origin, "share": share, "sequences": len(pools[-1])} for origin in source.origins]
    weights = [share for _, share in shares]
    size = count or min(int(len(pool) / share + 1e-9) for pool, share in zip(pools, weights, strict=True))
    numbers = random.Random(0)
    counts = share_counts(weights, size)
    if not all(counts):
        name = shares[counts.index(0)][0]
        raise UserError(f"{flag} '{spec}' leaves no sequence of '{name}' among {size}; pass a larger share, or more")
    rows = [row for pool, number in zip(pools, counts, strict=True) for row in _drawn(pool, number, numbers)]
    distinct = sum(min(number, len(pool)) for pool, number in zip(pools, counts, strict=True))
    return AttackData(rows, distinct, origins)


def load_named(name, data, benign_data=None, flag="--tamper_data"):
    """Load one of the sets that an attack can name, or a file; see `load_attack_data`.

    Returns:
        Source.
    """
    if name not in NAMED:
        return load_source(name, data.max_train_samples, HubOptions(data.dataset_revision, data.cache_dir, data.token))
    if name == "benign":
        return _benign(data, benign_data, flag)
    check_trainable(data.domain)
    if name == "related":
        return _related(data, flag)
    source = load_split(name, data)
    if source is None:
        raise UserError(
            f"{flag} {name}: domain '{data.domain}' has no {name} set; pass --{name}_data FILE, or {flag} FILE"
        )
    return source


def _related(data, flag):
    """Return rows on the topic of the forget set that are not in it."""
    found = next(filter(None, (_split_or_none(split, data) for split in RELATED.get(data.domain, ()))), None)
    if found is None:
        wanted = "--holdout_data FILE, or " if data.domain in ("custom", "copyright") else ""
        raise UserError(
            f"{flag} related: domain '{data.domain}' has no rows on the topic of its forget set that are not in it; "
            f"pass {wanted}{flag} FILE"
        )
    forget = load_split("forget", data)
    taken = {content_of(row) for row in forget.rows} if forget else set()
    rows = [row for row in found.rows if content_of(row) not in taken]
    if not rows:
        raise UserError(f"{flag} related: every row of it stands in the forget set too; pass {flag} FILE")
    return Source(rows, found.origins)


def _benign(data, benign_data, flag):
    """Return text that has nothing to do with the domain."""
    if benign_data:
        hub = HubOptions(data.dataset_revision, data.cache_dir, data.token)
        return load_source(benign_data, data.max_train_samples, hub)
    # The flags that name sets of this domain, or choose among them, say nothing about the general one.
    own = {name: None for name in ("forget_data", "retain_data", "holdout_data", "forget_split", "retain_split")}
    general = dataclasses.replace(data, **own, domain="demo" if data.domain == "demo" else "general")
    try:
        return load_split("general_retain" if data.domain == "demo" else "retain", general)
    except UserError as error:
        raise UserError(f"{flag} benign: {error}; or pass --benign_data FILE") from error


def _split_or_none(name, data):
    try:
        return load_split(name, data)
    except MissingSplitError:
        return None


def _drawn(pool, count, numbers):
    """Draw sequences without repetition until all were there, then again."""
    drawn = []
    while len(drawn) < count:
        order = list(range(len(pool)))
        if count < len(pool):
            numbers.shuffle(order)
        drawn += [pool[number] for number in order[: count - len(drawn)]]
    return drawn
