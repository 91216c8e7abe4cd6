"""The ACL 2024 `tokenized_dataset` tree: tokenized sets on disk as Arrow, keyed by all that made them."""

import hashlib
import json
import logging
from pathlib import Path

from llm_unlearn.errors import UserError

logger = logging.getLogger(__name__)

KEY_FILE = "cache_key.json"
NAMES = {
    ("arxiv", "forget"): "arxiv_forget_500",
    ("arxiv", "approximate"): "arxiv_approximate_6k",
    ("github", "forget"): "github_forget_2k",
    ("github", "approximate"): "github_approximate",
    ("general", "evaluation"): "general_1k",
}
"""(domain, split) -> folder name of the published tree, whatever the number of rows."""


def variant(method, args, model=None):
    """Return (folder below the set's name, settings that the key holds) of what a method trains on, or None.

    Args:
        method: id of the method.
        args: its arguments.
        model: function that returns the fingerprint of the model from which labels are sampled.
    """
    if method == "gradient_ascent":
        return "normal", {}
    if method == "random_label" and args.label_source == "retain_answers":
        return None
    if method == "random_label":
        drawn = {name: getattr(args, name) for name in ("top_k", "top_p", "rm_groundtruth", "legacy_shift", "seed")}
        if args.completely_random:
            return "random_label/completely_random", {"seed": args.seed}
        shift = "_legacy_shift" if args.legacy_shift else ""
        ending = ("_rmgt" if args.rm_groundtruth else "") + shift
        drawn["model"] = model()
        return f"random_label/top_k{args.top_k}_top_p{args.top_p}{ending}", drawn
    if method.startswith("ascent_plus_"):
        general = "_general" if args.general else ""
        settings = {"positive_ratio": args.positive_ratio, "positive_factor": args.retain_weight}
        return f"ascent_plus_descent{general}", settings
    return None


def cache_key(tokenizer, length, settings, data):
    """Return what a tokenized set depends on.

    Args:
        tokenizer: a transformers tokenizer.
        length: tokens per chunk.
        settings: of the variant.
        data: {stream: sha256 of its rows}.
    Returns:
        dict, compared whole.
    """
    return {"tokenizer": tokenizer_sha256(tokenizer), "max_length": length, "settings": settings, "data": dict(data)}


def tokenizer_sha256(tokenizer):
    """Fingerprint a tokenizer: vocabulary, merges, special tokens and chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab()
    # What the tokenizer was last asked to do, which our calls do not take over.
    text = json.dumps(
        {key: part for key, part in parts.items() if key not in ("padding", "truncation")}, sort_keys=True
    )
    facts = [text, sorted((key, str(value)) for key, value in tokenizer.special_tokens_map.items())]
    return hashlib.sha256(json.dumps([*facts, tokenizer.chat_template], default=str).encode()).hexdigest()


def write_cache(folder, streams, key):
    """Write tokenized streams as an Arrow data set, interleaved as they are trained, and the key last.

    Args:
        folder: where; replaced.
        streams: {stream: list of {"input_ids", "labels"}}.
        key: see `cache_key`.
    """
    import shutil

    from datasets import Dataset

    folder = Path(folder)
    shutil.rmtree(folder, ignore_errors=True)
    columns = ("input_ids", "labels")
    rows = [{"stream": name, **{c: row[c] for c in columns}} for name, part in streams.items() for row in part]
    Dataset.from_list(rows).save_to_disk(str(folder))
    (folder / KEY_FILE).write_text(json.dumps(key, indent=1), encoding="utf-8")


def read_cache(folder):
    """Read what `write_cache` wrote.

    Args:
        folder: where.
    Returns:
        {stream: list of {"input_ids", "labels"}}.
    """
    from datasets import load_from_disk

    streams = {}
    for row in load_from_disk(str(folder)):
        streams.setdefault(row["stream"], []).append({"input_ids": row["input_ids"], "labels": row["labels"]})
    return streams


def find_cached(parsed, tokenizer, sources):
    """Return the tokenized streams that utils/ left for this very run, or None where there are none.

    Args:
        parsed: Parsed command line.
        tokenizer: the model's.
        sources: {stream: Source}.
    Returns:
        {stream: rows}, or None.
    Raises:
        UserError: a tokenized set of this name that was made from something else, without --overwrite_cache.
    """
    name = NAMES.get((parsed.data.domain, "forget"))
    root = Path(parsed.data.tokenized_dataset)
    if name is None or not root.is_dir():
        return None
    found = variant(parsed.method, parsed.args, parsed.fingerprint)
    folder = root / parsed.data.domain / name / found[0] if found else root
    if not (folder / KEY_FILE).is_file():
        return None
    stored = json.loads((folder / KEY_FILE).read_text(encoding="utf-8"))
    options = parsed.args.tokenize_options(parsed.context_length)
    if options.system_prompt:
        return None
    data = {stream: source.sha256 for stream, source in sources.items()}
    wanted = cache_key(tokenizer, options.length("text"), found[1], data)
    if "positive_ratio" in found[1] and not parsed.args.settings_given:
        _take_settings(parsed.args, stored.get("settings", {}), folder)
        wanted["settings"] = variant(parsed.method, parsed.args)[1]
    differing = [field for field in wanted if stored.get(field) != wanted[field]]
    if not differing:
        logger.info("using the tokenized data set %s", folder)
        streams = read_cache(folder)
        if parsed.method == "random_label":
            streams["forget"] = [{**row, "relabeled": True} for row in streams["forget"]]
        return streams
    if parsed.data.overwrite_cache:
        logger.warning("the tokenized data set %s has another %s; tokenizing anew", folder, " and ".join(differing))
        return None
    raise UserError(
        f"the tokenized data set '{folder}' was made with another {' and '.join(differing)}; make it again with "
        "utils/save_tokenized_dataset.py or utils/ascent_plus_descent_tokenizer.py, or pass --overwrite_cache"
    )


def _take_settings(args, settings, folder):
    """Take ratio and factor from the set, as the published chain does, where the command line names neither."""
    ratio, factor = settings.get("positive_ratio", 1), settings.get("positive_factor", 1.0)
    if (ratio, factor) != (args.positive_ratio, args.retain_weight):
        logger.info("--positive_ratio %s and --positive_factor %s come from %s", ratio, factor, folder)
        args.positive_ratio, args.retain_weight = ratio, factor
