"""Domains and their splits: from a folder, from what the user gives in their place, and from the Hub by its names."""

import json
import logging
from dataclasses import make_dataclass
from types import SimpleNamespace

import pytest

from llm_unlearn.arguments import DataFlags
from llm_unlearn.data import splits
from llm_unlearn.data.reshape import scored_prompt
from llm_unlearn.data.rows import form_of, read_rows
from llm_unlearn.data.sources import HubOptions, Source
from llm_unlearn.data.splits import DOMAINS, REVISIONS, check_trainable, domain_names, load_split, subsets
from llm_unlearn.data.synthetic import DEMO_SPLITS, make_world, write_world
from llm_unlearn.data.training_sets import missing_set, training_sets
from llm_unlearn.errors import UserError

QA = {"question": "Who?", "answer": "Nobody."}
MCQ = {"question": "Which?", "choices": ["ape", "bee", "cat", "dog"], "answer": 3}
MUSE = {
    "forget": "raw/forget",
    "retain": "raw/retain1",
    "retain2": "raw/retain2",
    "holdout": "raw/holdout",
    "verbmem": "verbmem/forget",
    "forget_qa": "knowmem/forget_qa",
    "retain_qa": "knowmem/retain_qa",
    "forget_qa_icl": "knowmem/forget_qa_icl",
    "retain_qa_icl": "knowmem/retain_qa_icl",
    "privleak_forget": "privleak/forget",
    "privleak_retain": "privleak/retain",
    "privleak_holdout": "privleak/holdout",
}
REQUESTS = [f"{config}_{n}" for config in ("sust", "scal") for n in (1, 2, 3, 4)]


@pytest.fixture(scope="module")
def world_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_world(folder, seed=3)
    return folder


@pytest.fixture
def hub(monkeypatch):
    """Collect what is asked of the Hub; every split there has one row."""
    asked = []

    def hub_rows(path, config, split, column=None, max_rows=None, hub=None, reshape=None):
        asked.append((path, config, split, max_rows, hub))
        return [{"text": f"{path} {config} {split}"}], "commit"

    monkeypatch.setattr(splits, "hub_rows", hub_rows)
    return asked


def write(folder, name, rows):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def named(folder, name):
    """Write one row of text that tells the file it stands in."""
    return write(folder, name, [{"text": f"the text of {name}"}])


def flags(domain, folder=None, **others):
    return DataFlags(domain=domain, data_dir=folder and str(folder), **others)


# ---- From a folder ----


@pytest.mark.parametrize("domain", ["arxiv", "github", "general"])
def test_text_domains_from_the_written_world(world_folder, domain):
    world = make_world(3)
    for name in DOMAINS[domain]:
        source = load_split(name, flags(domain, world_folder))
        assert source.rows == world[f"{domain}_{name}"]
        assert source.origins[0]["source"] == str(world_folder / domain / f"{name}.jsonl")
        assert source.origins[0]["revision"] is None
        assert source.origins[0]["rows"] == len(source.rows)


def test_tofu_from_the_written_world(world_folder):
    world = make_world(3)
    data = flags("tofu", world_folder, forget_split="forget01")
    for name in ("forget", "retain", "holdout"):
        expected = [{column: row[column] for column in ("question", "answer")} for row in world[name]]
        assert load_split(name, data).rows == expected
    for name, split in {
        "forget_perturbed": "forget",
        "retain_perturbed": "retain",
        "real_authors": "real_authors",
        "world_facts": "world_facts",
    }.items():
        assert load_split(name, data).rows == world[split]


@pytest.mark.parametrize("topic", ["bio", "cyber", "chem"])
@pytest.mark.parametrize("layout", ["folders", "files"])
def test_wmdp_from_a_folder(tmp_path, topic, layout):
    corpus, exam = ("/train.jsonl", "/test.jsonl") if layout == "folders" else (".jsonl", ".json")
    forget = named(tmp_path, f"{topic}-forget-corpus{corpus}")
    retain = named(tmp_path, f"{topic}-retain-corpus{corpus}")
    write(tmp_path, f"wmdp-{topic}{exam}", [MCQ])
    data = flags(f"wmdp_{topic}", tmp_path)
    assert load_split("forget", data).rows == read_rows(forget)
    assert load_split("retain", data).rows == read_rows(retain)
    assert load_split("mcq", data).rows == [{**MCQ, "answer": "dog", "answer_index": 3}]


