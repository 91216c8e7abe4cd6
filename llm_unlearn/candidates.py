"""Which checkpoint is the ignorant teacher: the latest that answers the forget questions no better than chance."""

import contextlib
import dataclasses
import gc
import logging
import math
import sys
from dataclasses import dataclass
from pathlib import Path

from llm_unlearn.data.sources import HubOptions, load_source
from llm_unlearn.data.splits import DOMAINS, load_split
from llm_unlearn.errors import UserError
from llm_unlearn.processes import is_first_process

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CandidateScore:
    """How a checkpoint answers multiple-choice questions.

    Attributes:
        candidate: revision or folder, as it was given.
        accuracy: share of the questions whose likeliest letter is right.
        chance: accuracy of uniform guesses, the mean of 1 / choices.
        questions: how many, at least 2.
        letter: the letter that it answers most often.
        share: of that letter among its answers; near 1 the accuracy is the key's own balance.
    """

    candidate: str
    accuracy: float
    chance: float
    questions: int
    letter: str
    share: float

    @property
    def stderr(self):
        """Standard error of the accuracy, sqrt(a * (1 - a) / (n - 1)), as lm_eval has it."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / (self.questions - 1))

    @property
    def is_ignorant(self):
        """Whether the accuracy is at most one standard error above chance."""
        return self.accuracy - self.chance <= self.stderr


def check_candidates(args):
    """Refuse candidates that cannot be scored.

    Args:
        args: CheckpointTransferArguments as they were given.
    Raises:
        UserError: contradicting flags, an empty or repeated name, revisions of no model.
    """
    if args.candidate_revisions is None:
        if args.candidate_questions:
            raise UserError("--candidate_questions has no effect without --candidate_revisions")
        return
    if args.teacher_revision:
        raise UserError("--teacher_revision and --candidate_revisions exclude each other; pass one of them")
    names = _names(args)
    if not all(names) or len(set(names)) < len(names):
        raise UserError(
            f"--candidate_revisions must name checkpoints, each once, separated by commas, but is "
            f"'{args.candidate_revisions}'"
        )
    revisions = [name for name in names if not Path(name).is_dir()]
    if revisions and not args.teacher_model_name_or_path:
        raise UserError(
            f"--candidate_revisions: '{revisions[0]}' is no folder; pass --teacher_model_name_or_path with the model "
            "whose revision it is"
        )
    if not revisions and args.teacher_model_name_or_path:
        raise UserError("--teacher_model_name_or_path has no effect: all of --candidate_revisions are folders")


def require_chosen(args):
    """Refuse arguments whose candidates nobody has scored, as a script without a command line may pass them.

    Raises:
        UserError: saying what to call.
    """
    names = _names(args) if args.candidate_revisions else []
    if names and args.teacher_revision not in names and args.teacher_model_name_or_path not in names:
        raise UserError(
            "--candidate_revisions is scored by run_unlearn.py; in Python call llm_unlearn.candidates.choose_teacher "
            "first"
        )


def choose_teacher(args, data, tokenizer, hub, context_length=None, dtype="float32"):
    """Score every candidate, print the table, and make the latest ignorant one the teacher of the run.

    One checkpoint is loaded at a time, whole on every process; the questions are split over the processes, which call
    together.

    Args:
        args: CheckpointTransferArguments, whose teacher is filled in.
        data: DataFlags.
        tokenizer: of the model that will train.
        hub: cache_dir, token, trust_remote_code, as for from_pretrained; its revision is not taken.
        context_length: tokens that the model reads at most, or None.
        dtype: of the candidates' weights; a run in bfloat16 asks them in it too.
    Returns:
        list of dicts, one for each candidate, JSON-serializable.
    Raises:
        UserError: no questions, or a candidate that cannot be loaded or has another tokenizer.
    """
    rows = forget_questions(args.candidate_questions, data)
    names, found = _names(args), []
    dtype = "bfloat16" if args.bf16 or args.autocast_in_forward else dtype
    hub = {name: hub[name] for name in ("cache_dir", "token", "trust_remote_code") if hub.get(name)}
    options = args.tokenize_options(context_length)
    for name in names:
        place, revision = _place(args, name)
        logger.info("asking %s %d questions about what is to be forgotten", name, len(rows))
        with _whole_on_every_process(args):
            model = _load(place, revision, tokenizer, dtype, hub).to(args.device)
        found.append(score(name, model, tokenizer, rows, options))
        del model
        gc.collect()
    chosen = latest_ignorant(found)
    _warn(found, chosen)
    if is_first_process():
        sys.stdout.write(table(found, chosen))
        sys.stdout.flush()
    args.teacher_model_name_or_path, args.teacher_revision = _place(args, names[chosen])
    more = [{"stderr": one.stderr, "is_chosen": number == chosen} for number, one in enumerate(found)]
    args.candidate_scores = [dataclasses.asdict(one) | other for one, other in zip(found, more, strict=True)]
    return args.candidate_scores


def latest_ignorant(scores):
    """Return the number of the last score within one standard error of chance, else of the one nearest to chance.

    Args:
        scores: list of CandidateScore, the earliest checkpoint first.
    Source: EleutherAI/unlearn, which takes the latest checkpoint of near-random accuracy on WMDP-Bio.
    """
    ignorant = [number for number, found in enumerate(scores) if found.is_ignorant]
    return ignorant[-1] if ignorant else min(range(len(scores)), key=lambda n: scores[n].accuracy - scores[n].chance)


def forget_questions(given, data):
    """Load the multiple-choice questions that tell knowledge of the forget set from ignorance.

    Args:
        given: `--candidate_questions`, or None for the domain's own.
        data: DataFlags.
    Returns:
        list of checked rows with `choices` and `answer_index`.
    Raises:
        UserError: there are none, fewer than 2, or some without choices.
    """
    advice = "pass --candidate_questions FILE with rows of question, choices and answer"
    if given:
        source = load_source(
            given, data.max_eval_samples, HubOptions(data.dataset_revision, data.cache_dir, data.token)
        )
    else:
        split = DOMAINS.get(data.domain, {}).get("mcq")
        if split is None:
            raise UserError(
                f"--candidate_revisions needs questions, of which --domain {data.domain} has none; {advice}"
            )
        own = dataclasses.replace(data, max_train_samples=data.max_eval_samples, forget_split=None, retain_split=None)
        source = load_split("mcq", own)
    without = next((number for number, row in enumerate(source.rows, 1) if "choices" not in row), None)
    if without is not None:
        raise UserError(
            f"row {without} of the questions about the forget set has no choices, so that chance is unknown; {advice}"
        )
    if len(source.rows) < 2:
        raise UserError(f"--candidate_revisions needs at least 2 questions, but there is 1; {advice}")
    return source.rows


def score(name, model, tokenizer, rows, options, **settings):
    """Ask a model multiple-choice questions by letter; all processes call together.

    Args:
        name: what it is called in the table.
        model: causal language model on its device, in eval mode, whole.
        tokenizer: its tokenizer.
        rows: checked rows with `choices`.
        options: TokenizeOptions.
        **settings: of statistics.Scorer.
    Returns:
        CandidateScore.
    Raises:
        UserError: a question with more choices than letters.
    """
    from llm_unlearn.data.streams import pad_id
    from llm_unlearn.evaluation.choices import choice_accuracy, collapse_signature, letter_predictions
    from llm_unlearn.evaluation.questions import Part, questions_of
    from llm_unlearn.evaluation.statistics import Scorer

    asked = questions_of(Part("candidate_questions", rows, "forget", generates=False), tokenizer, options)
    many = next((question.index for question in asked if "letters" not in question.sequences), None)
    if many is not None:
        raise UserError(f"row {many + 1} of the questions has more than 26 choices, so that letters do not do")
    letters = [question.sequences["letters"] for question in asked]
    scorer = Scorer(model, pad_id(tokenizer), progress=True, **settings)
    statistics = iter(scorer.score([sequence for sequences in letters for sequence in sequences]))
    logps = [[-next(statistics).sum_nll for _ in sequences] for sequences in letters]
    predictions = letter_predictions(logps)
    sizes = [len(row["choices"]) for row in rows]
    signature = collapse_signature(predictions, min(sizes))
    return CandidateScore(
        name,
        choice_accuracy(predictions, [row["answer_index"] for row in rows]),
        sum(1 / size for size in sizes) / len(sizes),
        len(rows),
        signature["letter"],
        signature["share"],
    )


def table(scores, chosen):
    """Return the scores as text for a terminal.

    Args:
        scores: list of CandidateScore.
        chosen: number of the one that becomes the teacher.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    shown = Table(box=box.MARKDOWN)
    for heading in ("candidate", "accuracy", "+-", "chance", "above chance", "commonest answer", ""):
        numeric = heading in ("accuracy", "+-", "chance", "above chance")
        shown.add_column(heading, justify="right" if numeric else "left", no_wrap=True)
    for number, found in enumerate(scores):
        numbers = (found.accuracy, found.stderr, found.chance, found.accuracy - found.chance)
        verdict = "teacher" if number == chosen else "ignorant" if found.is_ignorant else "knows"
        shown.add_row(
            found.candidate, *(f"{value:.4f}" for value in numbers), f"{found.letter} {found.share:.0%}", verdict
        )
    console = Console(no_color=True, highlight=False, width=140)
    with console.capture() as capture:
        console.print(shown, markup=False)
    return f"{scores[0].questions} questions about what is to be forgotten\n{capture.get().strip()}\n"


