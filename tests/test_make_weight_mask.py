"""utils/make_weight_mask.py: scores of a real model, the same bytes on any number of processes, reports, refusals."""

import importlib.util
import json
from fractions import Fraction
from pathlib import Path

import pytest
import ranks
import torch

from llm_unlearn.addons.mask_files import linear_weights, read_mask
from llm_unlearn.addons.mask_report import decades, place_of
from llm_unlearn.addons.wagle import wagle
from llm_unlearn.data.tokenize import TokenizeOptions, tokenize_rows
from llm_unlearn.errors import run_cli
from llm_unlearn.models import load_model, load_tokenizer, model_fingerprint

SCRIPT = Path(__file__).parents[1] / "utils/make_weight_mask.py"


def run(words):
    """Be utils/make_weight_mask.py, once for each part of the words between '+'; ranks are forked with it."""
    spec = importlib.util.spec_from_file_location("make_weight_mask", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def parts():
        for part in " ".join(map(str, words)).split(" + "):
            module.main(part.split())

    return run_cli(parts)


def words(world, output, *flags):
    """Return a command line on the tiny world."""
    given = ["--target_model_name_or_path", world["model"], "--domain", "custom", "--forget_data", world["forget"]]
    given += ["--retain_data", world["retain"], "--use_cpu", "True", "--output", output]
    given += [] if "--ratio" in flags else ["--ratio", "0.8"]
    return [str(word) for word in (*given, *flags)]


def make(world, output, *flags):
    """Make one mask that must succeed; returns MaskFile."""
    assert run(words(world, output, *flags)) == 0
    return read_mask(output)


@pytest.fixture(scope="module")
def gradients(tiny_world):
    """(parameters, forget gradient, retain gradient) of the mean per token: autograd, row by row in float64."""
    model = load_model(tiny_world["model"], "float64").eval()
    tokenizer, found = load_tokenizer(tiny_world["model"]), []
    for name, count in (("forget", 10), ("retain", 13)):
        rows = [json.loads(line) for line in Path(tiny_world[name]).read_text().splitlines()]
        losses = []
        for row in tokenize_rows(rows, tokenizer, TokenizeOptions()):
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"][1:])
            logps = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            losses.append(-logps[labels != -100, labels[labels != -100]])
        assert len(losses) == count
        found.append(torch.autograd.grad(torch.cat(losses).mean(), list(model.parameters())))
    return dict(model.named_parameters()), *found


def flat(mask):
    return torch.cat([mask.bits(name).flatten() for name in mask.shapes])


# ---- What is in the file ----


def test_wagle_masks_of_three_ratios_from_one_pass(tiny_world, gradients, tmp_path, capsys):
    """Against scores by autograd in float64; near the threshold float32 may decide otherwise for one in a thousand."""
    flags = ["--ratio", "0.05,0.5,0.95", "--gamma", "1e-4", "--max_retain_rows", "13"]
    assert run(words(tiny_world, tmp_path / "mask", *flags)) == 0
    parameters, forget, retain = gradients
    parts = zip(parameters.values(), forget, retain, strict=True)
    scores = torch.cat([wagle(weights.detach(), f, r, 1e-4).flatten() for weights, f, r in parts])
    for ratio in ("0.05", "0.5", "0.95"):
        mask = read_mask(tmp_path / "mask" / f"custom_{ratio}.safetensors")
        assert mask.shapes == {name: tuple(p.shape) for name, p in parameters.items()}
        found = flat(mask)
        assert int(found.sum()) == int(Fraction(ratio) * len(found))
        expected = torch.zeros_like(found)
        expected[scores.topk(int(found.sum())).indices] = True
        assert (found != expected).float().mean() < 1e-3
        assert mask.record == {
            "format_version": "1", "domain": "custom", "ratio": ratio, "score": "wagle", "gamma": "0.0001",
            "scope": "global", "forget_loss": "nll", "seed": "42", "model": tiny_world["model"],
            "model_hash": model_fingerprint(tiny_world["model"]), "data": mask.record["data"],
        }  # fmt: skip
        assert set(json.loads(mask.record["data"])) == {"forget", "retain"}
    assert capsys.readouterr().out == ""


def test_layers_are_ranked_by_themselves(tiny_world, tmp_path):
    mask = make(tiny_world, tmp_path / "mask.safetensors", "--score", "magnitude", "--scope", "layer")
    sizes = {}
    for name in mask.shapes:
        layer = place_of(name)[0]
        key = name if layer is None else layer
        sizes.setdefault(key, []).append(mask.bits(name).flatten())
    assert len(sizes) == 2 + 2
    for parts in sizes.values():
        bits = torch.cat(parts)
        assert int(bits.sum()) == int(Fraction("0.8") * len(bits))
    weights = dict(load_model(tiny_world["model"]).named_parameters())
    layer = [name for name in mask.shapes if ".layers.1." in name]
    sizes, bits = (
        torch.cat([part[n].flatten() for n in layer]) for part in (weights, {n: mask.bits(n) for n in layer})
    )
    assert sizes[~bits].abs().max() <= sizes[bits].abs().min()


def test_random_masks_follow_the_seed(tiny_world, tmp_path):
    found = [
        flat(make(tiny_world, tmp_path / f"{name}.safetensors", "--score", "random", "--ratio", "0.3", "--seed", seed))
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    assert torch.equal(found[0], found[1]) and int(found[0].sum()) == int(0.3 * len(found[0]))
    assert (found[0] & found[2]).float().mean().item() == pytest.approx(0.09, abs=0.005)


def test_refusals_are_those_of_po(tiny_world, tmp_path):
    """Drawn by the seed for each row; the gradient is another one than that of the answers."""
    scores = ["--score", "grad_norm", "--ratio", "0.1"]
    masks = {
        name: make(tiny_world, tmp_path / f"{name}.safetensors", *scores, *flags)
        for name, flags in (
            ("nll", []), ("refusal", ["--forget_loss", "refusal"]),
            ("again", ["--forget_loss", "refusal"]), ("other", ["--forget_loss", "refusal", "--seed", "1"]),
        )
    }  # fmt: skip
    assert masks["refusal"].record["forget_loss"] == "refusal"
    assert masks["refusal"].sha256 == masks["again"].sha256
    assert not torch.equal(flat(masks["refusal"]), flat(masks["nll"]))
    assert not torch.equal(flat(masks["refusal"]), flat(masks["other"]))


def test_refusals_of_a_file_are_what_is_scored(tiny_world, tmp_path):
    """The refusal of the rows' own column gives the mask that the same refusal from a file gives."""
    (tmp_path / "refusals.txt").write_text("Let us not.\n")
    rows = [json.loads(line) for line in Path(tiny_world["forget"]).read_text().splitlines()]
    told = tmp_path / "told.jsonl"
    told.write_text("\n".join(json.dumps({**row, "preferred": "Let us not."}) for row in rows))
    flags = ["--score", "snip", "--forget_loss", "refusal"]
    first = make(tiny_world, tmp_path / "1.safetensors", *flags, "--refusal_data", tmp_path / "refusals.txt")
    second = make({**tiny_world, "forget": str(told)}, tmp_path / "2.safetensors", *flags)
    assert torch.equal(flat(first), flat(second))


def test_wanda_masks_linear_layers_alone(tiny_world, tmp_path):
    mask = make(tiny_world, tmp_path / "mask.safetensors", "--score", "wanda")
    names = {name for name, _ in linear_weights(load_model(tiny_world["model"]))}
    assert all(mask.bits(name).all() for name in mask.shapes if name not in names) and len(names) == 14
    assert int(flat(mask).sum()) == int(Fraction("0.8") * len(flat(mask))) and "scope" not in mask.record


# ---- Several processes ----


TWICE = [
    ("wagle", ["--score", "wagle", "--ratio", "0.4,0.9", "--per_device_train_batch_size", "2"]),
    ("wanda", ["--score", "wanda", "--ratio", "0.7", "--per_device_train_batch_size", "3"]),
    # In bfloat16 so many scores are equal that the last ones are chosen by their place.
    ("ties", ["--score", "magnitude", "--ratio", "0.5", "--dtype", "bfloat16", "--scope", "layer"]),
]


@pytest.mark.distributed
@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.full)])
def test_any_number_of_processes_writes_the_same_bytes(processes, tiny_world, tmp_path):
    for folder, count in (("one", 1), ("several", processes)):
        given = []
        for name, flags in TWICE:
            given += ["+"] * bool(given) + words(tiny_world, tmp_path / folder / name, *flags)
        if count == 1:
            assert run(given) == 0
        else:
            outcome = ranks.run(run, given, processes=count)
            assert outcome.codes == [0] * count, outcome
    paths = sorted((tmp_path / "one").rglob("*.safetensors"))
    assert [path.name for path in paths] == [
        "custom_0.5.safetensors",
        "custom_0.4.safetensors",
        "custom_0.9.safetensors",
        "custom_0.7.safetensors",
    ]
    for path in paths:
        assert path.read_bytes() == (tmp_path / "several" / path.relative_to(tmp_path / "one")).read_bytes()
    masks = [read_mask(path) for path in paths]
    assert all(0.39 < flat(mask).float().mean() < 0.91 for mask in masks)
    name = "model.embed_tokens.weight"
    bits, weights = masks[0].bits(name), load_model(tiny_world["model"], "bfloat16").get_parameter(name).abs()
    tied = weights == weights[bits].min()
    assert 0 < int(bits[tied].sum()) < int(tied.sum())