def test_multiple_choice_as_csv(tmp_path):
    (tmp_path / "wmdp-cyber.csv").write_text("question,choice0,choice1,choice2,choice3,answer\nWhich?,a,b,c,d,2\n")
    assert load_split("mcq", flags("wmdp_cyber", tmp_path)).rows[0]["answer"] == "c"


@pytest.mark.parametrize("domain", ["muse_news", "muse_books"])
def test_muse_from_a_folder(tmp_path, domain):
    assert set(DOMAINS[domain]) == set(MUSE)
    for name, path in MUSE.items():
        row = {"text": path} if path.startswith(("raw", "privleak")) else {**QA, "from": path}
        write(tmp_path, f"{path}.jsonl", [{"prompt": "Once", "gt": path} if name == "verbmem" else row])
    for name, path in MUSE.items():
        row = load_split(name, flags(domain, tmp_path)).rows[0]
        assert path in (row.get("text"), row.get("completion"), row.get("from"))


@pytest.mark.parametrize("layout", ["books/", ""])
def test_books_from_a_folder(tmp_path, layout):
    for name in ("forget", "approximate", "retain"):
        path = named(tmp_path, f"{layout}{name}.jsonl")
        assert load_split(name, flags("books", tmp_path)).rows == read_rows(path)


def test_the_more_precise_place_comes_first(tmp_path):
    named(tmp_path, "retain.jsonl")
    assert load_split("retain", flags("arxiv", tmp_path)).rows == [{"text": "the text of retain.jsonl"}]
    for suffix in (".csv", ".json", ".jsonl"):
        if suffix == ".csv":
            (tmp_path / "arxiv").mkdir()
            (tmp_path / "arxiv" / "retain.csv").write_text("text\nthe text of arxiv/retain.csv\n")
        else:
            named(tmp_path, f"arxiv/retain{suffix}")
        assert load_split("retain", flags("arxiv", tmp_path)).rows == [{"text": f"the text of arxiv/retain{suffix}"}]


def test_the_raw_texts_of_muse_are_no_verbatim_prompts(tmp_path):
    """Both splits are called forget, in different configurations; a flat folder holds only one of them."""
    named(tmp_path, "forget.jsonl")
    assert load_split("forget", flags("muse_news", tmp_path)).rows == [{"text": "the text of forget.jsonl"}]
    with pytest.raises(UserError, match="verbmem/forget"):
        load_split("verbmem", flags("muse_news", tmp_path))


@pytest.mark.parametrize(
    ("domain", "name", "wanted"),
    [
        ("arxiv", "forget", "arxiv/forget.{jsonl,json,csv,parquet} or forget.{jsonl,json,csv,parquet}"),
        ("books", "approximate", "books/approximate.{jsonl,json,csv,parquet} or approximate.{"),
        ("tofu", "retain", "retain90/train.{jsonl,json,csv,parquet} or retain90.{jsonl,json,csv,parquet}"),
        ("tofu", "holdout", "holdout10/train.{jsonl,json,csv,parquet} or holdout10.{"),
        ("wmdp_bio", "forget", "bio-forget-corpus/train.{jsonl,json,csv,parquet} or bio-forget-corpus.{"),
        ("wmdp_cyber", "mcq", "wmdp-cyber/test.{jsonl,json,csv,parquet} or wmdp-cyber.{"),
        ("muse_books", "retain", "raw/retain1.{jsonl,json,csv,parquet} or retain1.{"),
    ],
)
def test_a_missing_file_names_what_was_looked_for(tmp_path, domain, name, wanted):
    with pytest.raises(UserError) as caught:
        load_split(name, flags(domain, tmp_path))
    assert str(caught.value).startswith(f"--data_dir '{tmp_path}' has no {wanted}")


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(UserError, match=r"--data_dir '.*nowhere' is not a folder"):
        load_split("forget", flags("arxiv", tmp_path / "nowhere"))


