"""Quantized copies: really quantized and on a grid, compared row by row, and null with a reason where none can be."""

import shutil
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from eval_cases import edit, examples, make_adapter, results, write_rows

from llm_unlearn.attacks import quantize
from llm_unlearn.attacks.quantize import SCHEMES, absent_metrics, quantized_share, scheme_metrics
from llm_unlearn.cli.quantize import main
from llm_unlearn.evaluation.scores import HIGHER, LOWER, Metric
from llm_unlearn.evaluation.suite import Outcome
from llm_unlearn.models import load_model

needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
QUANTIZED, ALL = 2 * (4 * 128 * 128 + 3 * 128 * 256), 2048 * 128 + 5 * 128
"""Weights of the demo's two layers; those of the (tied) embeddings and of five norms."""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    from llm_unlearn.cli.demo import make_base_model

    folder = tmp_path_factory.mktemp("quantize") / "base"
    make_base_model(str(folder), 0)
    return str(folder)


def quantized(base, scheme):
    return load_model(base, quantization_config=SCHEMES[scheme].make(torch.float32), device_map={"": "cpu"}).eval()


def original(base, name):
    return load_model(base).state_dict()[f"{name}.weight"]


def test_a_plain_model_has_no_quantized_weight(base):
    assert quantized_share(load_model(base)) == (0.0, QUANTIZED + ALL)


@needs_bitsandbytes
class TestGrid:
    NAME = "model.layers.1.mlp.up_proj"

    def test_of_eight_bits(self, base):
        """Each row is a multiple of its largest weight / 127, the nearest one."""
        model = quantized(base, "int8")
        assert quantized_share(model) == (QUANTIZED / (QUANTIZED + ALL), QUANTIZED + ALL)
        weight, full = model.get_submodule(self.NAME).weight, original(base, self.NAME)
        step = full.abs().amax(1, keepdim=True) / 127
        assert torch.equal(weight.data.float().abs().amax(1), torch.full((256,), 127.0))
        # Rows are scaled in half precision, which moves a weight by 127 * 2^-11 = .06 of a step at most.
        assert ((weight.data.float() - full / step).abs() <= 0.5 + 0.07).all()
        assert not torch.equal(weight.data.float() * step, full)

    @pytest.mark.parametrize("scheme", ["nf4", "fp4"])
    def test_of_four_bits(self, base, scheme):
        """Each block of 64 weights has 16 levels at most, times its largest weight."""
        from bitsandbytes.functional import dequantize_4bit, get_4bit_type

        model = quantized(base, scheme)
        assert quantized_share(model)[0] == QUANTIZED / (QUANTIZED + ALL)
        weight, full = model.get_submodule(self.NAME).weight, original(base, self.NAME)
        rounded = dequantize_4bit(weight.data, weight.quant_state).reshape(-1, 64)
        full = full.reshape(-1, 64)
        assert max(len(row.unique()) for row in rounded) <= 16
        largest = full.abs().amax(1, keepdim=True)
        levels = get_4bit_type(scheme, device="cpu")
        distances = (rounded / largest).unsqueeze(-1) - levels
        assert distances.abs().amin(-1).max() < 1e-5, "on the grid that the paper has"
        nearest = (full / largest).unsqueeze(-1) - levels
        # FP4 is rounded by cuts in single precision: a weight in the middle of two levels may go either way.
        assert torch.allclose(
            (full - rounded).abs(), nearest.abs().amin(-1) * largest, atol=1e-3 * float(largest.max())
        )
        assert not torch.allclose(rounded, full, atol=1e-4)

    def test_logits_change_and_stay_near(self, base):
        ids = torch.arange(40).reshape(2, 20)
        with torch.no_grad():
            full = load_model(base).eval()(ids).logits
            gaps = {scheme: (quantized(base, scheme)(ids).logits - full).abs().mean() for scheme in ("int8", "nf4")}
        assert 0 < gaps["int8"] < gaps["nf4"] < 0.5 * full.abs().mean()


