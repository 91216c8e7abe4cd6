"""Tokenized sets on disk: what is written is read again, used only for what made it, and never pickled."""

import copy
import json
import logging
from types import SimpleNamespace

import pytest

from llm_unlearn.data.sources import Source
from llm_unlearn.data.tokenize import TokenizeOptions
from llm_unlearn.data.tokenized_cache import (
    KEY_FILE,
    cache_key,
    find_cached,
    read_cache,
    tokenizer_sha256,
    variant,
    write_cache,
)
from llm_unlearn.errors import UserError

FORGET = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}, {"input_ids": [4, 5], "labels": [-100, 5]}]
RETAIN = [{"input_ids": [6], "labels": [6]}]
SOURCES = {"forget": Source([{"text": "one"}, {"text": "two"}]), "retain": Source([{"text": "three"}])}
DATA = {name: source.sha256 for name, source in SOURCES.items()}


@pytest.fixture
def tokenizer(demo_tokenizer):
    return copy.deepcopy(demo_tokenizer)


def parsed(folder, method="ascent_plus_descent", domain="arxiv", overwrite_cache=False, **given):
    args = {"general": False, "positive_ratio": 1, "retain_weight": 1.0, "max_length": 64, "settings_given": True}
    args = SimpleNamespace(**{**args, **given})
    args.tokenize_options = lambda length: TokenizeOptions(args.max_length, None, length)
    return SimpleNamespace(
        method=method,
        args=args,
        data=SimpleNamespace(domain=domain, tokenized_dataset=str(folder), overwrite_cache=overwrite_cache),
        context_length=None,
        fingerprint=lambda: "weights of this model",
    )


def written(root, tokenizer, run, length=64, data=DATA, streams=None):
    """Write a set where a run of that kind looks for it; returns its folder."""
    below, settings = variant(run.method, run.args, run.fingerprint)
    folder = root / "arxiv" / "arxiv_forget_500" / below
    write_cache(folder, streams or {"forget": FORGET, "retain": RETAIN}, cache_key(tokenizer, length, settings, data))
    return folder


# ---- Write and read ----


def test_what_is_written_is_read_again(tmp_path):
    key = {"tokenizer": "x", "settings": {"ratio": 0.5}}
    write_cache(tmp_path / "a" / "b", {"forget": FORGET, "retain": RETAIN}, key)
    assert read_cache(tmp_path / "a" / "b") == {"forget": FORGET, "retain": RETAIN}
    assert json.loads((tmp_path / "a" / "b" / KEY_FILE).read_text()) == key


def test_nothing_is_pickled(tmp_path):
    """Arrow and JSON only: reading a set that somebody else made must not be able to run code."""
    write_cache(tmp_path / "set", {"forget": FORGET}, {})
    files = [path for path in (tmp_path / "set").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".arrow", ".json"}
    # Pickles of protocol 2 and later begin with 0x80 and the protocol; files of torch.save are zip archives.
    assert not [path for path in files if path.read_bytes()[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"PK")]


def test_a_set_replaces_an_older_one(tmp_path):
    write_cache(tmp_path / "set", {"forget": FORGET, "retain": RETAIN}, {"n": 1})
    (tmp_path / "set" / "left_over.arrow").write_text("")
    write_cache(tmp_path / "set", {"forget": RETAIN}, {"n": 2})
    assert read_cache(tmp_path / "set") == {"forget": RETAIN}
    assert not (tmp_path / "set" / "left_over.arrow").exists()


def test_a_set_whose_writing_broke_off_is_not_used(tmp_path, tokenizer, monkeypatch):
    """The key is written last, and an older key does not vouch for newer rows."""
    import datasets

    run = parsed(tmp_path)
    folder = written(tmp_path, tokenizer, run)
    assert find_cached(run, tokenizer, SOURCES) is not None

    def break_off(self, path):
        raise OSError("disk full")

    monkeypatch.setattr(datasets.Dataset, "save_to_disk", break_off)
    with pytest.raises(OSError, match="disk full"):
        written(tmp_path, tokenizer, run)
    assert not (folder / KEY_FILE).exists()
    assert find_cached(run, tokenizer, SOURCES) is None


# ---- The key ----