# ---- The report ----


def test_the_report(tiny_world, tmp_path, capsys):
    other = make(tiny_world, tmp_path / "other.safetensors", "--score", "random", "--ratio", "0.5")
    capsys.readouterr()
    flags = ["--score", "magnitude", "--ratio", "0.5", "--report", "True", "--compare", other.path]
    mask = make(tiny_world, tmp_path / "mask.safetensors", *flags)
    said = capsys.readouterr().out
    rows = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
        for line in said.splitlines()
        if line.startswith("|")
    }
    assert rows["model"][-1] == "0.5000"
    shown = [mask.bits(f"model.layers.1.mlp.{kind}.weight").float().mean() for kind in ("gate_proj", "up_proj")]
    assert rows["1"][4:6] == [f"{share:.4f}" for share in shown]
    here, there, both, independent, jaccard = map(float, rows["all"])
    assert here == there == 0.5 and independent == 0.25
    assert both == pytest.approx((flat(mask) & flat(other)).float().mean().item(), abs=1e-4)
    assert jaccard == pytest.approx(both / (1 - both), abs=1e-3)
    weights = torch.cat([p.flatten() for p in load_model(tiny_world["model"]).parameters()]).abs()
    in_decade = ((weights >= 0.01) & (weights < 0.1)).float().mean().item()
    assert float(rows["1e-02"][1]) == pytest.approx(in_decade, abs=0.01)