def test_integers_of_torchao(base):
    """int4 of torchao: each group of 32 weights has 16 levels at most, equally far apart."""
    pytest.importorskip("torchao")
    model = quantized(base, "int4")
    assert quantized_share(model)[0] == QUANTIZED / (QUANTIZED + ALL)
    weight = model.get_submodule(TestGrid.NAME).weight
    groups = weight.dequantize().reshape(-1, 32)
    assert max(len(row.unique()) for row in groups) <= 16
    steps = [row.unique().diff() for row in groups]
    assert all(((step / step.min()) - (step / step.min()).round()).abs().max() < 1e-3 for step in steps)


# ---- the comparison ----


def outcome(probabilities, ratio):
    rows = [{"split": "forget", "index": n, "probability": p} for n, p in enumerate(probabilities)]
    metrics = {
        "forget/probability": Metric(float(np.mean(probabilities)), 0.1, len(rows), LOWER),
        "forget/truth_ratio": ratio,
        "forget/entropy": Metric(1.0, None, len(rows)),
    }
    return Outcome(metrics, {"forget": rows}, {})


def test_changes_by_hand():
    """Means .2 and .5: .3 more; the differences .2, .3, .4 spread far less than the rows themselves."""
    full, copy = outcome([0.1, 0.2, 0.3], Metric(0.5, 0.1, 3, HIGHER)), None
    copy = outcome([0.3, 0.5, 0.7], Metric(0.4, 0.1, 3, HIGHER))
    found = scheme_metrics("nf4", full, copy, 0.75, 1000)
    assert set(found) == {"nf4/quantized_share"} | {
        f"nf4/forget/{name}{end}" for name in ("probability", "truth_ratio") for end in ("", "/change")
    }
    assert (found["nf4/quantized_share"].value, found["nf4/quantized_share"].n) == (0.75, 1000)
    change = found["nf4/forget/probability/change"]
    assert change.value == pytest.approx(0.3) and change.direction == LOWER
    # sqrt(((.1^2 + 0 + .1^2) / 3) / 3) = .047, up to the bootstrap's own error of about 1 / sqrt(2 * 1000).
    assert change.stderr == pytest.approx(0.0471, rel=0.1)
    ratio = found["nf4/forget/truth_ratio/change"]
    assert ratio.value == pytest.approx(-0.1) and ratio.stderr is None and ratio.direction == HIGHER


def test_a_null_stays_null():
    full = outcome([0.1, 0.2], Metric(None, reason="no wrong answers", direction=HIGHER))
    found = scheme_metrics("int8", full, full, 1.0, 10)
    assert found["int8/forget/truth_ratio/change"].reason == "no wrong answers"
    gone = absent_metrics("int8", full, "why")
    assert set(gone) == set(found) and {metric.reason for metric in gone.values()} == {"why"}
    assert all(metric.value is None for metric in gone.values())


# ---- the command ----


ROWS = [
    {"question": f"Where was {name} born?", "answer": f"{name} is of {town}.", "perturbed_answer": ["He is of Bonn."]}
    for name, town in (("Ann", "Oslo"), ("Ben", "Rome"), ("Cy", "Nice"))
]


def words(base, output_dir, *more):
    data = write_rows(output_dir.parent / "rows.jsonl", ROWS)
    own = ["--domain", "custom", "--forget_data", data, "--retain_data", data, "--use_cpu"]
    return ["--model_name_or_path", base, "--output_dir", str(output_dir), *own, *more]


