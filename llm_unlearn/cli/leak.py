"""Draw many samples of every forgotten answer and say how likely it is that one of k gives it away: leak@k.

python -m llm_unlearn.cli.leak --model_name_or_path CHECKPOINT --domain tofu --num_samples 64 --k 1,4,16,64
"""

import logging
import time
from dataclasses import dataclass

from llm_unlearn.arguments import flag
from llm_unlearn.attacks.parsing import AttackFlags, parse_attack
from llm_unlearn.cli.scoring import load_model_of, prepare, say_notes, show_results, statistics_folder
from llm_unlearn.errors import UserError, run_script, unknown_name

logger = logging.getLogger("llm_unlearn")

KIND = "sampling"
_CRITERIA, _ROLES = ("keyword", "containment", "rouge"), ("forget", "retain")


@dataclass
class LeakFlags(AttackFlags):
    """Flags of the attack by sampling."""

    k: str = flag("1,4,16,64", "Numbers of samples, separated by commas, of which one must leak.")
    num_samples: int = flag(64, "Samples drawn of each question and prompting; leak@k needs k of them at least.")
    temperature: float = flag(1.0, "Temperature of the samples, > 0; the greedy answer is reported beside them.")
    top_p: float = flag(1.0, "Draw from the fewest tokens whose probability reaches this, in (0, 1]; 1 takes all.")
    max_new_tokens: int | None = flag(
        None, "Tokens of a sample at most; default: twice the tokens of the answer, 32 at least and 200 at most."
    )
    prompting: str = flag(
        "plain,few_shot,prefix,paraphrase,secret",
        "How answers are asked for, separated by commas: plain; few_shot, behind other pairs; prefix, the first tokens "
        "given; paraphrase, by the column paraphrased_question; secret, the rows with a secret, in context and behind "
        "one and two other rows.",
    )
    num_shots: int = flag(3, "Pairs that few_shot shows.")
    shots_from: str = flag(
        "forget", "Whose pairs few_shot shows: other rows to forget, or rows to keep.", choices=list(_ROLES)
    )
    prefix_share: float = flag(0.25, "Share of the answer's tokens that prefix gives, in (0, 1).")
    leak_criterion: str = flag(
        "keyword",
        "When a sample leaks: keyword, it holds the words of the answer that are not in the question; containment, the "
        "answer stands in it word for word; rouge, the ROUGE-L recall of the answer.",
        choices=list(_CRITERIA),
    )
    leak_threshold: float = flag(
        1.0, "Share of the keywords, or ROUGE-L recall, from which on a sample leaks, in (0, 1]."
    )


def main(argv=None):
    """Attack one checkpoint by sampling; returns the exit code, see `run_script`."""
    return run_script(run, argv)


def run(argv):
    """Do what `main` does, errors raised; see there."""
    parsed = parse_attack(argv, LeakFlags, "python -m llm_unlearn.cli.leak")
    if parsed is None:
        return
    ks = check_flags(parsed.flags)
    say_notes(parsed)
    from llm_unlearn.attacks.records import write_attack
    from llm_unlearn.evaluation.benchmarks import load_parts

    started, flags = time.time(), parsed.flags
    folder, device = prepare(parsed, KIND)
    name, domain = parsed.model.model_name_or_path, parsed.data.domain
    if flags.target_model:
        logger.info("--target_model changes nothing here; to compare, attack it as --model_name_or_path")
    parts, _ = load_parts(parsed.data)
    if not any(part.role == "forget" for part in parts):
        raise UserError(f"--domain {domain} has no set to forget, whose answers could leak; pass --forget_data FILE")
    checkpoint = load_model_of(parsed, name, device)
    if not flags.do_eval:
        logger.info("--do_eval False: model and data are in order, nothing was sampled")
        return
    found, counters = attack(parsed, checkpoint, parts, ks, statistics_folder(parsed, checkpoint, folder))
    counters["wall_seconds"] = round(time.time() - started, 3)
    asked = [part for part in parts if part.role == "forget"]
    record = write_attack(
        folder, KIND, parsed, checkpoint, asked, found.metrics, counters, found.examples,
        intervals=found.intervals, generations=found.generations, settings=settings_of(flags, ks),
    )  # fmt: skip
    show_results(record, folder)