def test_the_key_changes_with_all_that_made_the_set(tokenizer):
    settings = {"positive_ratio": 1, "positive_factor": 1.0}
    key = cache_key(tokenizer, 64, settings, DATA)
    assert cache_key(copy.deepcopy(tokenizer), 64, dict(settings), dict(DATA)) == key
    assert json.loads(json.dumps(key)) == key
    assert cache_key(tokenizer, 65, settings, DATA) != key
    assert cache_key(tokenizer, 64, {**settings, "positive_ratio": 2}, DATA) != key
    assert cache_key(tokenizer, 64, {**settings, "positive_factor": 0.5}, DATA) != key
    assert cache_key(tokenizer, 64, settings, {**DATA, "forget": "0" * 64}) != key
    assert cache_key(tokenizer, 64, settings, {"forget": DATA["forget"]}) != key


def test_the_fingerprint_of_a_tokenizer(tokenizer):
    seen = {tokenizer_sha256(tokenizer)}
    tokenizer.chat_template = "{{ messages }}"
    seen.add(tokenizer_sha256(tokenizer))
    tokenizer.chat_template = None
    assert tokenizer_sha256(tokenizer) in seen
    tokenizer.eos_token = "<s>"
    seen.add(tokenizer_sha256(tokenizer))
    tokenizer.eos_token = "</s>"
    tokenizer.add_tokens(["a_new_word"])
    seen.add(tokenizer_sha256(tokenizer))
    assert len(seen) == 4


def test_the_fingerprint_of_a_slow_tokenizer():
    def slow(vocabulary):
        return SimpleNamespace(get_vocab=lambda: vocabulary, special_tokens_map={}, chat_template=None)

    first = tokenizer_sha256(slow({"a": 0, "b": 1}))
    assert tokenizer_sha256(slow({"b": 1, "a": 0})) == first
    assert tokenizer_sha256(slow({"a": 1, "b": 0})) != first


@pytest.mark.parametrize("how", [{"padding": True}, {"truncation": True, "max_length": 4}])
def test_the_fingerprint_does_not_depend_on_what_the_tokenizer_did_last(tokenizer, how):
    """The Rust tokenizer keeps the padding and truncation of the last call, and writes them into its JSON."""
    tokenizer.pad_token = "</s>"
    before = tokenizer_sha256(tokenizer)
    tokenizer(["Where was Velra Kirrin born?", "Where?"], **how)
    assert tokenizer_sha256(tokenizer) == before


# ---- Where a run looks ----

RANDOM = {
    "label_source": "tokens",
    "top_k": 1,
    "top_p": 1.0,
    "rm_groundtruth": True,
    "legacy_shift": False,
    "completely_random": False,
    "seed": 3,
}


@pytest.mark.parametrize(
    ("method", "given", "folder", "settings"),
    [
        ("gradient_ascent", {}, "normal", {}),
        (
            "ascent_plus_descent",
            {"positive_ratio": 5, "retain_weight": 0.5},
            "ascent_plus_descent",
            {"positive_ratio": 5, "positive_factor": 0.5},
        ),
        (
            "ascent_plus_kl_divergence",
            {"general": True},
            "ascent_plus_descent_general",
            {"positive_ratio": 1, "positive_factor": 1.0},
        ),
        ("random_label", {**RANDOM, "completely_random": True}, "random_label/completely_random", {"seed": 3}),
        (
            "random_label",
            RANDOM,
            "random_label/top_k1_top_p1.0_rmgt",
            {"top_k": 1, "top_p": 1.0, "rm_groundtruth": True, "legacy_shift": False, "seed": 3},
        ),
        (
            "random_label",
            {**RANDOM, "top_k": 10_000_000_000, "rm_groundtruth": False, "legacy_shift": True},
            "random_label/top_k10000000000_top_p1.0_legacy_shift",
            {"top_k": 10_000_000_000, "top_p": 1.0, "rm_groundtruth": False, "legacy_shift": True, "seed": 3},
        ),
    ],
)
def test_folders_of_the_published_tree(method, given, folder, settings):
    if "top_k" in settings:
        settings = {**settings, "model": "weights of this model"}
    run = parsed("", method, **given)
    assert variant(method, run.args, run.fingerprint) == (folder, settings)


