"""Sampling: the model's own distribution, the same samples in every batch, and leak@k of a model known by hand."""

import json
import math
import os
import string
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from eval_cases import examples, results
from tokenizers import Tokenizer, decoders, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llm_unlearn.attacks.leak_prompts import Probe, PromptingSettings
from llm_unlearn.attacks.leak_results import MAX_SHOWN, findings_of, probe_row, shown_rows
from llm_unlearn.attacks.sampling import Sampler, choose
from llm_unlearn.cli.leak import main
from llm_unlearn.evaluation.generation import Generator, Prompt
from llm_unlearn.evaluation.packing import Sequence
from llm_unlearn.evaluation.statistics import Scorer

PAD, BOS, EOS = 0, 1, 2
SIZE = 3 + len(string.ascii_lowercase)


def letter(name):
    return 3 + string.ascii_lowercase.index(name)


@pytest.fixture(scope="module")
def letters():
    """One token a letter, no white space between them."""
    words = {"<pad>": PAD, "<s>": BOS, "</s>": EOS} | {name: letter(name) for name in string.ascii_lowercase}
    tokenizer = Tokenizer(models.WordLevel(words))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def dice(table, dtype=torch.float64):
    """A Llama without attention whose next token depends on the last one alone: {token: {next token: probability}}.

    A residual stream that nothing adds to is the one-hot embedding, which the last norm makes sqrt(hidden size) long.
    """
    hidden = 32
    config = LlamaConfig(
        vocab_size=SIZE, hidden_size=hidden, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        max_position_embeddings=64, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS, rms_norm_eps=0.0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0 if parameter.dim() == 1 else 0.0)
        model.model.embed_tokens.weight[range(SIZE), range(SIZE)] = 1.0
        model.lm_head.weight.fill_(-1000.0)
        for token in range(SIZE):
            for chosen, probability in table.get(token, {EOS: 1.0}).items():
                model.lm_head.weight[chosen, token] = math.log(probability) / math.sqrt(hidden)
    return model


TABLE = {
    letter("a"): {letter("b"): 0.5, letter("c"): 0.3, EOS: 0.2},
    letter("b"): {letter("a"): 0.6, letter("b"): 0.1, EOS: 0.3},
    letter("c"): {letter("c"): 0.7, letter("a"): 0.3},
}
PROMPTS = [Prompt((BOS, letter("a")), 12), Prompt((BOS, BOS, letter("b")), 12), Prompt((letter("c"),), 9)]


def texts(samples):
    return [[sample.text for sample in one] for one in samples]


class TestChoose:
    LOGITS = torch.tensor([[0.5, 0.25, 0.0, 0.25]]).log()

    @pytest.mark.parametrize(
        ("settings", "expected"),
        [
            ({}, {0.0: 0, 0.499: 0, 0.501: 1, 0.749: 1, 0.751: 3, 1 - 2**-53: 3}),
            # The squares .25, .0625, .0625 have the shares 2/3, 1/6, 1/6.
            ({"temperature": 0.5}, {0.66: 0, 0.67: 1, 0.83: 1, 0.84: 3}),
            # Half and a quarter are left: 2/3 and 1/3.
            ({"top_p": 0.6}, {0.66: 0, 0.67: 1, 0.999: 1}),
            ({"top_p": 0.5}, {0.0: 0, 0.999: 0}),
        ],
    )
    def test_by_hand(self, settings, expected):
        uniforms = torch.tensor(list(expected), dtype=torch.float64)
        assert choose(self.LOGITS.repeat(len(expected), 1), uniforms, **settings).tolist() == list(expected.values())

    def test_a_token_of_probability_zero_is_never_drawn(self):
        logits = torch.tensor([[-math.inf, 0.0, -math.inf]]).repeat(3, 1)
        uniforms = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)  # 1.0: what rounding makes of the largest
        assert choose(logits, uniforms).tolist() == [1, 1, 1]