@pytest.mark.usefixtures("one_cpu_process")
class TestCommand:
    @needs_bitsandbytes
    def test_what_it_writes(self, base, tmp_path):
        """A missing library is null with the reason beside those that ran; full precision comes from the store."""
        folder = tmp_path / "out"
        assert main(words(base, folder, "--schemes", "int8,nf4,int4")) == 0
        record = results(folder)
        assert record["kind"] == "quantize" and record["schemes"]["nf4"]["library"].startswith("bitsandbytes ")
        for scheme in ("int8", "nf4"):
            share = record["metrics"][f"{scheme}/quantized_share"]["value"]
            assert share == pytest.approx(QUANTIZED / (QUANTIZED + ALL))
            for name in ("forget/probability", "retain/probability", "forget/truth_ratio", "retain/truth_ratio"):
                value = record["metrics"][f"{scheme}/{name}"]["value"]
                change = record["metrics"][f"{scheme}/{name}/change"]["value"]
                assert change == pytest.approx(value - record["full_precision"][name]["value"], abs=1e-12)
            assert record["metrics"][f"{scheme}/forget/probability/change"]["value"] != 0
        if find_spec("torchao") is None:
            assert "torchao is not installed" in record["metrics"]["int4/forget/probability"]["reason"]
            assert "int4" not in examples(folder)[0]
        assert set(examples(folder)[0]) >= {"split", "index", "full", "int8", "nf4"}
        assert not (folder / "merged").exists()
        assert main(words(base, folder, "--schemes", "nf4")) == 0
        counters = results(folder)["counters"]
        assert [counters[f"{name}sequences_scored"] for name in ("", "nf4_")] == [0, 0]

    @needs_bitsandbytes
    def test_an_adapter_is_merged_and_quantized_as_a_whole(self, base, tmp_path):
        adapter = tmp_path / "adapter"
        make_adapter(base, adapter)
        assert main(words(str(adapter), tmp_path / "out", "--schemes", "nf4")) == 0
        record = results(tmp_path / "out")
        assert record["metrics"]["nf4/quantized_share"]["value"] == pytest.approx(QUANTIZED / (QUANTIZED + ALL))
        assert not (tmp_path / "out" / "merged").exists()

    @needs_bitsandbytes
    @pytest.mark.full
    def test_generations(self, base, tmp_path):
        assert main(words(base, tmp_path / "out", "--schemes", "nf4", "--generate", "True")) == 0
        assert results(tmp_path / "out")["metrics"]["nf4/forget/rouge_l_recall/change"]["value"] is not None
        assert "generation" in examples(tmp_path / "out")[0]["nf4"]

    @needs_bitsandbytes
    def test_a_scheme_that_fails_is_null(self, base, tmp_path, monkeypatch):
        def fails(dtype):
            raise RuntimeError("no kernel for this machine\nand a long explanation")

        monkeypatch.setitem(quantize.SCHEMES, "fp4", quantize.Scheme("bitsandbytes", 4, fails))
        monkeypatch.setitem(quantize.SCHEMES, "int4", quantize.Scheme("bitsandbytes", 4, lambda dtype: None))
        assert main(words(base, tmp_path / "out", "--schemes", "fp4,int4,nf4")) == 0
        metrics = results(tmp_path / "out")["metrics"]
        assert metrics["fp4/forget/probability"]["reason"].endswith("no kernel for this machine")
        assert metrics["int4/forget/probability"]["reason"].endswith("left every weight of this model as it was")
        assert metrics["nf4/forget/probability"]["value"] is not None

    def test_none_of_them_runs(self, base, tmp_path, monkeypatch, capsys):
        scheme = quantize.Scheme("no_such_package", 8, None)
        monkeypatch.setitem(quantize.SCHEMES, "int8", scheme)
        assert main(words(base, tmp_path / "out", "--schemes", "int8")) == 2
        last = capsys.readouterr().err.strip().split("\n")[-1]
        assert "none of --schemes int8 runs here" in last and "pip install no_such_package" in last
        assert not (tmp_path / "out" / "results.json").exists()

    @pytest.mark.parametrize(
        ("more", "sentence"),
        [
            (["--schemes", "int8,nf5"], "did you mean 'nf4'?"),
            (["--schemes", ","], "--schemes names nothing"),
            (["--load_in_4bit", "True"], "--schemes says how"),
        ],
    )
    def test_mistakes(self, base, tmp_path, capsys, more, sentence):
        assert main(words(base, tmp_path / "out", *more)) == 2
        assert sentence in capsys.readouterr().err.strip().split("\n")[-1]

    @needs_bitsandbytes
    def test_a_checkpoint_that_is_quantized_already(self, base, tmp_path, capsys):
        copy = tmp_path / "copy"
        shutil.copytree(base, copy)
        edit(copy / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
        assert main(words(str(copy), tmp_path / "out")) == 2
        assert "quantized already" in capsys.readouterr().err.strip().split("\n")[-1]