def test_labels_of_another_model_are_refused(tmp_path, tokenizer):
    run = parsed(tmp_path, "random_label", **RANDOM)
    written(tmp_path, tokenizer, run, data={"forget": SOURCES["forget"].sha256})
    only_forget = {"forget": SOURCES["forget"]}
    assert find_cached(run, tokenizer, only_forget) is not None
    run.fingerprint = lambda: "weights of another model"
    with pytest.raises(UserError, match="another settings"):
        find_cached(run, tokenizer, only_forget)


def test_ratio_and_factor_come_from_the_set_where_none_was_typed(tmp_path, tokenizer):
    made = parsed(tmp_path, positive_ratio=2, retain_weight=0.5)
    written(tmp_path, tokenizer, made)
    run = parsed(tmp_path, settings_given=False)
    assert find_cached(run, tokenizer, SOURCES) is not None
    assert (run.args.positive_ratio, run.args.retain_weight) == (2, 0.5)


def test_other_methods_and_domains_have_no_set(tmp_path, tokenizer):
    assert variant("npo", None) is None
    assert find_cached(parsed(tmp_path, method="npo"), tokenizer, SOURCES) is None
    assert find_cached(parsed(tmp_path, domain="tofu"), tokenizer, SOURCES) is None
    assert find_cached(parsed(tmp_path), tokenizer, SOURCES) is None


def test_a_matching_set_is_used(tmp_path, tokenizer, caplog):
    run = parsed(tmp_path)
    folder = written(tmp_path, tokenizer, run)
    with caplog.at_level(logging.INFO):
        assert find_cached(run, tokenizer, SOURCES) == {"forget": FORGET, "retain": RETAIN}
    assert f"using the tokenized data set {folder}" in caplog.text


def test_rows_of_a_random_label_set_are_marked_as_relabeled(tmp_path, tokenizer):
    run = parsed(tmp_path, method="random_label", **RANDOM)
    data = {"forget": DATA["forget"]}
    written(tmp_path, tokenizer, run, data=data, streams={"forget": FORGET})
    streams = find_cached(run, tokenizer, {"forget": SOURCES["forget"]})
    assert streams == {"forget": [{**row, "relabeled": True} for row in FORGET]}


def test_the_length_is_the_one_that_the_run_would_take(tmp_path, tokenizer):
    """Without --max_length that is 4096 tokens, or the context of the model where it is shorter."""
    run = parsed(tmp_path, max_length=None)
    written(tmp_path, tokenizer, run, length=4096)
    assert find_cached(run, tokenizer, SOURCES) is not None
    run.context_length = 512
    with pytest.raises(UserError, match="was made with another max_length;"):
        find_cached(run, tokenizer, SOURCES)
    written(tmp_path, tokenizer, run, length=512)
    assert find_cached(run, tokenizer, SOURCES) is not None


@pytest.mark.parametrize("changed", ["tokenizer", "max_length", "settings", "data"])
def test_a_set_made_from_something_else_is_refused_or_ignored(tmp_path, tokenizer, caplog, changed):
    run = parsed(tmp_path)
    folder = written(tmp_path, tokenizer, run)
    sources = SOURCES
    if changed == "tokenizer":
        tokenizer.add_tokens(["a_new_word"])
    elif changed == "max_length":
        run.args.max_length = 63
    elif changed == "settings":
        run.args.positive_ratio = 2
    else:
        sources = {**SOURCES, "retain": Source([{"text": "four"}])}
    with pytest.raises(UserError) as caught:
        find_cached(run, tokenizer, sources)
    said = str(caught.value)
    assert said.startswith(f"the tokenized data set '{folder}' was made with another {changed};")
    assert said.endswith("or pass --overwrite_cache")
    run.data.overwrite_cache = True
    with caplog.at_level(logging.WARNING):
        assert find_cached(run, tokenizer, sources) is None
    assert f"has another {changed}; tokenizing anew" in caplog.text


def test_overwrite_cache_still_uses_what_matches(tmp_path, tokenizer):
    run = parsed(tmp_path, overwrite_cache=True)
    written(tmp_path, tokenizer, run)
    assert find_cached(run, tokenizer, SOURCES) == {"forget": FORGET, "retain": RETAIN}


def test_all_differences_are_named(tmp_path, tokenizer):
    run = parsed(tmp_path)
    written(tmp_path, tokenizer, run)
    run.args.max_length, run.args.retain_weight = 32, 2.0
    with pytest.raises(UserError, match="was made with another max_length and settings;"):
        find_cached(run, tokenizer, SOURCES)