class TestDistribution:
    @pytest.mark.parametrize(("settings", "power"), [({}, 1.0), ({"temperature": 0.5}, 2.0)])
    def test_of_a_known_model(self, letters, settings, power):
        """4,000 samples of two tokens; a share strays from its probability by less than 4 standard errors."""
        count = 4000
        samples = Sampler(dice(TABLE), letters, PAD, **settings).sample([Prompt((letter("a"),), 2)], count)[0]
        squared = {token: {n: p**power for n, p in row.items()} for token, row in TABLE.items()}
        chances = {token: {n: p / sum(row.values()) for n, p in row.items()} for token, row in squared.items()}
        start = chances[letter("a")]
        expected = {"": start[EOS]}
        for first in "bc":
            for then, chance in chances[letter(first)].items():
                text = first + ("" if then == EOS else string.ascii_lowercase[then - 3])
                expected[text] = start[letter(first)] * chance
        assert sum(expected.values()) == pytest.approx(1)
        found = {text: sum(sample.text == text for sample in samples) / count for text in expected}
        assert sum(found.values()) == pytest.approx(1)
        for text, chance in expected.items():
            assert abs(found[text] - chance) < 4 * math.sqrt(chance * (1 - chance) / count), text

    def test_of_questions_and_samples_differ(self, letters):
        """Each prompt and each number has its own random numbers: as many different texts as the model can write."""
        found = texts(Sampler(dice(TABLE), letters, PAD).sample(PROMPTS, 30))
        assert all(len(set(one)) > 10 for one in found)
        twins = [Prompt((BOS,) * n + (letter("a"),), 12) for n in range(2)]
        first, second = texts(Sampler(dice(TABLE), letters, PAD).sample(twins, 30))
        assert first != second


class TestReproducible:
    @pytest.fixture(scope="class")
    def expected(self, letters):
        return texts(Sampler(dice(TABLE), letters, PAD, seed=3).sample(PROMPTS, 20))

    @pytest.mark.parametrize(
        "bounds", [{}, {"max_sequences": 1}, {"max_sequences": 7}, {"max_tokens": 60}, {"folder": "here"}]
    )
    def test_in_every_batch(self, letters, expected, bounds, tmp_path):
        bounds = {**bounds, "folder": tmp_path} if "folder" in bounds else bounds
        assert texts(Sampler(dice(TABLE), letters, PAD, seed=3, **bounds).sample(PROMPTS, 20)) == expected

    def test_whatever_stands_before_in_the_batch(self, letters):
        """A model with attention, prompts of unlike length: padding and copies of the cache change no sample."""
        config = LlamaConfig(
            vocab_size=SIZE, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=64, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS,
        )  # fmt: skip
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).to(torch.float64).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0, 0.4) if parameter.dim() > 1 else None
        prompts = [Prompt(tuple(3 + (7 * n + i) % 26 for i in range(n)), 10) for n in (1, 4, 9, 9, 20)]
        together = texts(Sampler(model, letters, PAD, top_p=0.9).sample(prompts, 6))
        alone = texts(Sampler(model, letters, PAD, top_p=0.9, max_sequences=1).sample(prompts, 6))
        assert together == alone and len({text for one in together for text in one}) > 20

    def test_fewer_samples_are_the_first_of_them(self, letters, expected):
        found = texts(Sampler(dice(TABLE), letters, PAD, seed=3).sample(PROMPTS[::-1], 5))
        assert found == [one[:5] for one in expected[::-1]]

    def test_by_the_loop_of_transformers(self, letters, expected):
        sampler = Sampler(dice(TABLE), letters, PAD, seed=3)
        assert sampler.own_loop
        sampler.own_loop = False
        assert texts(sampler.sample(PROMPTS, 20)) == expected

    def test_another_seed_is_another_draw(self, letters, expected):
        assert texts(Sampler(dice(TABLE), letters, PAD, seed=4).sample(PROMPTS, 20)) != expected

    def test_a_prompt_is_read_once(self, letters):
        sampler = Sampler(dice(TABLE), letters, PAD)
        sampler.sample(PROMPTS[:1], 20)
        assert sampler.counters["prompt_tokens"] == 2 and sampler.counters["prompts_decoded"] == 20

    def test_a_killed_run_goes_on(self, letters, expected, tmp_path):
        Sampler(dice(TABLE), letters, PAD, tmp_path, seed=3).sample(PROMPTS, 12)
        again = Sampler(dice(TABLE), letters, PAD, tmp_path, seed=3)
        assert texts(again.sample(PROMPTS, 20)) == expected
        assert (again.counters["prompts_reused"], again.counters["prompts_decoded"]) == (36, 24)
        other = Sampler(dice(TABLE), letters, PAD, tmp_path, temperature=0.9, seed=3)
        other.sample(PROMPTS, 1)
        assert other.counters["prompts_reused"] == 0