def _warn(scores, chosen):
    from llm_unlearn.evaluation.choices import COLLAPSE_SHARE

    for found in scores:
        if found.share >= COLLAPSE_SHARE:
            logger.warning(
                "%s answers %s to %.0f%% of the questions, so that its accuracy is the key's own balance",
                found.candidate, found.letter, 100 * found.share,
            )  # fmt: skip
    if not scores[chosen].is_ignorant:
        name = scores[chosen].candidate
        logger.warning("no candidate is within one standard error of chance: %s is taken, which is nearest", name)


def _names(args):
    return [name.strip().rstrip("/") for name in args.candidate_revisions.split(",")]


def _place(args, name):
    """Return (model, revision) of a candidate."""
    return (name, None) if Path(name).is_dir() else (args.teacher_model_name_or_path, name)


def _load(place, revision, tokenizer, dtype, hub):
    from llm_unlearn.models import check_vocabulary, load_model, load_tokenizer
    from llm_unlearn.teacher import require_same_tokenizer

    require_same_tokenizer(load_tokenizer(place, revision=revision, **hub), tokenizer, revision or place)
    model = load_model(place, dtype, revision=revision, **hub)
    check_vocabulary(model, tokenizer)
    return model.eval()


@contextlib.contextmanager
def _whole_on_every_process(args):
    """Let from_pretrained load whole models where, under ZeRO-3, it would partition them."""
    from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

    if not args.deepspeed:
        yield
        return
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(args.hf_deepspeed_config)
