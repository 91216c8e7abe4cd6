"""Checkpoint transfer: the hidden states of an earlier checkpoint that does not know yet."""

from dataclasses import dataclass

from llm_unlearn.arguments import flag
from llm_unlearn.candidates import check_candidates, require_chosen
from llm_unlearn.errors import UserError
from llm_unlearn.objectives.transfer import activation_transfer
from llm_unlearn.teacher import FrozenTeacher
from llm_unlearn.trainer import UnlearnTrainer
from llm_unlearn.training_arguments import RampedArguments


@dataclass
class CheckpointTransferArguments(RampedArguments):
    """Arguments of `checkpoint_transfer`; weights and ramps as in EleutherAI/unlearn.

    Attributes:
        candidate_scores: what `candidates.choose_teacher` found, None where it was not asked.
    """

    candidate_scores = None

    teacher_model_name_or_path: str | None = flag(
        None, "The ignorant teacher: an earlier checkpoint, or a model of the same tokenizer that never knew."
    )
    teacher_revision: str | None = flag(None, "Its branch, tag or commit on the Hub.")
    affine_map: str | None = flag(
        None,
        "Folder or Hub repository with a map from the teacher's hidden states to the model's for each layer, as "
        "utils/fit_affine_map.py writes them; default: the teacher's states as they are.",
    )
    candidate_revisions: str | None = flag(
        None,
        "Revisions of --teacher_model_name_or_path, or folders, separated by commas, the earliest first: each answers "
        "the forget questions, and the latest within one standard error of chance becomes the teacher.",
    )
    candidate_questions: str | None = flag(
        None,
        "Multiple-choice rows (question, choices, answer) that --candidate_revisions is judged by, in the forms of "
        "--forget_data; default: the questions of the domain, where it has some.",
    )

    def __post_init__(self):
        check_candidates(self)
        if not self.teacher_model_name_or_path and not self.candidate_revisions:
            raise UserError(
                "checkpoint_transfer needs an ignorant teacher: pass --teacher_model_name_or_path FOLDER_OR_HUB_NAME; "
                "without one, --unlearn_method circuit_breakers reroutes the hidden states instead"
            )
        super().__post_init__()


class CheckpointTransferTrainer(UnlearnTrainer):
    """Pull the hidden states of the forget set to those of a checkpoint that had not learned it.

        L = forget_weight * mean over tokens of L_t(forget) + retain_weight * (retain term)

    The teacher is a second, frozen model that runs up to the highest of `--layers` only, as the policy does with
    `--retain_loss l2`. `--retain_loss kl` is what the authors run with LoRA.

    Source: EleutherAI/unlearn 2026 (checkpoint transfer). Differs from the authors' code: a map at layer l was
    fitted to the output of layer l that it is applied to, theirs to its input; tokens that do not count have no
    part in a mean; without a teacher it is refused, where theirs runs circuit breakers.
    """

    args_class = CheckpointTransferArguments
    streams = ("forget", "retain")
    teacher = None

    def __init__(self, model, args=None, *positional, **kwargs):
        args = args or self.args_class()
        require_chosen(args)
        super().__init__(model, args, *positional, **kwargs)
        if self.weight_of("forget", args):
            place = args.teacher_model_name_or_path, args.teacher_revision
            self.teacher = FrozenTeacher(self, *place, self.layers_for(args), args.affine_map)

    def reference_record(self):
        """Return what the base says of the retain term's reference, the teacher, and the candidates it is one of."""
        facts = {"teacher": self.teacher.facts} if self.teacher else {}
        scores = {"candidates": self.args.candidate_scores} if self.args.candidate_scores else {}
        return {**(super().reference_record() or {}), **facts, **scores} or None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Average both terms over the tokens of the step."""
        outputs = self.forward(model, inputs, layers=self.layers_for(self.args), scored=("retain",))
        terms = {"retain": self.retain_term(outputs, inputs)}
        if self.runs("forget"):
            teacher = self.teacher.states(inputs["forget"])
            terms = {"forget": activation_transfer(outputs["forget"].hidden, teacher), **terms}
        return self.total_loss(terms, outputs, return_outputs, num_items_in_batch)
