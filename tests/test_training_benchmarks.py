"""benchmarks/training.py runs in small, counts what is there, and writes its section of docs/performance.md."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def benchmarks_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.fixture
def two_layers(monkeypatch):
    import subjects

    monkeypatch.setattr(subjects, "LAYERS", 2)


# ---- The meters ----


def llama(**changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    fields = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    fields |= {"num_attention_heads": 4, "num_key_value_heads": 2, "attn_implementation": "eager"}
    return LlamaForCausalLM(LlamaConfig(**fields | changes))


def test_flops_by_hand():
    """Products by their shapes, the ones summed in place and attention included."""
    from training_meters import flops

    left, right, total = torch.ones(3, 5), torch.ones(5, 7), torch.zeros(3, 7)
    assert flops(lambda: left @ right) == 2 * 3 * 5 * 7
    assert flops(lambda: total.addmm_(left, right)) == 2 * 3 * 5 * 7
    query = torch.ones(1, 2, 16, 8, requires_grad=True)

    def attend():
        torch.nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True).sum().backward()

    # Two products forward; backward the scores again, and four.
    assert flops(attend) == (2 + 5) * 2 * (2 * 16 * 16 * 8)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("with_memory", [False, True])
def test_uncomputed_products_change_neither_flops_nor_bytes(attention, with_memory):
    import training_peers
    from training_meters import UncomputedProducts, flops, peak_bytes

    ids = torch.randint(96, (2, 17), generator=torch.Generator().manual_seed(0))
    stream = {"input_ids": ids, "labels": ids}
    found = []
    for computed in (True, False):
        model = llama(attn_implementation=attention)

        def measure(model=model):
            counted = flops(lambda: training_peers.bare(model, stream))
            model.zero_grad(set_to_none=True)
            return counted, peak_bytes(lambda: training_peers.bare(model, stream), "cpu")

        if computed:
            found.append(measure())
        else:
            with UncomputedProducts(with_memory):
                found.append(measure())
    (expected, peak), (counted, uncomputed_peak) = found
    assert counted == expected > 0
    assert uncomputed_peak == pytest.approx(peak, rel=0.02)


def test_the_peak_is_what_the_allocator_says():
    from torch.profiler import ProfilerActivity, profile
    from training_meters import peak_bytes

    weight = torch.randn(300, 20, requires_grad=True)

    def step():
        weight.grad = None
        (torch.ones(50, 20) @ weight.T).log_softmax(-1).square().sum().backward()

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    weight.grad = None
    assert peak_bytes(step, "cpu") == pytest.approx(peak, rel=0.01)


def test_times_alternate_and_are_divided_round_by_round():
    from training_meters import alternate, ratios

    calls = []
    found = alternate({"one": lambda: calls.append(1), "two": lambda: calls.append(2)}, 3, "cpu")
    assert calls == [1, 2] * 3
    assert [len(times) for times in found.values()] == [3, 3]
    assert ratios([2.0, 9.0], [1.0, 3.0]) == [2.0, 3.0]


# ---- The whole ----


@pytest.mark.full
def test_everything_runs_in_small_and_writes_its_section(two_layers, tmp_path, capsys):
    """Every id gives rows; a missed target is no error; the rest of the page stays, and a second run replaces."""
    import training

    page, output = tmp_path / "performance.md", tmp_path / "numbers" / "training.json"
    page.write_text("# Performance\n\nBefore.\n", encoding="utf-8")
    flags = ["--quick", "--repeats", "2", "--output", str(output)]
    assert training.main([*flags, "--page", str(page)]) == 0
    record = json.loads(output.read_text())
    assert {row["id"] for row in record["rows"]} == set(training.IDS) - {"large"}
    assert all(row["ours"] >= 0 for row in record["rows"])
    judged = [row for row in record["rows"] if row["target"] is not None]
    assert all(row["met"] == (row["ours"] <= row["target"]) for row in judged)
    timed = [row for row in record["rows"] if row["metric"].startswith("time")]
    assert timed and all(len(row["rounds"]) in (1, 2) for row in timed)
    assert record["setting"]["quick"] and record["machine"] and record["versions"]["torch"]
    text = page.read_text(encoding="utf-8")
    assert text.startswith("# Performance\n\nBefore.\n\n<!-- benchmarks/training.py on cpu: begin -->\n## Training\n")
    assert text.count("| P4 |") == sum(row["id"] == "P4" for row in record["rows"])
    assert "of the demo world" in text and "targets are met" in text
    assert "P19" in capsys.readouterr().out
    import training_report

    record["setting"]["data"] = "other rows"
    page.write_text(f"{text}After.\n", encoding="utf-8")
    training_report.write_section(page, training_report.section(record), "cpu")
    again = page.read_text(encoding="utf-8")
    assert again.count("## Training") == 1 and "rows from other rows" in again
    assert again.startswith("# Performance\n\nBefore.\n") and again.endswith("After.\n")


@pytest.mark.full
def test_the_large_models_run_in_small(tmp_path):
    """Everything of the GPU's jobs but the GPU: the real command line, both ways backward, the estimate beside."""
    import training

    output = tmp_path / "large.json"
    assert training.main(["--only", "large", "--shapes", "tiny", "--repeats", "1", "--output", str(output)]) == 0
    rows = json.loads(output.read_text())["rows"]
    jobs = {row["job"] for row in rows}
    assert len(jobs) == 8 and sum("one stream backward after the other" in job for job in jobs) == 4
    found = [row for row in rows if row["metric"] == "peak / --estimate_memory"]
    # The estimate takes a fixed amount for Python and torch, which is nearly all of so small a run.
    assert found and all(row["ours"] == pytest.approx(1, abs=0.01) for row in found)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_heads_steps_and_layers_run_on_the_device(two_layers, tmp_path):
    import training

    output = tmp_path / "cuda.json"
    flags = ["--quick", "--repeats", "2", "--device", "cuda", "--only", "P1,P2,P3,P4,P5,P6,P19,large"]
    assert training.main([*flags, "--shapes", "tiny", "--output", str(output)]) == 0
    assert all(row["ours"] > 0 for row in json.loads(output.read_text())["rows"])