def check_flags(flags):
    """Refuse values that nothing can be sampled with; returns the list of k, ascending.

    Raises:
        UserError: saying which flag is wrong.
    """
    try:
        ks = sorted({int(word) for word in flags.k.split(",") if word.strip()})
    except ValueError:
        ks = []
    if not ks or ks[0] < 1:
        raise UserError(f"--k takes whole numbers from 1 on, separated by commas, but is '{flags.k}'")
    for name in ("num_samples", "num_shots"):
        if getattr(flags, name) < 1:
            raise UserError(f"--{name} must be at least 1, but is {getattr(flags, name)}")
    if not 0 < flags.temperature < float("inf"):
        raise UserError(f"--temperature must be above 0, but is {flags.temperature}; greedy answers are always given")
    for name in ("top_p", "leak_threshold"):
        if not 0 < getattr(flags, name) <= 1:
            raise UserError(f"--{name} must lie in (0, 1], but is {getattr(flags, name)}")
    if not 0 < flags.prefix_share < 1:
        raise UserError(f"--prefix_share must lie in (0, 1), but is {flags.prefix_share}")
    known = ("plain", "few_shot", "prefix", "paraphrase", "secret")
    promptings = promptings_of(flags)
    for word in promptings:
        if word not in known:
            raise unknown_name("--prompting", word, known)
    if not promptings:
        raise UserError(f"--prompting names nothing; known: {', '.join(known)}")
    return ks


def promptings_of(flags):
    """Return the words of --prompting."""
    return tuple(word.strip() for word in flags.prompting.split(",") if word.strip())


def settings_of(flags, ks):
    """Return what the numbers depend on, for results.json."""
    names = ("num_samples", "temperature", "top_p", "num_shots", "shots_from", "prefix_share", "leak_criterion")
    return {"k": ks} | {name: getattr(flags, name) for name in (*names, "leak_threshold", "seed")}


def attack(parsed, checkpoint, parts, ks, folder):
    """Ask for every answer in every way, sample, and judge.

    Args:
        parsed: ParsedEvaluation with LeakFlags.
        checkpoint: loading.Checkpoint.
        parts: list of questions.Part.
        ks: list of k.
        folder: of the results by example.
    Returns:
        (LeakFindings, counters).
    """
    from llm_unlearn.attacks.leak_prompts import PromptingSettings, probes_of
    from llm_unlearn.attacks.leak_results import findings_of, probe_row
    from llm_unlearn.attacks.sampling import Sampler
    from llm_unlearn.data.streams import pad_id
    from llm_unlearn.evaluation.generation import Generator
    from llm_unlearn.evaluation.statistics import Scorer

    flags, model, tokenizer = parsed.flags, checkpoint.model, checkpoint.tokenizer
    settings = PromptingSettings(
        promptings_of(flags), flags.num_shots, flags.shots_from, flags.prefix_share, flags.max_new_tokens,
        flags.leak_criterion, flags.leak_threshold, flags.seed,
    )  # fmt: skip
    probes, missing = probes_of(parts, tokenizer, flags.tokenize_options(checkpoint.context_length), settings)
    if not probes:
        raise UserError(f"nothing can be asked for: {next(iter(missing.values()))}")
    bounds = {"max_tokens": flags.max_tokens_per_batch, "max_sequences": flags.per_device_eval_batch_size}
    bounds |= {"progress": True}
    prompts = [probe.prompt for probe in probes]
    warn_of_short_samples(probes)
    logger.info("drawing %d samples of each of %d prompts", flags.num_samples, len(prompts))
    sampler = Sampler(model, tokenizer, pad_id(tokenizer), folder, flags.temperature, flags.top_p, flags.seed, **bounds)
    generator = Generator(model, tokenizer, pad_id(tokenizer), folder, **bounds)
    scorer = Scorer(model, pad_id(tokenizer), folder, **bounds)
    samples, greedy = sampler.sample(prompts, flags.num_samples), generator.generate(prompts)
    scored = iter(scorer.score([probe.sequence for probe in probes if probe.sequence is not None]))
    logps = [None if probe.sequence is None else -next(scored).sum_nll for probe in probes]
    every = zip(probes, samples, greedy, logps, strict=True)
    rows = [probe_row(*one, settings) for one in every]
    is_tempered = (flags.temperature, flags.top_p) != (1.0, 1.0)
    found = findings_of(rows, missing, ks, flags.num_samples, is_tempered, flags.seed)
    counters = {**scorer.counters, **generator.counters}
    return found, counters | {f"sampled_{name}": value for name, value in sampler.counters.items()}


def warn_of_short_samples(probes):
    """Say how many answers are longer than their samples may be."""
    short = sum(
        probe.sequence is not None and len(probe.sequence.ids) - len(probe.prompt.ids) > probe.prompt.max_new_tokens + 1
        for probe in probes
    )
    if short:
        logger.warning(
            "%d of %d answers have more tokens than a sample may have, which can then hold but a part of them; "
            "pass a larger --max_new_tokens", short, len(probes),
        )  # fmt: skip


if __name__ == "__main__":
    from llm_unlearn.processes import end_process

    end_process(main())