def test_decades_by_hand():
    counts = torch.zeros(2**15, dtype=torch.int64)
    for value, number in ((0.0, 7), (1.0, 3), (1.5, 2), (20.0, 1), (0.03, 4)):
        counts[torch.tensor(value).view(torch.int32) >> 16] += number
    assert decades(counts) == [(1, 1), (0, 5), (-2, 4), (None, 7)]


def test_places_of_parameters():
    assert place_of("model.layers.3.mlp.down_proj.weight") == (3, "down_proj")
    assert place_of("transformer.h.0.attn.c_attn.bias") == (0, "c_attn")
    assert place_of("model.embed_tokens.weight") == (None, "embed_tokens")
    assert place_of("model.layers.1.mlp.experts.4.w1.weight") == (1, "w1")


# ---- Refusals ----


BAD = {
    "no ratio": (
        ["--ratio", "0"],
        "--ratio must be numbers above 0 and up to 1, with commas as in 0.4,0.8, but has '0'",
    ),
    "a share above one": (["--ratio", "0.8,1.2"], "but has '1.2'"),
    "a fraction": (["--ratio", "4/5"], "but has '4/5'"),
    "no number": (["--ratio", "most"], "but has 'most'"),
    "a file for two": (["--ratio", "0.4,0.8", "--output", "m.safetensors"], "is one file for 2 ratios; pass a folder"),
    "a pickle": (["--output", "m.pt"], "masks are written as safetensors; pass --output m.safetensors"),
    "score": (["--score", "waggle"], "--score: invalid choice: 'waggle' (choose from 'wagle', "),
    "gamma": (["--gamma", "0"], "--gamma must be above 0, and finite, but is 0.0"),
    "gamma elsewhere": (["--score", "snip", "--gamma", "1"], "--gamma has no effect with --score snip"),
    "forget loss": (
        ["--score", "magnitude", "--forget_loss", "refusal"],
        "--forget_loss has no effect with --score ma",
    ),
    "scope": (["--score", "wanda", "--scope", "layer"], "--scope has no effect with --score wanda"),
    "retain rows": (["--score", "snip", "--max_retain_rows", "3"], "--max_retain_rows has no effect with --score snip"),
    "refusals": (["--refusal_data", "x"], "--refusal_data has no effect without --forget_loss refusal"),
    "compare": (["--compare", "x"], "--compare has no effect without --report True"),
    "batch": (["--per_device_train_batch_size", "0"], "--per_device_train_batch_size must be at least 1, but is 0"),
    "compared": (
        ["--report", "True", "--compare", "x.safetensors"],
        "--compare 'x.safetensors' does not exist; make it",
    ),
    "unknown": (["--scores", "snip"], "--scores"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_in_one_sentence(name, tiny_world, tmp_path, monkeypatch, capsys):
    flags, message = BAD[name]
    monkeypatch.chdir(tmp_path)
    assert run(words(tiny_world, "out", *flags)) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert message in said[-1] and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["target_model_name_or_path", "domain", "ratio", "output"])
def test_what_is_missing_is_named(name, tiny_world, capsys):
    given = words(tiny_world, "out")
    place = given.index(f"--{name}")
    assert run(given[:place] + given[place + 2 :]) == 2
    assert f"--{name} is missing" in capsys.readouterr().err.splitlines()[-1]


def test_a_mask_is_not_replaced_unasked(tiny_world, tmp_path, capsys):
    path = tmp_path / "mask.safetensors"
    first = make(tiny_world, path, "--score", "random")
    assert run(words(tiny_world, path, "--score", "magnitude")) == 2
    assert "is there already; pass --overwrite_output_dir True" in capsys.readouterr().err.splitlines()[-1]
    assert read_mask(path).sha256 == first.sha256
    make(tiny_world, path, "--score", "magnitude", "--overwrite_output_dir", "True")
    assert read_mask(path).record["score"] == "magnitude"


def test_a_set_that_the_score_reads_must_be_there(tiny_world, tmp_path, capsys):
    given = words(tiny_world, tmp_path / "out")
    place = given.index("--retain_data")
    assert run(given[:place] + given[place + 2 :]) == 2
    assert "was given no retain set; pass --retain_data FILE" in capsys.readouterr().err.splitlines()[-1]
    assert run([*given[:place], *given[place + 2 :], "--score", "snip"]) == 0