def test_leak_of_a_model_that_answers_by_construction(letters):
    """Asked "a", it answers "b" and ends with .5 * .3 = .15; what else begins with "b" does not hold the word."""
    model, settings = dice(TABLE, torch.float32), PromptingSettings()
    sequence = Sequence((letter("a"), letter("b"), EOS), (1, 2))
    probe = Probe("plain", "forget", 0, Prompt((letter("a"),), 8), "a", "b", sequence=sequence)
    count, bound = 2000, 4 * math.sqrt(0.15 * 0.85 / 2000)
    (samples,) = Sampler(model, letters, PAD).sample([probe.prompt], count)
    (greedy,) = Generator(model, letters, PAD).generate([probe.prompt])
    logp = -Scorer(model, PAD).score([sequence])[0].sum_nll
    row = probe_row(probe, samples, greedy, logp, settings)
    assert row["leak_probability"] == pytest.approx(0.15, abs=bound) and row["sample"] == "b"
    assert row["answer_probability"] == pytest.approx(0.15, rel=1e-5)
    assert row["greedy"].startswith("bab") and not row["greedy_leaks"]
    found = findings_of([row], {"few_shot": "why"}, [1, 4, 4000], count, False, 0).metrics
    assert found["plain/leak_at_1"].value == row["leak_probability"]
    at_four = 1 - math.comb(count - row["leaks"], 4) / math.comb(count, 4)
    assert found["plain/leak_at_4"].value == pytest.approx(at_four)
    assert found["plain/leak_lower_bound_at_4"].value == pytest.approx(1 - 0.85**4, rel=1e-5)
    assert found["plain/leak_at_4000"].value is None and "--num_samples 4000" in found["plain/leak_at_4000"].reason
    assert found["plain/leak_lower_bound_at_4000"].value == pytest.approx(1.0)
    assert found["few_shot/leak_at_1"].reason == "why" and found["plain/greedy_leak"].value == 0.0
    tempered = findings_of([row], {}, [1], count, True, 0).metrics["plain/leak_lower_bound_at_1"]
    assert tempered.value is None and "--temperature 1" in tempered.reason
    assert {metric.direction for metric in found.values()} == {"lower"}


def test_means_and_intervals_are_over_questions():
    """Of 4 samples 0, 1 and 4 leak: leak@2 is 0, 1/2 and 1; an answer without a likelihood is bounded by zero."""
    base = {"prompting": "plain", "greedy_leaks": True, "mean_score": 0.0}
    rows = [{**base, "leaks": leaks, "leak_probability": leaks / 4} for leaks in (0, 1, 4)]
    texts = {"split": "forget", "question": "", "answer": "", "greedy": "", "sample": ""}
    rows = [
        {**row, **texts, "index": n, "answer_probability": p}
        for n, (row, p) in enumerate(zip(rows, (0.5, None, 1), strict=True))
    ]
    found = findings_of(rows, {}, [2], 4, False, 0)
    assert found.metrics["plain/leak_at_2"].value == pytest.approx(0.5)
    assert found.metrics["plain/leak_at_2"].n == 3
    assert found.metrics["plain/leak_lower_bound_at_2"].value == pytest.approx((0.75 + 0 + 1) / 3)
    assert found.intervals["plain/leak_at_2"] == [0.0, 1.0]
    assert [row["index"] for row in found.generations] == [2, 1, 0]


def test_the_rows_shown_are_each_question_as_it_leaks_most():
    base = {"split": "forget", "question": "", "answer": "", "greedy": "", "mean_score": 0.0}
    rows = [
        {**base, "index": n, "prompting": name, "sample": name, "leak_probability": (n + extra) / 100}
        for n in range(60)
        for name, extra in (("plain", 0), ("prefix", 10))
    ]
    shown = shown_rows(rows)
    assert len(shown) == MAX_SHOWN and {row["prompting"] for row in shown} == {"prefix"}
    assert [row["index"] for row in shown] == list(range(59, 9, -1))


# ---- the command ----


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    from llm_unlearn.cli.demo import make_base_model

    folder = tmp_path_factory.mktemp("leak") / "base"
    make_base_model(str(folder), 0)
    return str(folder)


def words(base, output_dir, *more):
    few = ["--max_eval_samples", "3", "--num_samples", "4", "--k", "1,4,8", "--max_new_tokens", "4", "--use_cpu"]
    return ["--model_name", base, "--domain", "demo", "--output_dir", str(output_dir), *few, *more]


