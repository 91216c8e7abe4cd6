"""What an audit runs: stages for the audited model, its target and the gold model, by preset."""

from dataclasses import dataclass

MODEL, TARGET, GOLD = "model", "target", "gold"
_RATES = "lr=2e-5,2e-4,2e-3"
_TASKS = "gsm8k,agnews,sst2,winogrande,mnli,qqp"


@dataclass(frozen=True)
class Stage:
    """One script of an audit.

    Attributes:
        name: of its folder: eval, mia, or the kind of its results.
        script: module of llm_unlearn.cli.
        words: its own flags.
        who: whom it is run on.
        against: {who: flag}: which other models the script is told about, where they are there.
        references: {who: flag}: whose results of the same stage it is told about.
    """

    name: str
    script: str
    words: tuple = ()
    who: tuple = (MODEL,)
    against: tuple = ()
    references: tuple = ()


def _evaluation(*words):
    return Stage("eval", "evaluate", words, (GOLD, TARGET, MODEL), references=((GOLD, "--retain_reference"),))


def _membership(*words):
    return Stage("mia", "mia", words, (GOLD, TARGET, MODEL), references=((GOLD, "--retain_reference"),))


def _tuned(name, *words):
    return Stage(name, name, words, (GOLD, MODEL), against=((TARGET, "--target_model"),))


def _sampling(*words):
    return Stage("sampling", "leak", words, (GOLD, MODEL))


def _quantization(schemes):
    return Stage("quantize", "quantize", ("--schemes", schemes))


def _inside(*words):
    return Stage("white_box", "white_box", words, against=((TARGET, "--target_model"), (GOLD, "--gold")))


def _downstream(*words):
    return Stage("downstream", "downstream", words, against=((TARGET, "--target_model"),))


PRESETS = {
    "quick": (
        _evaluation(),
        _membership("--lowercase", "False"),
        _tuned("relearn", "--sweep", _RATES, "--max_steps", "20", "--eval_every", "5", "--num_train_examples", "64"),
        _quantization("int8"),
        _sampling("--k", "1,4,16", "--num_samples", "16", "--prompting", "plain,few_shot,prefix"),
        _inside(),
    ),
    "standard": (
        _evaluation(),
        _membership(),
        _tuned("relearn", "--sweep", _RATES, "--max_steps", "100", "--eval_every", "10", "--num_train_examples", "64"),
        _tuned(
            "tamper", "--sweep", "lr=1e-5,2e-5,8e-5", "--max_steps", "110", "--eval_every", "10", "--tamper_data",
            "related",
        ),
        _quantization("int8,nf4"),
        _sampling("--k", "1,4,16,64", "--num_samples", "64"),
        _inside(),
    ),
    "full": (
        _evaluation(),
        _membership("--grad_norm", "True"),
        _tuned("relearn", "--sweep", _RATES, "--max_steps", "100", "--eval_every", "10", "--num_train_examples", "64"),
        _tuned(
            "tamper", "--sweep", "lr=1e-5,2e-5,8e-5;lr_scheduler=linear,cosine", "--max_steps", "3000", "--eval_every",
            "100", "--repair_steps", "200", "--repair_data", "retain",
        ),
        _quantization("int8,nf4,fp4"),
        _sampling("--k", "1,4,16,64,128", "--num_samples", "128"),
        _inside(),
        _downstream("--tasks", _TASKS, "--num_train_examples", "2000"),
    ),
}  # fmt: skip
"""preset -> its stages, in their order"""


@dataclass(frozen=True)
class Job:
    """One stage on one model.

    Attributes:
        stage: Stage.
        who: "model", "target" or "gold".
        model: folder or Hub name.
        place: its folder below the audit's: "eval" of the audited model, "gold/eval" of another.
    """

    stage: Stage
    who: str
    model: str

    @property
    def place(self):
        """Where its results go, below the folder of the audit."""
        return self.stage.name if self.who == MODEL else f"{self.who}/{self.stage.name}"


def jobs_of(preset, models, skipped=()):
    """Return the jobs of a preset, each before those that are told about its results.

    Args:
        preset: key of `PRESETS`.
        models: {who: folder or Hub name}; who is missing is left out.
        skipped: names of stages that are left out.
    Returns:
        list of Job.
    """
    return [
        Job(stage, who, models[who])
        for stage in PRESETS[preset]
        if stage.name not in skipped
        for who in stage.who
        if models.get(who)
    ]


def words_of(job, models, folder, shared):
    """Return the words of a job's script.

    Args:
        job: Job.
        models: as for `jobs_of`.
        folder: function of a job's place that returns where that is.
        shared: words that every script gets: data, tokenization, device.
    """
    words = ["--model_name_or_path", job.model, *shared, "--output_dir", str(folder(job.place))]
    for who, flag in job.stage.against:
        if models.get(who):
            words += [flag, models[who]]
    for who, flag in job.stage.references:
        results = folder(f"{who}/{job.stage.name}") / "results.json"
        if job.who != who and results.is_file():
            words += [flag, str(results)]
    return [*words, *job.stage.words, "--overwrite_output_dir", "True"]
