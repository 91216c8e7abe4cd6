"""Every way to cut a step gives the same update: processes x accumulation x backend x full or LoRA x method.

The reference of each method is the plain run on one process with the whole step of eight rows in one batch.
"""

import pytest
from backends import BACKENDS, distance, train
from test_equivalence import UPDATE_TOLERANCE
from tiny_world import command, terms

pytestmark = [pytest.mark.full, pytest.mark.distributed]

METHODS = {
    "gradient_ascent": ("gradient_ascent", []),
    "grad_diff_nll": ("grad_diff", ["--retain_loss", "nll"]),
    "grad_diff_kl": ("grad_diff", ["--retain_loss", "kl"]),
    "npo": ("npo", []),
    "ascent_plus_kl_divergence": ("ascent_plus_kl_divergence", []),
    "rmu": ("rmu", ["--layer", "0", "--steering_coef", "2"]),
}
# {(processes, accumulation): rows of a micro-batch}. Of ten rows an epoch has a full step of eight and one of two.
CUTS = {(1, 1): 8, (1, 4): 2, (2, 1): 4, (2, 4): 1}
WEIGHTS = {"full": [], "lora": ["--use_peft", "True", "--lora_dropout", "0"]}
ADAMW = ["--optim", "adamw_torch", "--learning_rate", "1e-4"]
# float32 sums in another order; AdamW divides by the root of a small second moment, which makes them larger.
TERM_TOLERANCES = {"sgd": 1e-5, "adamw": 1e-4}


def words_of(world, method, weights, optimizer, cut, folder):
    method, flags = METHODS[method]
    flags = [*flags, *WEIGHTS[weights], *(ADAMW if optimizer == "adamw" else []), "--num_train_epochs", "2"]
    shape = ["--per_device_train_batch_size", CUTS[cut], "--gradient_accumulation_steps", cut[1]]
    return command(world, method, folder, *flags, *shape)


@pytest.fixture(scope="module")
def reference(tiny_world, tmp_path_factory):
    """Function of (method, weights, optimizer) that returns the folder of the reference, which is trained once."""
    folder, done = tmp_path_factory.mktemp("reference"), set()

    def find(*key):
        path = folder / "-".join(key)
        if key not in done:
            train(words_of(tiny_world, *key, (1, 1), path))
            done.add(key)
        return path

    return find


def term_deviation(first, second):
    """Return by how much two runs' terms differ at most: relative, and absolute where a term is below 1."""
    first, second = terms(first), terms(second)
    assert len(first) == len(second) == 4 and all(
        one.keys() == two.keys() for one, two in zip(first, second, strict=True)
    )
    pairs = [(one[name], two[name]) for one, two in zip(first, second, strict=True) for name in two]
    return max(abs(one - two) / max(abs(two), 1) for one, two in pairs)


def cells():
    """Every cell of the matrix but the reference itself."""
    for backend in BACKENDS:
        for cut in CUTS:
            if (backend, cut) == ("ddp", (1, 1)):
                continue
            marks = []
            if cut[0] == 1 and BACKENDS[backend].one_process is None:
                marks = [pytest.mark.skip(reason="accelerate shards with FSDP only over several processes")]
            yield pytest.param(backend, cut, id=f"{backend}-{cut[0]}x{CUTS[cut]}x{cut[1]}", marks=marks)


@pytest.mark.parametrize("backend, cut", cells())
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("method", METHODS)
def test_the_update_is_that_of_one_batch(
    method, weights, backend, cut, tiny_world, start_weights, reference, tmp_path, record_property
):
    found = train(words_of(tiny_world, method, weights, "sgd", cut, tmp_path / "out"), backend, processes=cut[0])
    expected = reference(method, weights, "sgd")
    update, term = distance(found, expected, start_weights), term_deviation(found, expected)
    record_property("deviation", [backend, "update", update])
    record_property("deviation", [backend, "terms", term])
    assert update <= UPDATE_TOLERANCE and term <= TERM_TOLERANCES["sgd"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", METHODS)
def test_the_terms_agree_with_adamw(method, backend, tiny_world, reference, tmp_path, record_property):
    words = words_of(tiny_world, method, "full", "adamw", (2, 4), tmp_path / "out")
    term = term_deviation(train(words, backend, processes=2), reference(method, "full", "adamw"))
    record_property("deviation", [backend, "terms with AdamW", term])
    assert term <= TERM_TOLERANCES["adamw"]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_another_order_of_rows_would_be_seen(weights, tiny_world, start_weights, reference, tmp_path):
    """What the tolerances must tell apart: a second step that holds other rows."""
    words = words_of(tiny_world, "npo", weights, "sgd", (1, 1), tmp_path / "out")
    other = train([*words, "--data_seed", "7"])
    expected = reference("npo", weights, "sgd")
    assert distance(other, expected, start_weights) > 50 * UPDATE_TOLERANCE
    assert term_deviation(other, expected) > 50 * TERM_TOLERANCES["sgd"]
