"""Affine maps between hidden states: the numbers, any number of processes, whose map it is, and published ones."""

import copy
import importlib.util
import json
import logging

import numpy as np
import pytest
import ranks
import torch
from safetensors.torch import load_file, save_file
from sklearn.linear_model import Ridge
from tiny_architectures import make_model

from llm_unlearn.affine import METADATA, WEIGHTS, AffineMaps
from llm_unlearn.affine_fitting import Batches, Moments, Residuals, StatePairs, fit, fit_ridge, fit_svcca, measure
from llm_unlearn.data.tokenize import IGNORED
from llm_unlearn.errors import UserError, run_cli


def fit_affine_map(argv):
    """Run utils/fit_affine_map.py, which is not importable, as its command line does; a rank's `main`."""
    spec = importlib.util.spec_from_file_location("fit_affine_map", ranks.ROOT / "utils/fit_affine_map.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return run_cli(lambda: module.main(argv))


def moments_of(x, y, with_yy=False, step=5):
    """Sums over the rows of two arrays, a few at a time."""
    x, y = torch.as_tensor(x), torch.as_tensor(y)
    sums = Moments.zeros(x.shape[1], y.shape[1], "cpu", with_yy)
    for first in range(0, len(x), step):
        sums.add(x[first : first + step], y[first : first + step])
    return sums


def related(count=200, size=7, out=5, seed=0):
    """States (count, size) with unequal variances and means, and (count, out) that depend on some of them."""
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(count, size)) * np.arange(1, size + 1) + 3
    y = x @ generator.normal(size=(size, out)) + generator.normal(size=(count, out)) - 2
    return x, y


