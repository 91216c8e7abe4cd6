"""One table: domain x split -> Hub path, configuration, kind; and the folders and files that stand in for it."""

from dataclasses import dataclass
from pathlib import Path

from llm_unlearn.data.rows import SUFFIXES, check_rows, read_rows
from llm_unlearn.data.sources import HubOptions, Source, hub_rows, load_source
from llm_unlearn.errors import MissingSplitError, UserError, unknown_name


@dataclass(frozen=True)
class Split:
    """Where one split of a domain lives.

    Attributes:
        hub: data set on the Hub, or None where it was never published.
        config: configuration on the Hub; also the folder or file name under --data_dir.
        split: split on the Hub; also the file name under --data_dir.
        kind: "text", "qa" or "mcq".
    """

    hub: str | None
    config: str
    split: str
    kind: str

    def local_names(self):
        """Return the paths, without suffix, under which --data_dir may hold this split, in order of preference."""
        # A configuration of one split may be one file; verbmem's split has the name of the raw texts'.
        # The retain set of the general domain lies beside another domain's.
        one_split = self.split in ("train", "test") or self.config == "verbmem"
        one_split = one_split or (self.config, self.split) == ("general", "retain")
        return [f"{self.config}/{self.split}", *([self.config] if one_split else [self.split])]


_ACL = "llmunlearn/unlearn_dataset"
_TOFU_RETAIN = {"forget01": "retain99", "forget05": "retain95", "forget10": "retain90"}


def _texts(hub, config, names):
    return {name: Split(hub, config, name, "text") for name in names}


def _muse(hub):
    raw = {"forget": "forget", "retain": "retain1", "retain2": "retain2", "holdout": "holdout"}
    splits = {name: Split(hub, "raw", split, "text") for name, split in raw.items()}
    knowmem = ("forget_qa", "retain_qa", "forget_qa_icl", "retain_qa_icl")
    return {**splits, "verbmem": Split(hub, "verbmem", "forget", "qa")} | {
        name: Split(hub, "knowmem", name, "qa") for name in knowmem
    }


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
    "demo": {},
    "custom": {},
}
_SUBSETS = {"wmdp": ("wmdp_bio", "wmdp_cyber", "wmdp_chem"), "muse": ("muse_news", "muse_books")}


def domain_names():
    """Return every accepted --domain."""
    return [*DOMAINS, *_SUBSETS]


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
    if getattr(data_args, f"{name}_split", None) and (given or data_args.domain in ("demo", "custom")):
        raise UserError(f"--{name}_split has no effect with {'--' + name + '_data' if given else data_args.domain}")
    if data_args.max_train_samples is not None and data_args.max_train_samples < 1:
        raise UserError(f"--max_train_samples must be at least 1, but is {data_args.max_train_samples}")
    limit = data_args.max_train_samples
    hub = HubOptions(data_args.dataset_revision, data_args.cache_dir, data_args.token)
    if given:
        return load_source(given, limit, hub)
    if data_args.domain == "demo":
        return _demo_split(name, data_args, limit)
    splits = DOMAINS[data_args.domain]
    if name not in splits:
        return None
    split = _resolve(name, splits[name], data_args)
    if data_args.data_dir:
        return _local(split, data_args, limit)
    if split.hub is None:
        raise MissingSplitError(
            f"{split.config}/{split.split} was never published; pass --data_dir DIR with "
            f"{' or '.join(split.local_names())}.jsonl, or --{name}_data FILE"
        )
    config = None if split.hub == "cais/wmdp-bio-forget-corpus" else split.config
    rows, commit = hub_rows(split.hub, config, split.split, None, limit, hub)
    return Source.single(f"hub:{split.hub}/{split.config}:{split.split}", rows, commit)


def _resolve(name, split, data_args):
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
        return Split(split.hub, split.config, override or split.split, split.kind)
    return Split(split.hub, split.config.format(**names), split.split, split.kind)


def _local(split, data_args, limit):
    folder = Path(data_args.data_dir)
    if not folder.is_dir():
        raise UserError(f"--data_dir '{folder}' is not a folder")
    for name in split.local_names():
        for suffix in SUFFIXES:
            path = folder / (name + suffix)
            if path.is_file():
                return Source.single(str(path), read_rows(path)[:limit], None)
    wanted = " or ".join(f"{name}.{{jsonl,json,csv,parquet}}" for name in split.local_names())
    raise MissingSplitError(f"--data_dir '{folder}' has no {wanted}")


def _demo_split(name, data_args, limit):
    from llm_unlearn.data.synthetic import make_world

    world = make_world(data_args.demo_seed)
    if name not in world:
        return None
    source = f"demo:{data_args.demo_seed}:{name}"
    return Source.single(source, check_rows(world[name][:limit], source), None)