def test_a_bad_row_is_named(tmp_path):
    write(tmp_path, "github/forget.jsonl", [{"content": "x"}, {"content": 5}])
    with pytest.raises(UserError, match=r"github/forget\.jsonl, row 2: 'content' must be text, but is int"):
        load_split("forget", flags("github", tmp_path))


# ---- Which split ----


@pytest.mark.parametrize(("forget", "retain"), [("forget01", "retain99"), ("forget05", "retain95"), (None, "retain90")])
def test_tofu_keeps_the_split_that_matches(tmp_path, forget, retain):
    forgotten = forget or "forget10"
    for name in (forgotten, retain, forgotten.replace("forget", "holdout"), f"{forgotten}_perturbed"):
        named(tmp_path, f"{name}.json")
    data = flags("tofu", tmp_path, forget_split=forget)
    assert load_split("forget", data).rows == [{"text": f"the text of {forgotten}.json"}]
    assert load_split("retain", data).rows == [{"text": f"the text of {retain}.json"}]
    assert load_split("holdout", data).rows == [{"text": f"the text of holdout{forgotten[-2:]}.json"}]
    assert load_split("forget_perturbed", data).rows == [{"text": f"the text of {forgotten}_perturbed.json"}]


@pytest.mark.parametrize(
    ("domain", "path"),
    [("tofu", "other.json"), ("arxiv", "arxiv/other.json"), ("muse_news", "raw/other.json"), ("books", "other.json")],
)
def test_retain_split_overrides(tmp_path, domain, path):
    named(tmp_path, path)
    named(tmp_path, "forget01.json" if domain == "tofu" else path.replace("other", "forget"))
    data = flags(domain, tmp_path, retain_split="other", forget_split="forget01" if domain == "tofu" else None)
    assert load_split("retain", data).rows == [{"text": f"the text of {path}"}]
    assert "forget" in load_split("forget", data).rows[0]["text"]


def test_forget_split_overrides_outside_tofu(tmp_path):
    named(tmp_path, "arxiv/forget_2.json")
    named(tmp_path, "arxiv/retain.json")
    data = flags("arxiv", tmp_path, forget_split="forget_2")
    assert load_split("forget", data).rows == [{"text": "the text of arxiv/forget_2.json"}]
    assert load_split("retain", data).rows == [{"text": "the text of arxiv/retain.json"}]


@pytest.mark.parametrize("request_name", REQUESTS)
def test_requests_of_muse(tmp_path, hub, request_name):
    """A request takes the place of the forget set alone; the retain set is that of every other run."""
    config, number = request_name.split("_")
    named(tmp_path, f"{config}/forget_{number}.json")
    named(tmp_path, "raw/retain1.json")
    data = flags("muse_news", tmp_path, forget_split=request_name)
    assert load_split("forget", data).rows == [{"text": f"the text of {config}/forget_{number}.json"}]
    assert load_split("retain", data).rows == [{"text": "the text of raw/retain1.json"}]
    data.data_dir = None
    load_split("forget", data), load_split("retain", data)
    assert [place[:3] for place in hub] == [
        ("muse-bench/MUSE-News", config, f"forget_{number}"),
        ("muse-bench/MUSE-News", "raw", "retain1"),
    ]


def test_a_flat_folder_holds_no_request_and_no_privleak_texts(tmp_path):
    """sust and scal call their splits alike, and privleak calls them as the raw texts are called."""
    for name in ("forget_1", "forget", "retain", "holdout"):
        named(tmp_path, f"{name}.json")
    assert (
        load_split("forget", flags("muse_news", tmp_path, forget_split="forget"))
        .rows[0]["text"]
        .endswith("forget.json")
    )
    with pytest.raises(UserError, match=r"has no sust/forget_1\.\{jsonl,json,csv,parquet\}$"):
        load_split("forget", flags("muse_news", tmp_path, forget_split="sust_1"))
    for name in ("forget", "retain", "holdout"):
        with pytest.raises(UserError, match=rf"has no privleak/{name}\.\{{jsonl,json,csv,parquet\}}$"):
            load_split(f"privleak_{name}", flags("muse_news", tmp_path))