def rows(count, seed, vocabulary=96):
    """Token rows of different lengths with a prompt of two tokens."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randint(3, vocabulary, (5 + n % 7,), generator=generator).tolist() for n in range(count)]
    return [{"input_ids": ids, "labels": [IGNORED] * 2 + ids[2:]} for ids in drawn]


# ---- The numbers ----


def test_ridge_worked_out_by_hand():
    """x = 0, 2, 4 and y = 1, 2, 6: means 2 and 3, C_xx = 8, C_xy = 10, so W = 10 / (8 + 2) = 1 and b = 3 - 2 = 1."""
    weight, bias = fit_ridge(moments_of([[0.0], [2.0], [4.0]], [[1.0], [2.0], [6.0]], step=2), alpha=2.0)
    assert weight.tolist() == [[1.0]] and bias.tolist() == [1.0]


def test_ridge_equals_sklearn():
    x, y = related()
    weight, bias = fit_ridge(moments_of(x, y), 0.7)
    expected = Ridge(alpha=0.7).fit(x, y)
    np.testing.assert_allclose(weight, expected.coef_, rtol=1e-9)
    np.testing.assert_allclose(bias, expected.intercept_, rtol=1e-9)


def test_svcca_equals_canonical_correlations_of_the_reduced_states():
    """The textbook way, from all states: SVD of each side, orthonormal bases, SVD of their product."""
    x, y = related()
    weight, bias, correlations = fit_svcca(moments_of(x, y, with_yy=True), 0.9)
    reduced = []
    for states in (x, y):
        centered = states - states.mean(0)
        left, scales, right = np.linalg.svd(centered, full_matrices=False)
        kept = int(np.searchsorted(np.cumsum(scales**2) / np.sum(scales**2), 0.9)) + 1
        assert kept < states.shape[1]
        reduced.append((left[:, :kept], scales[:kept], right[:kept]))
    (x_basis, _, _), (y_basis, y_scales, y_right) = reduced
    expected = np.linalg.svd(x_basis.T @ y_basis, compute_uv=False)
    np.testing.assert_allclose(correlations, expected, rtol=1e-9)
    # The prediction is the projection of the reduced y on the reduced x.
    predicted = x_basis @ (x_basis.T @ (y_basis * y_scales @ y_right)) + y.mean(0)
    np.testing.assert_allclose(x @ weight.numpy().T + bias.numpy(), predicted, rtol=1e-8)


def test_svcca_with_all_directions_is_least_squares():
    x, y = related()
    sums = moments_of(x, y, with_yy=True)
    (weight, bias, correlations), (expected, offset) = fit_svcca(sums, 1.0), fit_ridge(sums, 1e-12)
    torch.testing.assert_close(weight, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(bias, offset, rtol=1e-9, atol=1e-9)
    assert ((0 < correlations) & (correlations <= 1)).all()


def test_a_direction_without_variance_is_left_out():
    x, y = related(size=4)
    x = np.concatenate([x, np.full((len(x), 1), 5.0), x[:, :1] * 2], 1)
    weight, bias, _ = fit_svcca(moments_of(x, y, with_yy=True), 1.0)
    expected = np.linalg.lstsq(np.c_[x[:, :4], np.ones(len(x))], y, rcond=None)[0]
    np.testing.assert_allclose(x @ weight.numpy().T + bias.numpy(), np.c_[x[:, :4], np.ones(len(x))] @ expected, 1e-7)


def test_errors_on_held_out_tokens_worked_out_by_hand():
    """y = 1, 3 and mapped = 1, 2: squared error 1 over 2 values; around the mean 2 the squares sum to 2, R^2 = 1/2."""
    found = Residuals(1, "cpu")
    for x, y, mapped in ((0.0, 1.0, 1.0), (3.0, 3.0, 2.0)):
        found.add(torch.tensor([[x]]), torch.tensor([[y]]), torch.tensor([[mapped]]))
    assert found.report() == {"mse": 0.5, "identity_mse": 0.5, "r2": 0.5, "tokens": 2}


def test_no_token_or_none_finite_is_refused():
    with pytest.raises(UserError, match="no token that counts"):
        fit_ridge(Moments.zeros(2, 2, "cpu"), 0.1)
    with pytest.raises(UserError, match="NaN or infinite"):
        fit_ridge(moments_of([[float("nan")], [1.0]], [[1.0], [2.0]]), 0.1)


# ---- Between models ----


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gpt2"])
def test_a_map_is_fitted_between_the_outputs_of_one_layer(name):
    """hidden_states[l + 1] of both models at the tokens that count; not what layer l gets, and no padding."""
    teacher, target = make_model(name).eval(), make_model(name).eval()
    torch.manual_seed(1)
    for parameter in target.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    data = rows(12, 3)
    pairs = StatePairs(copy.deepcopy(teacher), copy.deepcopy(target), [1, 3], torch.device("cpu"))
    found, tokens = fit(pairs, Batches(data, 5), lambda sums: fit_ridge(sums, 0.01))
    assert tokens == sum(len(row["input_ids"]) - 2 for row in data)
    x, y = [], []
    with torch.no_grad():
        for row in data:
            ids = torch.tensor([row["input_ids"]])
            for model, states in ((teacher, x), (target, y)):
                states.append(model(ids, output_hidden_states=True).hidden_states[2][0, 2:])
    expected = Ridge(alpha=0.01).fit(torch.cat(x).double(), torch.cat(y).double())
    # States in float32 from other batches; the ridge is weak, so that the error grows.
    np.testing.assert_allclose(found[1][0], expected.coef_, atol=1e-3 * np.abs(expected.coef_).max())


def test_the_identity_is_recovered_between_equal_models():
    """W = C (C + alpha I)^-1, which is I up to alpha over the smallest direction's scatter."""
    pairs = StatePairs(make_model(), make_model(), None, torch.device("cpu"))
    assert pairs.layers == [0, 1, 2, 3, 4]
    data = rows(40, 4)
    found, _ = fit(pairs, Batches(data, 8), lambda sums: fit_ridge(sums, 1e-8))
    for weight, bias in found.values():
        torch.testing.assert_close(weight, torch.eye(32, dtype=torch.float64), rtol=0, atol=1e-3)
        assert bias.abs().max() < 1e-3
    maps = AffineMaps(found, {})
    report = measure(pairs, Batches(rows(9, 5), 4), maps)
    assert all(part["r2"] > 0.999999 and part["identity_mse"] == 0 for part in report.values())