# ---- The parts ----


def test_a_wrong_gradient_stops_the_head(monkeypatch):
    import training_heads

    head = training_heads.make_head((32, 8, 31), "cpu", torch.float32)
    variants = training_heads.make_variants("P1", head)
    training_heads.check(variants, head, "cpu")
    monkeypatch.setattr(training_heads, "_our_logps", lambda head, linear: 1.01 * training_heads._dense_logps(head))
    with pytest.raises(AssertionError, match="ours differs from dense"):
        training_heads.check(training_heads.make_variants("P1", head), head, "cpu")


def test_the_floor_is_the_products_that_are_named():
    import training_heads
    from training_meters import flops

    head = training_heads.make_head((32, 8, 31), "cpu", torch.float32)
    for products in (3, 4):
        assert flops(training_heads.floor(head, products)) == products * 2 * 32 * 8 * 31


def test_our_head_takes_no_product_more_than_its_floor():
    """Three for the likelihood, four where the weights are known late or the reference has a say."""
    import training_heads
    from training_meters import flops

    head = training_heads.make_head((32, 8, 31), "cpu", torch.float32)
    product = 2 * 32 * 8 * 31
    for id, products, rest in (("P1", 3, 0), ("P2", 4, 0), ("P3", 4, 2 * 32 * 31)):
        assert flops(training_heads.make_variants(id, head)["ours"]) == products * product + rest, id


def test_steps_cost_what_the_table_of_the_specification_says(tmp_path):
    """Full rows of a model with a small head: the peer's eight and seven thirds, ours two and the reference's share."""
    import training_steps

    shape = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 32}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 4}
    for name, peer, head in (("fresh", 8 / 3, 1), ("npo", 7 / 3, 1)):
        found = training_steps.count_full_width(training_steps.JOBS[name], shape, 64, str(tmp_path))
        unit = found["unit"]
        assert found["peer"] / unit == pytest.approx(peer, rel=1e-9)
        # Above 2.0 is one product of the head: the reference's logits, or the policy's once more.
        layers = 32 * (4 * 64 * 64 + 3 * 64 * 256 + 2 * 64 * 64) + 64 * 64
        assert found["steps"] / unit == pytest.approx(2 + head * 64 * 64 / (3 * layers), abs=0.01)
        assert found["pass"] / unit == pytest.approx(1 / 3, abs=0.01)


def test_flops_of_a_run_are_those_of_its_computed_steps(two_layers, tmp_path):
    """Nothing that decides about the work depends on the products that are not computed."""
    import functools
    from unittest import mock

    import training_steps
    from subjects import load_tokenizer_alone, random_llama

    args = SimpleNamespace(folder=str(tmp_path), data_dir=None)
    tokenizer = load_tokenizer_alone(None, args.folder)
    streams = {name: rows[:5] for name, rows in training_steps.dataset_of(args, tokenizer).streams.items()}
    make = functools.partial(random_llama, tokenizer, 32, attn_implementation="eager")
    job = training_steps.JOBS["npo"]
    count = functools.partial(training_steps.count_run, job, streams, args.folder, 2, epochs=1)
    counted = count(make(), make().to("meta"))
    with mock.patch.object(training_steps, "UncomputedProducts", mock.MagicMock):
        assert count(make(), make().to("meta")) == counted