@pytest.mark.parametrize(("given", "near"), [("sust1", "sust_1"), ("scal_5", "scal_4"), ("raw", None)])
def test_unknown_request_of_muse(given, near):
    with pytest.raises(UserError) as caught:
        load_split("forget", flags("muse_news", forget_split=given))
    hint = f"; did you mean '{near}'?" if near else "."
    assert str(caught.value) == f"unknown --forget_split '{given}'{hint} Known: forget, {', '.join(REQUESTS)}"


def test_the_books_of_muse_have_no_requests(tmp_path):
    with pytest.raises(UserError) as caught:
        load_split("forget", flags("muse_books", tmp_path, forget_split="sust_1"))
    assert str(caught.value).startswith("--forget_split 'sust_1': muse_books has one forget set; the requests sust_1, ")


@pytest.mark.parametrize(("given", "near"), [("forget5", "forget05"), ("retain10", None), ("forgot05", "forget05")])
def test_unknown_forget_split_of_tofu(tmp_path, given, near):
    with pytest.raises(UserError) as caught:
        load_split("forget", flags("tofu", tmp_path, forget_split=given))
    hint = f"; did you mean '{near}'?" if near else ""
    said = str(caught.value)
    assert said.startswith(f"unknown --forget_split '{given}'{hint}")
    assert said.endswith("Known: forget01, forget05, forget10")


@pytest.mark.parametrize(("given", "near"), [("tofo", "tofu"), ("arXiv", "arxiv"), ("wmdp-bio", "wmdp_bio")])
def test_unknown_domain(given, near):
    with pytest.raises(UserError, match=f"unknown --domain '{given}'; did you mean '{near}'\\? Known: arxiv, github"):
        check_trainable(given)
    with pytest.raises(UserError, match="--domain is missing; known: arxiv, github"):
        check_trainable(None)


@pytest.mark.parametrize(
    ("domain", "subsets"),
    [("wmdp", "wmdp_bio | wmdp_cyber | wmdp_chem"), ("muse", "muse_news | muse_books")],
)
def test_whole_benchmarks_refuse_to_train(domain, subsets):
    with pytest.raises(UserError) as caught:
        check_trainable(domain)
    assert str(caught.value) == f"--domain {domain} only evaluates; to train, name the subset: {subsets}"


def test_subsets():
    assert subsets("wmdp") == ("wmdp_bio", "wmdp_cyber", "wmdp_chem")
    assert subsets("muse") == ("muse_news", "muse_books")
    for domain in DOMAINS:
        assert subsets(domain) == (domain,)
    with pytest.raises(UserError, match="unknown --domain 'muze'; did you mean 'muse'"):
        subsets("muze")


def test_a_whole_benchmark_has_no_sets_of_its_own(tmp_path):
    with pytest.raises(
        UserError, match=r"--domain muse has no sets of its own; name the subset: muse_news \| muse_books"
    ):
        load_split("forget", flags("muse", tmp_path))


def test_every_other_domain_trains():
    assert set(domain_names()) == {*DOMAINS, "wmdp", "muse"}
    for domain in DOMAINS:
        check_trainable(domain)


# ---- What the user gives; limits; demo ----


@pytest.mark.parametrize("domain", ["custom", "tofu", "demo"])
@pytest.mark.parametrize("name", ["forget", "retain", "holdout"])
def test_given_data_take_the_place_of_the_split(tmp_path, world_folder, domain, name):
    path = named(tmp_path, "mine.jsonl")
    source = load_split(name, flags(domain, world_folder, **{f"{name}_data": str(path)}))
    assert source.rows == read_rows(path)
    assert source.origins[0]["source"] == str(path)


def test_splits_that_a_domain_does_not_have(tmp_path):
    assert load_split("forget", flags("custom")) is None
    assert load_split("holdout", flags("arxiv", tmp_path)) is None
    assert load_split("general", flags("demo")) is None


@pytest.mark.parametrize("domain", ["arxiv", "tofu", "demo", "custom"])
def test_max_train_samples_takes_the_first_rows(world_folder, domain):
    given = {"forget_data": str(world_folder / "forget01.json")} if domain == "custom" else {}
    data = flags(domain, None if domain == "demo" else world_folder, forget_split="forget01", **given)
    if domain != "tofu":
        data.forget_split = None
    rows = load_split("forget", data).rows
    data.max_train_samples = 3
    source = load_split("forget", data)
    assert source.rows == rows[:3] != rows
    assert source.origins[0]["rows"] == 3