def test_layers_that_one_model_lacks_are_refused():
    with pytest.raises(UserError, match="layer 2 does not exist: the teacher has layers 0 to 1"):
        StatePairs(make_model(num_hidden_layers=2), make_model(), [2], torch.device("cpu"))
    with pytest.raises(UserError, match="the target model has layers 0 to 4"):
        StatePairs(make_model(num_hidden_layers=9), make_model(), [7], torch.device("cpu"))


# ---- The script, and whose map it is ----


def words(world, folder, *flags):
    return [
        "--teacher_model_name_or_path", world["base"], "--target_model_name_or_path", world["model"], "--domain",
        "custom", "--forget_data", world["forget"], "--retain_data", world["retain"], "--output_dir", str(folder),
        "--use_cpu", "True", *map(str, flags),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def fitted(tiny_world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("affine") / "map"
    assert fit_affine_map(words(tiny_world, folder, "--alpha", 0.1)) == 0
    return folder


def test_the_script_writes_maps_errors_and_both_models(fitted, tiny_world):
    metadata = json.loads((fitted / METADATA).read_text())
    assert metadata["layer_indices"] == [0, 1] and metadata["alpha"] == 0.1 and metadata["kind"] == "ridge"
    assert metadata["teacher"]["name"] == tiny_world["base"] and len(metadata["target"]["fingerprint"]) == 64
    assert metadata["rows"] == {"fitted": 21, "held_out": 2} and metadata["tokens"] > 300
    held_out = metadata["held_out"]
    # The target was trained away from the base, so that a map helps; these few rows explain a good part of it.
    assert all(part["mse"] < part["identity_mse"] and part["r2"] > 0.2 for part in held_out.values())
    tensors = load_file(fitted / WEIGHTS)
    assert tensors["layer_1.weight"].shape == (128, 128) and tensors["layer_1.weight"].dtype == torch.float32


def test_svcca_by_the_script(tiny_world, tmp_path, capsys):
    flags = ["--kind", "svcca", "--layers", 1, "--fit_data", tiny_world["retain"]]
    given = words(tiny_world, tmp_path / "map", *flags)
    assert fit_affine_map(given) == 2
    assert "--domain has no effect with --fit_data" in capsys.readouterr().err.splitlines()[-1]
    without = {"--domain", "--forget_data", "--retain_data"}
    given = [word for n, word in enumerate(given) if word not in without and given[n - 1] not in without]
    assert fit_affine_map(given) == 0
    metadata = json.loads((tmp_path / "map" / METADATA).read_text())
    assert metadata["svd_variance"] == 0.99 and 0 < metadata["svcca"]["1"]["similarity"] <= 1
    assert metadata["rows"] == {"fitted": 12, "held_out": 1} and "alpha" not in metadata
    assert "without a map" in capsys.readouterr().out


@pytest.mark.distributed
def test_two_processes_fit_the_same_map(fitted, tiny_world, tmp_path):
    given = words(tiny_world, tmp_path / "two", "--alpha", 0.1)
    outcome = ranks.run(fit_affine_map, given, processes=2)
    assert outcome.codes == [0, 0], outcome
    one, two = load_file(fitted / WEIGHTS), load_file(tmp_path / "two" / WEIGHTS)
    for name, expected in one.items():
        # The same states in the same batches, added up in float64 in another order, and stored in float32.
        torch.testing.assert_close(two[name], expected, rtol=2e-7, atol=1e-9 * float(expected.abs().max()))
    reports = [json.loads((folder / METADATA).read_text()) for folder in (fitted, tmp_path / "two")]
    assert reports[0]["tokens"] == reports[1]["tokens"]
    assert reports[1]["held_out"]["0"] == pytest.approx(reports[0]["held_out"]["0"], rel=1e-6)


def test_moments_of_two_halves_add_up_to_the_whole():
    """What two ranks hold, summed: the maps agree to 1e-9 although the order of the additions differs."""
    x, y = related(count=400)
    whole = moments_of(x, y, with_yy=True)
    halves = [moments_of(x[part::2], y[part::2], with_yy=True) for part in (0, 1)]
    added = Moments(*(vars(halves[0])[name] + vars(halves[1])[name] for name in vars(whole)))
    for solve in (lambda sums: fit_ridge(sums, 0.01), lambda sums: fit_svcca(sums, 0.95)):
        for one, two in zip(solve(whole), solve(added), strict=True):
            torch.testing.assert_close(two, one, rtol=1e-9, atol=1e-9 * float(one.abs().max()))


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--kind", "svcca", "--alpha", 1], "--alpha has no effect with --kind svcca"),
        (["--svd_variance", 0.9], "--svd_variance has no effect with --kind ridge"),
        (["--alpha", 0], "--alpha must be > 0"),
        (["--layers", 2], "layer 2 does not exist: the teacher has layers 0 to 1"),
        (["--held_out_share", 1], "--held_out_share must lie between 0 and 1"),
        (["--lr", 1], "unknown flag '--lr'"),
    ],
)
def test_flags_that_cannot_be(flags, message, tiny_world, tmp_path, capsys):
    assert fit_affine_map(words(tiny_world, tmp_path / "map", *flags)) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "map").exists()


