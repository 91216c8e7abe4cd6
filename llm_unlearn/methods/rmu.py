"""Representation misdirection: forget states steered to a random vector, retain states held where they were."""
# Shapes: B sequences, T tokens, D hidden size, K topics.

from dataclasses import dataclass, field

import torch

from llm_unlearn.arguments import flag
from llm_unlearn.decoder import decoder_layers
from llm_unlearn.errors import UserError
from llm_unlearn.models import checked_layers
from llm_unlearn.objectives.representation import steering
from llm_unlearn.reference import is_peft, states_at
from llm_unlearn.trainer import UnlearnTrainer
from llm_unlearn.training_arguments import RetainArguments

DOWN_PROJECTIONS = (
    "mlp.down_proj.weight",  # Llama, Mistral, Qwen, Gemma, OLMo, Phi-3
    "mlp.dense_4h_to_h.weight",  # GPT-NeoX, Falcon, Bloom
    "mlp.c_proj.weight",  # GPT-2
    "mlp.fc2.weight",  # Phi
    "mlp.fc_out.weight",  # GPT-J
    "fc2.weight",  # OPT
)
"""Where a decoder layer keeps the matrix that writes the MLP's result into the residual stream."""


@dataclass
class RMUArguments(RetainArguments):
    """Arguments of `rmu`."""

    layer: int = flag(7, "Decoder layer whose output is steered, counted from 0.")
    trained_layers: list[int] | None = field(
        default=None, metadata={"help": "Decoder layers that train; default: --layer and the two below it."}
    )
    trained_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Parameters of those layers that train, as 'mlp.down_proj.weight'; default: that matrix."},
    )
    steering_coef: float = flag(20.0, "Length of the control vector, or its share of the state's with --adaptive True.")
    adaptive: bool = flag(False, "Steer each token as far as its state is long: --steering_coef times its norm.")
    forget_weight: float = flag(1.0, "Weight of the steering term.")
    retain_weight: float = flag(100.0, "Weight of the retain term, alpha; 0 loads no retain set.")
    retain_loss: str = flag(
        "mse",
        "Retain term: mse holds the states at --layer to the reference's, kl the output distribution, nll descends on "
        "the retain set, none leaves it out.",
        choices=["mse", "kl", "nll", "none"],
    )

    retain_losses = ("mse", "kl", "nll", "none")

    def __post_init__(self):
        if not self.steering_coef > 0:
            raise UserError(f"--steering_coef must be > 0, but is {self.steering_coef}")
        super().__post_init__()


class RMUTrainer(UnlearnTrainer):
    """Steer the states of forget tokens at one layer to a random direction, and hold those of retain tokens.

        L = forget_weight * mean (1/D) ||h - c * u||^2 + retain_weight * mean (1/D) ||h - h0||^2

    u is one random vector of length 1 for each topic (column `topic` of the forget rows), drawn by the seed and kept in
    every checkpoint; with several topics the steps take turns, each on rows of one topic. Only the matrices with which
    the MLPs of three layers write their results train, and no layer above --layer runs.

    Source: Li et al. 2024, arXiv:2403.03218; --adaptive of Dang et al. 2024, arXiv:2408.06223. Differs from the
    authors' code, whose mean takes in padding and the first token, and which trains parameter number 6 of each layer,
    an attention matrix in GPT-NeoX.
    """

    args_class = RMUArguments
    streams = ("forget", "retain")

    def layers_for(self, args):
        """The one that is steered."""
        return checked_layers([args.layer], self.depth)

    def trained_parameters_for(self, args):
        """The output matrix of the MLP in `--trained_layers`; with adapters, what they train."""
        self.layers_for(args)
        if is_peft(self.model):
            if args.trained_layers or args.trained_modules:
                raise UserError("--trained_layers and --trained_modules have no effect with --use_peft")
            return None
        chosen = args.trained_layers or range(max(args.layer - 2, 0), args.layer + 1)
        if max(chosen) > args.layer:
            raise UserError(f"--trained_layers {max(chosen)} is above --layer {args.layer}: no loss reaches it")
        return trained_names(self.model, checked_layers(chosen, self.depth), args.trained_modules)

    def reference_readings(self, args):
        """The retain rows' states, and with --adaptive the forget rows' for their norms."""
        readings = super().reference_readings(args)
        return {"forget": states_at(self.layers_for(args)), **readings} if args.adaptive else readings

    def method_state(self):
        """{"control_vectors": (K, D)}, each of length 1."""
        return {"control_vectors": self.control_vectors}

    def load_method_state(self, state):
        """Go on with the vectors of the checkpoint."""
        self.control_vectors = state["control_vectors"]

    def prepare_streams(self, streams, tokenizer, args):
        """Number the topics, and draw a vector for each."""
        topics = sorted({str(row.get("topic", "")) for row in streams["forget"]})
        size = self.model.config.get_text_config(decoder=True).hidden_size
        self.control_vectors = control_vectors(len(topics), size, args.seed).to(args.device)
        numbers = [topics.index(str(row.get("topic", ""))) for row in streams["forget"]]
        self.topics = torch.tensor(numbers, device=args.device)
        return streams

    def turns(self):
        """The topic of each forget row: the steps take turns."""
        return self.topics.tolist() if len(self.control_vectors) > 1 else None

    def targets(self, inputs):
        """Return (B, 1, D) or (B, T-1, D): the state that each forget token is steered to."""
        index = inputs["forget"]["index"]
        vectors = self.control_vectors[self.topics[index.clamp(min=0)]].unsqueeze(1) * self.args.steering_coef
        if not self.args.adaptive:
            return vectors
        held = self.reference_states(inputs)["forget"][self.args.layer]
        return vectors * torch.linalg.vector_norm(held, dim=-1, keepdim=True)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Average both terms over the tokens of the step."""
        outputs = self.forward(model, inputs, layers=self.layers_for(self.args), scored=("retain",))
        terms = {
            "forget": self.layer_mean(outputs["forget"], lambda layer, hidden: steering(hidden, self.targets(inputs))),
            "retain": self.retain_term(outputs, inputs),
        }
        return self.total_loss(terms, outputs, return_outputs, num_items_in_batch)


def control_vectors(count, size, seed):
    """Draw random directions of the positive orthant, as published: uniform in [0, 1), then of length 1.

    Args:
        count: K.
        size: D.
        seed: int.
    Returns:
        (K, D) float32 on the CPU.
    """
    drawn = torch.rand(count, size, generator=torch.Generator().manual_seed(seed))
    return drawn / torch.linalg.vector_norm(drawn, dim=-1, keepdim=True)


def trained_names(model, layers, modules=None):
    """Return the names of parameters inside decoder layers, for `models.train_only`.

    Args:
        model: causal language model.
        layers: indices of decoder layers.
        modules: names inside a layer; None takes the one of `DOWN_PROJECTIONS` that the layer has.
    Raises:
        UserError: a layer has none of these parameters.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = []
    for layer in layers:
        inside = dict(decoder_layers(model)[layer].named_parameters())
        chosen = modules or [name for name in DOWN_PROJECTIONS if name in inside][:1]
        missing = [name for name in chosen if name not in inside]
        if missing or not chosen:
            lacks = missing[0] if missing else "MLP output matrix of a known name"
            raise UserError(
                f"a decoder layer of {type(model).__name__} has no {lacks}; pass --trained_modules with one of "
                f"{', '.join(inside)}"
            )
        found += [names[id(inside[name])] for name in chosen]
    return found