def test_demo_needs_nothing(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    world = make_world(0)
    for name in DEMO_SPLITS:
        source = load_split(name, flags("demo"))
        for column in ("question", "text", "prompt", "preferred", "secret"):
            assert [row.get(column) for row in source.rows] == [row.get(column) for row in world[name]]
        assert source.origins[0]["source"] == f"demo:0:{name}"
        assert source.origins[0]["revision"] is None
    assert list(tmp_path.iterdir()) == []


def test_demo_seed_makes_another_world():
    first, second = (load_split("forget", flags("demo", demo_seed=seed)) for seed in (0, 1))
    assert first.sha256 == load_split("forget", flags("demo")).sha256
    assert first.sha256 != second.sha256
    assert second.origins[0]["source"] == "demo:1:forget"


@pytest.mark.parametrize("split", list(DEMO_SPLITS))
def test_demo_rows_are_canonical_like_rows_of_a_file(split, tmp_path):
    """Otherwise what reads `answer` as a text meets the number of a choice."""
    reshape = scored_prompt if DEMO_SPLITS[split] == "prompts" else None
    expected = read_rows(write(tmp_path, "rows.jsonl", make_world(0)[split]), reshape)
    assert load_split(split, flags("demo")).rows == expected


# ---- From the Hub ----

HUB = [
    ("arxiv", "approximate", ("llmunlearn/unlearn_dataset", "arxiv", "approximate")),
    ("github", "forget", ("llmunlearn/unlearn_dataset", "github", "forget")),
    ("general", "evaluation", ("llmunlearn/unlearn_dataset", "general", "evaluation")),
    ("tofu", "forget", ("locuslab/TOFU", "forget10", "train")),
    ("tofu", "retain", ("locuslab/TOFU", "retain90", "train")),
    ("tofu", "forget_perturbed", ("locuslab/TOFU", "forget10_perturbed", "train")),
    ("tofu", "world_facts", ("locuslab/TOFU", "world_facts_perturbed", "train")),
    ("wmdp_bio", "retain", ("cais/wmdp-corpora", "bio-retain-corpus", "train")),
    ("wmdp_bio", "forget", ("cais/wmdp-bio-forget-corpus", None, "train")),
    ("wmdp_cyber", "forget", ("cais/wmdp-corpora", "cyber-forget-corpus", "train")),
    ("wmdp_chem", "mcq", ("cais/wmdp", "wmdp-chem", "test")),
    ("muse_news", "retain", ("muse-bench/MUSE-News", "raw", "retain1")),
    ("muse_books", "verbmem", ("muse-bench/MUSE-Books", "verbmem", "forget")),
    ("muse_books", "forget_qa", ("muse-bench/MUSE-Books", "knowmem", "forget_qa")),
    ("muse_books", "privleak_holdout", ("muse-bench/MUSE-Books", "privleak", "holdout")),
    ("copyright", "retain", ("allenai/c4", "en", "train")),
    ("detox", "forget", ("PKU-Alignment/PKU-SafeRLHF", None, "train")),
    ("detox", "unseen", ("PKU-Alignment/PKU-SafeRLHF", None, "test")),
]


@pytest.mark.parametrize(("domain", "name", "place"), HUB)
def test_names_on_the_hub(hub, domain, name, place):
    data = flags(domain, max_train_samples=7, dataset_revision="v2", cache_dir="/cache", token="secret")
    source = load_split(name, data)
    assert hub == [(*place, 7, HubOptions("v2", "/cache", "secret"))]
    assert source.origins[0]["revision"] == "commit"
    assert source.origins[0]["source"].startswith(f"hub:{place[0]}")
    assert source.rows == [{"text": "{} {} {}".format(*place)}]


def test_a_revision_of_detox_is_one_of_pku(hub):
    """A commit of one data set is none of another, and the three of detox are read together."""
    names = ("forget", "unseen", "retain", "toxicity_prompts")
    for revision in (None, "v2"):
        for name in names:
            load_split(name, flags("detox", dataset_revision=revision))
    pku, c4 = REVISIONS["PKU-Alignment/PKU-SafeRLHF"], REVISIONS["allenai/c4"]
    assert [place[4].revision for place in hub] == [pku, pku, c4, None, "v2", "v2", c4, None]
    assert all(len(commit) == 40 and int(commit, 16) for commit in REVISIONS.values())


@pytest.mark.parametrize("domain", ["copyright", "detox"])
def test_c4_is_streamed_whatever_the_flags_say(hub, domain):
    """It has 365 million rows; without a limit, the first 10,000 are taken."""
    for limit, asked in ((None, 10_000), (3, 3), (20_000, 20_000)):
        load_split("retain", flags(domain, max_train_samples=limit))
        assert hub.pop()[:4] == ("allenai/c4", "en", "train", asked)
    source = load_split("retain", flags(domain))
    assert source.origins[0]["source"] == "hub:allenai/c4/en:train"


@pytest.mark.parametrize(
    ("domain", "name", "wanted"),
    [
        ("books", "forget", "books/forget or forget.jsonl"),
        ("wmdp_chem", "forget", "chem-forget-corpus/train or chem-forget-corpus.jsonl"),
        ("wmdp_chem", "retain", "chem-retain-corpus/train or chem-retain-corpus.jsonl"),
    ],
)
def test_what_was_never_published_says_what_to_pass(hub, domain, name, wanted):
    with pytest.raises(UserError) as caught:
        load_split(name, flags(domain))
    said = str(caught.value)
    assert "was never published" in said
    assert said.endswith(f"pass --data_dir DIR with {wanted}, or --{name}_data FILE")
    assert hub == []


@pytest.mark.parametrize("name", ["forget", "holdout"])
def test_the_text_of_copyright_is_the_users_own(hub, name):
    with pytest.raises(UserError) as caught:
        load_split(name, flags("copyright"))
    assert str(caught.value) == (
        f"copyright/{name} is your own text; pass --data_dir DIR with copyright/{name} or {name}.jsonl, "
        f"or --{name}_data FILE"
    )
    assert hub == []


# ---- From flags to the sets of a run ----


def parsed(data, method="npo", streams=("forget", "retain"), optional=(), **args):
    trainer = SimpleNamespace(all_streams_for=lambda args: streams, optional_streams=optional, paired_streams={})
    trainer.check_rows = lambda rows, tokenizer, args: None
    values = {"do_eval": False, **args}
    arguments = make_dataclass("Arguments", list(values))(**values)
    return SimpleNamespace(method=method, trainer=trainer, args=arguments, data=data)


def test_training_sets_of_the_demo():
    sources, train, evaluation = training_sets(parsed(flags("demo")), None)
    assert {name: source.origins[0]["source"] for name, source in sources.items()} == {
        "forget": "demo:0:forget",
        "retain": "demo:0:retain",
    }
    assert train == {name: source.rows for name, source in sources.items()}
    assert evaluation is None
    data = flags("demo", max_eval_samples=5)
    evaluation = training_sets(parsed(data, streams=("forget",), do_eval=True), None)[2]
    assert evaluation == {name: make_world(0)[name][:5] for name in ("forget", "retain", "holdout")}


def test_general_takes_the_retain_set_of_the_general_domain(world_folder, tmp_path):
    def retain(data):
        return training_sets(parsed(data, general=True), None)[0]["retain"]

    world = make_world(3)
    assert retain(flags("arxiv", world_folder)).rows == world["general_retain"]
    assert retain(flags("demo")).rows == make_world(0)["general_retain"]
    mine = str(named(tmp_path, "mine.jsonl"))
    for domain in ("arxiv", "demo"):
        assert retain(flags(domain, world_folder, retain_data=mine)).rows == read_rows(mine)


def test_a_missing_set_is_named(tmp_path):
    path = str(named(tmp_path, "mine.jsonl"))
    with pytest.raises(
        UserError, match="npo needs a retain set, but domain 'custom' was given none; pass --retain_data"
    ):
        training_sets(parsed(flags("custom", forget_data=path)), None)
    with pytest.raises(
        UserError, match="npo needs a forget set, but domain 'custom' was given none; pass --forget_data"
    ):
        training_sets(parsed(flags("custom", retain_data=path)), None)
    optional = parsed(flags("custom", forget_data=path), streams=("forget",), optional=("retain",))
    assert list(training_sets(optional, None)[0]) == ["forget"]


def test_a_missing_retain_set_names_the_retain_loss():
    assert missing_set("retain", parsed(flags("wmdp_chem"), retain_loss="kl")) == (
        "--retain_loss kl needs a retain set, but domain 'wmdp_chem' was given none; "
        "pass --retain_data FILE or --retain_loss none"
    )


def test_evaluation_leaves_out_what_cannot_be_had(world_folder, tmp_path, caplog):
    for name in ("forget10", "retain90"):
        write(tmp_path, f"{name}.json", [{**QA, "from": name}])
    with caplog.at_level(logging.WARNING):
        evaluation = training_sets(parsed(flags("tofu", tmp_path), do_eval=True), None)[2]
    assert list(evaluation) == ["forget", "retain"]
    assert "going on without the holdout set: --data_dir" in caplog.text


def test_rows_in_both_sets_are_counted_in_a_warning(tmp_path, caplog):
    rows = [{"question": str(number), "answer": "x"} for number in range(6)]
    forget = write(tmp_path, "forget.jsonl", rows[:4])
    retain = write(tmp_path, "retain.jsonl", rows[2:])
    with caplog.at_level(logging.WARNING):
        training_sets(parsed(flags("custom", forget_data=str(forget), retain_data=str(retain))), None)
    assert "2 rows stand in both the forget and the retain set" in caplog.text
    caplog.clear()
    disjoint = write(tmp_path, "other.jsonl", rows[4:])
    with caplog.at_level(logging.WARNING):
        training_sets(parsed(flags("custom", forget_data=str(forget), retain_data=str(disjoint))), None)
    assert caplog.text == ""


# ---- The real TOFU ----


@pytest.mark.parametrize(
    ("forget", "retain", "counts"),
    [
        ("forget01", "retain99", (40, 3960)),
        ("forget05", "retain95", (200, 3800)),
        ("forget10", "retain90", (400, 3600)),
    ],
)
def test_retain_and_forget_make_up_the_whole_of_tofu(shared_data, forget, retain, counts):
    data = flags("tofu", shared_data / "tofu", forget_split=forget)
    sources = [load_split(name, data) for name in ("forget", "retain")]
    assert tuple(len(source.rows) for source in sources) == counts
    assert sources[1].origins[0]["source"].endswith(f"{retain}.json")
    whole = read_rows(shared_data / "tofu" / "full.json")
    assert sources[1].rows + sources[0].rows == whole


def test_perturbed_rows_of_tofu(shared_data):
    data = flags("tofu", shared_data / "tofu", forget_split="forget10")
    lengths = {"forget_perturbed": 5, "retain_perturbed": 5, "real_authors": 3, "world_facts": 3}
    counts = {"forget_perturbed": 400, "retain_perturbed": 400, "real_authors": 100, "world_facts": 117}
    loaded = {name: load_split(name, data).rows for name in lengths}
    assert {name: len(rows) for name, rows in loaded.items()} == counts
    for name, rows in loaded.items():
        assert {len(row["perturbed_answer"]) for row in rows} == {lengths[name]}
    forget = [(row["question"], row["answer"]) for row in load_split("forget", data).rows]
    assert [(row["question"], row["answer"]) for row in loaded["forget_perturbed"]] == forget
    retain = {row["question"] for row in load_split("retain", data).rows}
    assert {row["question"] for row in loaded["retain_perturbed"]} <= retain


def test_real_text_domains(shared_data):
    for domain, names in {
        "arxiv": DOMAINS["arxiv"],
        "github": DOMAINS["github"],
        "general": DOMAINS["general"],
    }.items():
        for name in names:
            source = load_split(name, flags(domain, shared_data / "text_domains"))
            assert {form_of(row) for row in source.rows} == {"text"}


def test_source_fingerprint_is_that_of_its_rows():
    assert Source([QA]).sha256 == Source([dict(reversed(QA.items()))]).sha256 != Source([QA, QA]).sha256
