"""Circuit breakers: forget states rerouted away from where the reference has them."""

from dataclasses import dataclass

from llm_unlearn.objectives.representation import rerouting
from llm_unlearn.reference import states_at
from llm_unlearn.trainer import UnlearnTrainer
from llm_unlearn.training_arguments import RampedArguments


@dataclass
class CircuitBreakersArguments(RampedArguments):
    """Arguments of `circuit_breakers`; `--orth_coef C` alone adds orthogonality."""

    own_regularizers = ("orthogonality",)


class CircuitBreakersTrainer(UnlearnTrainer):
    """Turn the states of forget tokens away from the reference's, and hold those of retain tokens to them.

        L = forget_weight * mean max(0, cos(h, h0)) + retain_weight * mean ||h - h0||   averaged over --layers

    With `--orth_coef` the forget rows of a batch are also set at right angles to each other, as the orthogonal variant
    does. No layer above the highest of --layers runs where the retain term reads states. Training begins at a
    stationary point of the first term, cosine 1 everywhere: where nothing else moves the states, rounding or dropout
    decides which way they leave it, and runs that are cut otherwise agree in what they reach, not in every digit.

    Source: Zou et al. 2024, arXiv:2406.04313; defaults and ramps of EleutherAI/unlearn, whose ramp counts calls of the
    loss, where this one counts optimizer steps, and whose means take in padding.
    """

    args_class = CircuitBreakersArguments
    streams = ("forget", "retain")

    def reference_readings(self, args):
        """The reference's states at the layers, of both streams."""
        readings = super().reference_readings(args)
        return {"forget": states_at(self.layers_for(args)), **readings} if args.forget_weight else readings

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Average both terms over the tokens of the step."""
        outputs = self.forward(model, inputs, layers=self.layers_for(self.args), scored=("retain",))
        held = self.reference_states(inputs).get("forget", {})
        terms = {
            "forget": self.layer_mean(outputs["forget"], lambda layer, hidden: rerouting(hidden, held[layer])),
            "retain": self.retain_term(outputs, inputs),
        }
        return self.total_loss(terms, outputs, return_outputs, num_items_in_batch)