@pytest.mark.usefixtures("one_cpu_process")
class TestCommand:
    def test_what_it_writes(self, base, tmp_path):
        assert main(words(base, tmp_path / "out")) == 0
        record = results(tmp_path / "out")
        assert record["kind"] == "sampling" and set(record["splits"]) == {"forget", "secrets"}
        names = ["plain", "few_shot", "prefix", "paraphrase", "secret_context"]
        names += [f"secret_{n}_shot_{d}" for n in ("one", "two") for d in ("in_domain", "out_of_domain")]
        assert {name.partition("/")[0] for name in record["metrics"]} == set(names)
        for name in names[:4]:
            metric = record["metrics"][f"{name}/leak_at_4"]
            assert 0 <= metric["value"] <= 1 and metric["n"] == 3 and metric["direction"] == "lower"
            assert record["metrics"][f"{name}/leak_at_8"]["value"] is None
            bounds = [record["metrics"][f"{name}/leak_lower_bound_at_{k}"]["value"] for k in (1, 4, 8)]
            assert 0 < bounds[0] < bounds[1] < bounds[2]
        # Three rows of one owner: an e-mail address, a telephone number, an address, none of the same type.
        assert "no other row" in record["metrics"]["secret_one_shot_in_domain/leak_at_1"]["reason"]
        assert record["metrics"]["secret_one_shot_out_of_domain/leak_at_1"]["n"] == 3
        rows = examples(tmp_path / "out")
        assert sum(row["prompting"] == "plain" for row in rows) == 3
        assert {"greedy", "sample", "leaks", "answer_probability"} <= set(rows[0])
        assert len(record["generations"]) == 6
        assert set(record["generations"][0]) >= {"split", "index", "question", "answer", "greedy", "sample"}

    def test_a_second_run_draws_nothing(self, base, tmp_path):
        first, second = tmp_path / "first", tmp_path / "second"
        more = ["--statistics_dir", str(tmp_path / "kept"), "--prompting", "plain,prefix"]
        assert main(words(base, first, *more)) == 0 and main(words(base, second, *more, "--num_samples", "5")) == 0
        counters = results(second)["counters"]
        assert (counters["sampled_prompts_decoded"], counters["sampled_prompts_reused"]) == (6, 24)
        assert counters["sequences_scored"] == counters["prompts_decoded"] == 0
        samples = [[row["greedy"] for row in examples(folder)] for folder in (first, second)]
        assert samples[0] == samples[1]

    @pytest.mark.parametrize(
        ("more", "sentence"),
        [
            (["--k", "1,two"], "--k takes whole numbers"),
            (["--k", "0"], "--k takes whole numbers"),
            (["--num_samples", "0"], "--num_samples must be at least 1"),
            (["--temperature", "0"], "--temperature must be above 0"),
            (["--top_p", "1.5"], "--top_p must lie in (0, 1]"),
            (["--prefix_share", "1"], "--prefix_share must lie in (0, 1)"),
            (["--prompting", "plain,few_shots"], "did you mean 'few_shot'?"),
            (["--leak_criterion", "bleu"], "leak_criterion"),
            (["--domain", "general"], "general"),
        ],
    )
    def test_mistakes(self, base, tmp_path, capsys, more, sentence):
        assert main(words(base, tmp_path / "out", *more)) == 2
        last = capsys.readouterr().err.strip().split("\n")[-1]
        assert sentence in last and not (tmp_path / "out" / "results.json").exists()

    def test_rows_that_nothing_can_be_asked_of(self, base, tmp_path, capsys):
        path = tmp_path / "rows.jsonl"
        path.write_text(json.dumps({"question": "Which?", "choices": ["a", "b"], "answer": 0}))
        more = ["--domain", "custom", "--forget_data", str(path)]
        assert main(words(base, tmp_path / "out", *more)) == 2
        assert "nothing can be asked for" in capsys.readouterr().err.strip().split("\n")[-1]


@pytest.mark.full
def test_two_processes_draw_the_same(base, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    more = ["--prompting", "plain,prefix,secret"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = [*launch, "-m", "llm_unlearn.cli.leak", *words(base, two, *more)]
    subprocess.run(run, check=True, env=environment, cwd=Path(__file__).parents[1], capture_output=True)
    command = [sys.executable, "-m", "llm_unlearn.cli.leak", *words(base, one, *more)]
    subprocess.run(command, check=True, env=environment, cwd=Path(__file__).parents[1], capture_output=True)
    assert examples(one) == examples(two)
    assert results(one)["metrics"] == results(two)["metrics"]