def test_padding_by_hand():
    """Two streams of 8 rows, one batch each: the widest row times the rows, over the tokens that are there."""
    from training_padding import BATCH, measure

    lengths = {"forget": [4] * 7 + [8], "retain": [2] * 8}
    assert BATCH == 8
    real = 4 * 7 + 8 + 2 * 8
    found = measure(lengths, by_length=False)
    assert found == {"stacked": 16 * 8 / real, "apart": (8 * 8 + 8 * 2) / real}
    # 64 steps' worth of rows of two lengths: in random order nearly every batch has a long one, by length one in four.
    ragged = {"forget": [4, 4, 4, 12] * 128, "retain": [4, 4, 4, 12] * 128}
    assert measure(ragged, by_length=True)["stacked"] < 1.1 < 1.5 < measure(ragged, by_length=False)["apart"]


def test_training_pads_little_on_tofu(shared_data, tmp_path):
    """The target of P16 holds for both tokenizers."""
    import training

    names = ("gpt2.json", "20B_tokenizer.json")
    flags = ["--only", "P16", "--tokenizer", *(str(shared_data / "tokenizers" / name) for name in names)]
    output = tmp_path / "padding.json"
    assert training.main([*flags, "--data_dir", str(shared_data / "tofu"), "--output", str(output)]) == 0
    rows = json.loads(output.read_text())["rows"]
    assert len(rows) == 4
    for row in rows:
        if "forget10" in row["job"]:
            assert row["met"] is True and 1.3 < row["peer"] < 1.6
        else:
            assert row["target"] is None


def test_the_slope_is_that_of_a_line():
    from training_memory import _slope

    assert _slope((2, 4, 8), [10, 16, 28]) == pytest.approx(3)


# ---- The page and the command line ----


def test_a_row_knows_whether_its_target_is_met():
    from training_report import Row

    assert Row("P1", "job", "metric", 1.0).met is None
    assert Row("P1", "job", "metric", 1.0, target=1.0).met is True
    row = Row.timed("P1", "job", "metric", [3.0, 1.0, 2.0], peer=[4.0, 6.0], target=1.9)
    assert row.met is False and row.ours == 2.0 and row.peer == 5.0
    assert row.cells() == ["P1", "job", "metric", "2.000 (1.000-3.000)", "5.000", "1.900", "**no**"]
    assert Row("P6", "job", "metric", 0.1504, target=0.15).cells()[3] == "0.1504"


def test_half_a_pair_of_markers_is_left_alone(tmp_path):
    from training_report import BEGIN, write_section

    from llm_unlearn.errors import UserError

    page = tmp_path / "page.md"
    page.write_text(f"Text.\n{BEGIN.format('cpu')}\nOld.\n", encoding="utf-8")
    with pytest.raises(UserError, match="not the one that ends it"):
        write_section(page, "new", "cpu")
    with pytest.raises(UserError, match="does not exist"):
        write_section(tmp_path / "nowhere.md", "new", "cpu")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--only", "P1,P99"], "unknown --only 'P99'. Known: P1, P2"),
        (["--repeats", "0"], "--repeats must be at least 1"),
        (["--only", "P1", "--page", "page.md"], "--page takes every row"),
        (["--only", "P16", "--tokenizer", "nowhere.json"], "--tokenizer 'nowhere.json' is no tokenizer.json"),
    ],
)
def test_mistakes_end_in_one_sentence(flags, said, capsys):
    import training

    assert training.main(flags) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert said in last and "Traceback" not in last


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_is_refused_where_there_is_none(capsys):
    import training

    assert training.main(["--device", "cuda"]) == 2
    assert "sees no CUDA device" in capsys.readouterr().err


def test_the_section_of_the_page_is_the_benchmark_s():
    """What stands in docs/performance.md has both markers and the prose that the benchmark writes."""
    from training_report import BEGIN, END

    page = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
    found = re.findall(f"{BEGIN.format('cpu')}(.*?){END.format('cpu')}", page, flags=re.DOTALL)
    assert len(found) == 1
    assert (ROOT / "benchmarks/training_prose.md").read_text(encoding="utf-8").strip() in found[0]
