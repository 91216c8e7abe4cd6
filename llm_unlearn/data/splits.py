"""One table: domain x split -> Hub path, configuration, kind; and the folders and files that stand in for it."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from llm_unlearn.data.reshape import REFUSALS, RESHAPES, read_refusals, scored_prompt, with_refusal
from llm_unlearn.data.rows import SUFFIXES, canonical_row, check_rows, read_rows
from llm_unlearn.data.sources import STREAMED_ROWS, HubOptions, Source, hub_name, hub_rows, load_source
from llm_unlearn.errors import MissingSplitError, UserError, unknown_name


@dataclass(frozen=True)
class Split:
    """Where one split of a domain lives.

    Attributes:
        hub: data set on the Hub, or None where it was never published.
        config: configuration on the Hub, None where it has none; also the folder or file name under --data_dir.
        split: split on the Hub; also the file name under --data_dir.
        kind: "text", "qa", "mcq", or "prompts": nothing but prompts, to be generated from and never to be trained on.
        local: paths, without suffix, under --data_dir, where they do not follow from config and split.
        reshape: name in `reshape.RESHAPES` of what makes rows of the data set's own columns.
        rows: how many of the first rows are streamed where --max_train_samples is not given; None reads all.
    """

    hub: str | None
    config: str | None
    split: str
    kind: str
    local: tuple = ()
    reshape: str | None = None
    rows: int | None = None

    def local_names(self):
        """Return the paths, without suffix, under which --data_dir may hold this split, in order of preference."""
        if self.local:
            return list(self.local)
        # A configuration of one split may be one file; verbmem's split has the name of the raw texts'.
        # The retain set of the general domain lies beside another domain's.
        one_split = self.split in ("train", "test") or self.config == "verbmem"
        one_split = one_split or (self.config, self.split) == ("general", "retain")
        return [f"{self.config}/{self.split}", *([self.config] if one_split else [self.split])]


_ACL = "llmunlearn/unlearn_dataset"
_PKU, _C4 = "PKU-Alignment/PKU-SafeRLHF", "allenai/c4"
_TOFU_RETAIN = {"forget01": "retain99", "forget05": "retain95", "forget10": "retain90"}


def _texts(hub, config, names):
    return {name: Split(hub, config, name, "text") for name in names}


def _muse(hub):
    raw = {"forget": "forget", "retain": "retain1", "retain2": "retain2", "holdout": "holdout"}
    splits = {name: Split(hub, "raw", split, "text") for name, split in raw.items()}
    knowmem = ("forget_qa", "retain_qa", "forget_qa_icl", "retain_qa_icl")
    # Nothing but the folder tells these from the raw texts, so that a flat folder cannot hold them.
    for name in ("forget", "retain", "holdout"):
        splits[f"privleak_{name}"] = Split(hub, "privleak", name, "text", local=(f"privleak/{name}",))
    return {**splits, "verbmem": Split(hub, "verbmem", "forget", "qa")} | {
        name: Split(hub, "knowmem", name, "qa") for name in knowmem
    }


def _c4(domain):
    return Split(_C4, "en", "train", "text", local=(f"{domain}/retain", "retain"), rows=STREAMED_ROWS)


def _detox(name, hub, split, kind, reshape):
    return Split(hub, None, split, kind, local=(f"detox/{name}", name), reshape=reshape)


def _wmdp(topic, forget_hub, retain_hub):
    return {
        "forget": Split(forget_hub, f"{topic}-forget-corpus", "train", "text"),
        "retain": Split(retain_hub, f"{topic}-retain-corpus", "train", "text"),
        "mcq": Split("cais/wmdp", f"wmdp-{topic}", "test", "mcq"),
    }


DOMAINS = {
    "arxiv": _texts(_ACL, "arxiv", ("forget", "approximate", "retain")),
    "github": _texts(_ACL, "github", ("forget", "approximate", "retain")),
    "books": _texts(None, "books", ("forget", "approximate", "retain")),
    "general": _texts(_ACL, "general", ("evaluation", "retain")),
    "tofu": {
        "forget": Split("locuslab/TOFU", "{forget_split}", "train", "qa"),
        "retain": Split("locuslab/TOFU", "{retain_split}", "train", "qa"),
        "holdout": Split("locuslab/TOFU", "{holdout_split}", "train", "qa"),
        "forget_perturbed": Split("locuslab/TOFU", "{forget_split}_perturbed", "train", "qa"),
        "retain_perturbed": Split("locuslab/TOFU", "retain_perturbed", "train", "qa"),
        "real_authors": Split("locuslab/TOFU", "real_authors_perturbed", "train", "qa"),
        "world_facts": Split("locuslab/TOFU", "world_facts_perturbed", "train", "qa"),
    },
    "wmdp_bio": _wmdp("bio", "cais/wmdp-bio-forget-corpus", "cais/wmdp-corpora"),
    "wmdp_cyber": _wmdp("cyber", "cais/wmdp-corpora", "cais/wmdp-corpora"),
    "wmdp_chem": _wmdp("chem", None, None),
    "muse_news": _muse("muse-bench/MUSE-News"),
    "muse_books": _muse("muse-bench/MUSE-Books"),
    "copyright": {
        "forget": Split(None, "copyright", "forget", "text"),
        "retain": _c4("copyright"),
        "holdout": Split(None, "copyright", "holdout", "text"),
    },
    "detox": {
        "forget": _detox("forget", _PKU, "train", "qa", "unsafe_answers"),
        "retain": _c4("detox"),
        "unseen": _detox("unseen", _PKU, "test", "qa", "safer_answer"),
        "toxicity_prompts": _detox(
            "toxicity_prompts", "allenai/real-toxicity-prompts", "train", "prompts", "scored_prompt"
        ),
    },
    "demo": {},
    "custom": {},
}
# Commits that are read unless --dataset_revision says otherwise; sets without one are read at their newest.
REVISIONS = {
    # Branch v0, one configuration; SOUL reads it (src/dataset/SafePku.py at its commit c70759f).
    _PKU: "ff7ba91063016c78a225b0f74e1c0860bb18230f",
    _C4: "1588ec454efa1a09f29cd18ddd04fe05fc8653a2",
}
# Requests of MUSE's sustainability (disjoint, one after the other) and scalability (each holds the one before).
_MUSE_REQUESTS = {
    f"{config}_{n}": Split("muse-bench/MUSE-News", config, f"forget_{n}", "text", local=(f"{config}/forget_{n}",))
    for config in ("sust", "scal")
    for n in range(1, 5)
}
_CUSTOM = {name: Split(None, None, name, "text", local=(name,)) for name in ("forget", "retain", "holdout")}
"""What `--domain custom` finds in a --data_dir."""
_SUBSETS = {"wmdp": ("wmdp_bio", "wmdp_cyber", "wmdp_chem"), "muse": ("muse_news", "muse_books")}


def domain_names():
    """Return every accepted --domain."""
    return [*DOMAINS, *_SUBSETS]


def subsets(domain):
    """Return the domains that an evaluation of `domain` looks at.

    Args:
        domain: any of `domain_names()`.
    Returns:
        tuple of names in DOMAINS: the subsets of `wmdp` and `muse`, otherwise the domain alone.
    Raises:
        UserError: unknown domain.
    """
    if domain not in domain_names():
        raise unknown_name("--domain", domain, domain_names())
    return _SUBSETS.get(domain, (domain,))


def split_names(domain):
    """Return the names of the splits that a domain can have.

    Args:
        domain: of DOMAINS.
    """
    if domain == "demo":
        from llm_unlearn.data.synthetic import DEMO_SPLITS

        return list(DEMO_SPLITS)
    return list(_CUSTOM if domain == "custom" else DOMAINS[domain])


def local_path(name, data_args):
    """Return the path, without suffix, below --data_dir at which a split of a domain is looked for first.

    Args:
        name: of the split.
        data_args: DataArguments.
    """
    split = DOMAINS[data_args.domain].get(name)
    return name if split is None else _resolve(name, split, data_args).local_names()[0]


def check_trainable(domain):
    """Refuse a domain that has nothing to unlearn.

    Raises:
        UserError: unknown domain, `wmdp` or `muse` without the subset, or no domain.
    """
    if domain is None:
        raise UserError(f"--domain is missing; known: {', '.join(domain_names())}")
    if domain in _SUBSETS:
        raise UserError(f"--domain {domain} only evaluates; to train, name the subset: {' | '.join(_SUBSETS[domain])}")
    if domain not in DOMAINS:
        raise unknown_name("--domain", domain, domain_names())


def load_split(name, data_args):
    """Load one split of a domain, or what the user gave in its place.

    Args:
        name: forget, retain, holdout, approximate, ... as in the DOMAINS table.
        data_args: DataArguments.
    Returns:
        Source, or None where the domain has no such split and the user gave none.
    Raises:
        UserError: see `load_source`; also a file missing from --data_dir.
    """
    given = getattr(data_args, f"{name}_data", None)
    domain, limit = data_args.domain, data_args.max_train_samples
    fixed = domain in ("demo", "custom", "copyright", "detox")
    if getattr(data_args, f"{name}_split", None) and (given or fixed):
        raise UserError(f"--{name}_split has no effect with {'--' + name + '_data' if given else domain}")
    if limit is not None and limit < 1:
        raise UserError(f"--max_train_samples must be at least 1, but is {limit}")
    split = DOMAINS.get(domain, {}).get(name)
    reshape = _reshape(name, split, data_args)
    if given:
        return load_source(given, limit, _hub_options(None, data_args), reshape=reshape)
    if domain == "demo":
        return _demo_split(name, data_args, limit, reshape)
    if domain in _SUBSETS:
        raise UserError(f"--domain {domain} has no sets of its own; name the subset: {' | '.join(_SUBSETS[domain])}")
    if domain == "custom" and data_args.data_dir:
        split = _CUSTOM.get(name)
    if split is None:
        return None
    return read_split(_resolve(name, split, data_args), data_args, reshape, name)


def read_split(split, data_args, reshape=None, name="forget"):
    """Read a Split from --data_dir, or else from the Hub.

    Args:
        split: Split, its names filled in.
        data_args: DataArguments.
        reshape: see `rows.check_rows`.
        name: of the flag that takes a file in its place.
    Returns:
        Source.
    Raises:
        UserError: see `load_source`; also a file missing from --data_dir.
    """
    limit = data_args.max_train_samples
    if data_args.data_dir:
        return _local(split, data_args, limit, reshape)
    if split.hub is None:
        is_own = data_args.domain == "copyright"
        raise MissingSplitError(
            f"{split.config}/{split.split} {'is your own text' if is_own else 'was never published'}; "
            f"pass --data_dir DIR with {' or '.join(split.local_names())}.jsonl, or --{name}_data FILE"
        )
    config = None if split.hub == "cais/wmdp-bio-forget-corpus" else split.config
    limit = split.rows if limit is None else limit
    options = _hub_options(split.hub, data_args)
    rows, commit = hub_rows(split.hub, config, split.split, None, limit, options, reshape)
    return Source.single(hub_name(split.hub, split.config, split.split), rows, commit)


def _hub_options(hub, data_args):
    """Return how a data set is reached; a commit of PKU-SafeRLHF is none of the sets that stand beside it in detox."""
    revision = data_args.dataset_revision
    if revision is None or (data_args.domain == "detox" and hub not in (None, _PKU)):
        revision = REVISIONS.get(hub)
    return HubOptions(revision, data_args.cache_dir, data_args.token)


def _reshape(name, split, data_args):
    """Return the function of a row that makes the rows of a split, or None where they are taken as they are."""
    reshape = RESHAPES[split.reshape] if split and split.reshape else None
    if name != "forget" or not (data_args.refusal_data or data_args.domain == "detox"):
        return reshape
    refusals = read_refusals(data_args.refusal_data) if data_args.refusal_data else REFUSALS
    prefer = partial(with_refusal, refusals=refusals, replace=bool(data_args.refusal_data))
    return lambda row: [prefer(made) for made in (reshape(row) if reshape else [canonical_row(row)])]


def _resolve(name, split, data_args):
    if data_args.domain.startswith("muse_") and name == "forget":
        return _muse_request(split, data_args)
    forget = data_args.forget_split or "forget10"
    if data_args.domain == "tofu" and forget not in _TOFU_RETAIN:
        raise unknown_name("--forget_split", forget, _TOFU_RETAIN)
    names = {
        "forget_split": forget,
        "retain_split": data_args.retain_split or _TOFU_RETAIN.get(forget, ""),
        "holdout_split": forget.replace("forget", "holdout"),
    }
    if data_args.domain != "tofu":
        override = {"forget": data_args.forget_split, "retain": data_args.retain_split}.get(name)
        return replace(split, split=override or split.split)
    return replace(split, config=split.config.format(**names))


def _muse_request(split, data_args):
    given = data_args.forget_split
    if given in (None, "forget"):
        return split
    if data_args.domain == "muse_books":
        raise UserError(
            f"--forget_split '{given}': muse_books has one forget set; the requests "
            f"{', '.join(_MUSE_REQUESTS)} are of muse_news"
        )
    if given not in _MUSE_REQUESTS:
        raise unknown_name("--forget_split", given, ["forget", *_MUSE_REQUESTS])
    return _MUSE_REQUESTS[given]


def _local(split, data_args, limit, reshape):
    folder = Path(data_args.data_dir)
    if not folder.is_dir():
        raise UserError(f"--data_dir '{folder}' is not a folder")
    for name in split.local_names():
        for suffix in SUFFIXES:
            path = folder / (name + suffix)
            if path.is_file():
                return Source.single(str(path), read_rows(path, reshape)[:limit], None)
    wanted = " or ".join(f"{name}.{{jsonl,json,csv,parquet}}" for name in split.local_names())
    raise MissingSplitError(f"--data_dir '{folder}' has no {wanted}")


def _demo_split(name, data_args, limit, reshape):
    from llm_unlearn.data.synthetic import DEMO_SPLITS, make_world

    if name not in DEMO_SPLITS:
        return None
    source = f"demo:{data_args.demo_seed}:{name}"
    reshape = scored_prompt if DEMO_SPLITS[name] == "prompts" else reshape
    rows = make_world(data_args.demo_seed)[name][:limit]
    return Source.single(source, check_rows(rows, source, reshape), None)
