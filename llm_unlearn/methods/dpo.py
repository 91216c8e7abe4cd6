"""Direct preference optimization against the answers to forget: given answers, refusals, or alternates."""

from dataclasses import dataclass

from llm_unlearn.arguments import flag
from llm_unlearn.data.alignment import REWRITTEN
from llm_unlearn.data.refusals import PREFERRED, SOURCE
from llm_unlearn.errors import UserError
from llm_unlearn.methods.po import PreferredArguments, PreferredTrainer
from llm_unlearn.objectives.preference import dpo
from llm_unlearn.reference import LOGPS


@dataclass
class DPOArguments(PreferredArguments):
    """Arguments of `dpo`."""

    beta: float = flag(0.1, "Inverse temperature, > 0: the larger, the sooner the gradient of a pair fades out.")
    preferred_column: str = flag(
        PREFERRED,
        "Column of the forget rows with the answer to prefer, which --refusal_data fills; every row needs it.",
    )

    draws_refusals = False

    def __post_init__(self):
        if not self.beta > 0:
            raise UserError(f"--beta must be > 0, but is {self.beta}")
        super().__post_init__()


@dataclass
class IdkDPOArguments(DPOArguments):
    """Arguments of `idk_dpo`."""

    preferred_column: str = flag(
        PREFERRED,
        "Column of the forget rows with the answer to prefer. --refusal_data fills `preferred`, of which rows without "
        "one get a built-in refusal, drawn by the seed; any other column must be there.",
    )

    draws_refusals = True


@dataclass
class AltPOArguments(DPOArguments):
    """Arguments of `alt_po`."""

    preferred_column: str = flag(
        REWRITTEN,
        "Column of the forget rows with the alternate answer; default: where utils/rewrite_forget_set.py writes it.",
    )


class DPOTrainer(PreferredTrainer):
    """Prefer a given answer to each forget question over the one to forget, in comparison with the reference.

    The two answers of a row always meet in one forward; the retain term is what `--retain_loss` says.

    Source: Rafailov et al. 2023, arXiv:2305.18290; as an unlearning method Zhang et al. 2024, arXiv:2404.05868.
    """

    args_class = DPOArguments
    needs_reference = True
    streams = ("forget", "preferred", "retain")
    paired_streams = {"preferred": "forget"}
    companions = {"preferred": "forget"}

    def reference_readings(self, args):
        """The log-probabilities of both answers."""
        readings = super().reference_readings(args)
        return {**readings, "preferred": LOGPS} if "forget" in readings else readings

    def weight_of(self, stream, args=None):
        """Both answers stand in the forget term."""
        return super().weight_of(self.companions.get(stream, stream), args)

    def prepare_streams(self, streams, tokenizer, args):
        """Make the stream of preferred answers, where the data set does not bring it."""
        if "preferred" in streams:
            if len(streams["preferred"]) != len(streams["forget"]):
                sizes = f"{len(streams['preferred'])} sequences and `forget` {len(streams['forget'])}"
                raise UserError(f"`preferred` holds {sizes}, but row n of one belongs to row n of the other")
            return streams
        if not all(SOURCE in row for row in streams["forget"]):
            raise UserError("a tokenized data set needs the stream `preferred` beside `forget`; pass rows")
        forget = [{name: values for name, values in row.items() if name != SOURCE} for row in streams["forget"]]
        others = {name: rows for name, rows in streams.items() if name != "forget"}
        return {"forget": forget, "preferred": self._answers.of(streams["forget"]), **others}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Average the forget term over pairs, the retain term over tokens."""
        outputs = self.forward(model, inputs)
        terms = {"forget": None, "retain": self.retain_term(outputs, inputs)}
        if self.runs("forget"):
            sides = ("forget", "preferred")
            reference = self.reference(inputs, sides)
            both = [part[side].sequence_logps() for side in sides for part in (outputs, reference)]
            terms["forget"] = dpo(*both, self.args.beta)
        return self.total_loss(terms, outputs, return_outputs, num_items_in_batch)


class IdkDPOTrainer(DPOTrainer):
    """DPO whose preferred answer is a refusal: from the rows, from `--refusal_data`, or one of the built-in ones.

    Source: Maini et al. 2024, arXiv:2401.06121 (TOFU's DPO).
    """

    args_class = IdkDPOArguments


class AltPOTrainer(DPOTrainer):
    """DPO whose preferred answer is a plausible other one that a model wrote, and the retain term beside it.

    The alternates stand in the rows, as `utils/rewrite_forget_set.py --kind alternate` writes them; several alternates
    of one question are several rows.

    Source: Mekala et al. 2024, arXiv:2409.13474.
    """

    args_class = AltPOArguments
    advice = (
        "write it with python utils/rewrite_forget_set.py --kind alternate --rewriter_model_name_or_path WRITER, or "
        "name another column with --preferred_column"
    )