def test_a_folder_with_other_files_is_not_written_into(fitted, tiny_world, capsys):
    assert fit_affine_map(words(tiny_world, fitted)) == 2
    assert "is not empty; pass --overwrite_output_dir" in capsys.readouterr().err.splitlines()[-1]


def test_a_map_of_other_models_is_refused_naming_both(fitted, tiny_world):
    maps = AffineMaps.load(fitted)
    right = {role: maps.metadata[role] for role in ("teacher", "target")}
    maps.require_models(right["teacher"], right["target"])
    maps.require_models(right["teacher"], None)
    other = {"name": "elsewhere", "revision": "step7", "fingerprint": "f" * 64}
    with pytest.raises(
        UserError, match=rf"the teacher '{tiny_world['base']}' .*is 'elsewhere' at step7 \(ffffffffffff"
    ):
        maps.require_models(other, right["target"])
    with pytest.raises(UserError, match="this run's target is 'elsewhere'"):
        maps.require_models(right["teacher"], other)
    with pytest.raises(UserError, match="has none for layer 5; pass --layers with some of 0 1"):
        maps.only([0, 5])


def test_published_maps_are_read_with_a_warning_and_moved_to_the_layer_whose_output_they_are_of(tmp_path, caplog):
    tensors = {}
    for layer in (0, 1, 2):
        tensors[f"layer_{layer}.weight"] = torch.full((3, 3), float(layer))
        tensors[f"layer_{layer}.bias"] = torch.zeros(3)
    save_file(tensors, tmp_path / WEIGHTS)
    (tmp_path / METADATA).write_text(json.dumps({"layer_indices": [0, 1, 2], "hidden_dim": 3, "alpha": 0.01}))
    with caplog.at_level(logging.WARNING):
        maps = AffineMaps.load(tmp_path)
    assert "does not say which models it belongs to" in caplog.text
    assert list(maps.maps) == [0, 1] and maps.maps[0][0][0, 0] == 1 and maps.sizes == (3, 3)
    maps.require_models({"name": "any"}, {"name": "other"})
    assert maps(1, torch.ones(2, 4, 3)).tolist() == [[[6.0] * 3] * 4] * 2


@pytest.mark.parametrize("broken", ["no weights", "no metadata", "a layer", "a shape", "not json", "nan"])
def test_a_broken_folder_is_refused_in_one_sentence(broken, tmp_path):
    tensors = {"layer_0.weight": torch.eye(3), "layer_0.bias": torch.zeros(3)}
    if broken == "a shape":
        tensors["layer_0.bias"] = torch.zeros(4)
    if broken == "nan":
        tensors["layer_0.bias"][1] = float("nan")
    if broken != "no weights":
        save_file(tensors, tmp_path / WEIGHTS)
    layers = [0, 1] if broken == "a layer" else [0]
    if broken != "no metadata":
        text = json.dumps({"layer_indices": layers, "hidden_dim": 3})
        (tmp_path / METADATA).write_text(text[:-1] if broken == "not json" else text)
    with pytest.raises(UserError, match=f"affine map.*'?{tmp_path.name}|{tmp_path.name}.*affine map"):
        AffineMaps.load(tmp_path)
