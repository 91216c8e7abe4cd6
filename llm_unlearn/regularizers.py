"""What can be added to the loss of any method: values as an objective's, with a name and a weight."""
# Shapes: B sequences, T tokens, D hidden size, M sequences on all processes.

import contextlib
import importlib
import math

import torch

from llm_unlearn.errors import UserError
from llm_unlearn.models import checked_layers
from llm_unlearn.objectives.representation import pair_similarity, pooled_directions
from llm_unlearn.parameter_pull import PullToStart
from llm_unlearn.schedules import schedule_factor


class Regularizer:
    """A term on one stream beside the method's own.

    Attributes:
        name: as logged, `loss/<name>`.
        stream: what it reads; one of `regularizer_flags.STREAMS` runs for it alone.
        layers: decoder layers whose states it reads.
        reads: what it reads off the head besides the log-probabilities: entropy, uniform, or None.
        in_loss: whether it is part of the loss; one that is not acts on the gradient by itself.
        trainer: UnlearnTrainer.

    Args:
        trainer: UnlearnTrainer, whose model and arguments are there.
    Raises:
        UserError: what it needs, this run does not have.
    """

    name, stream = "", "forget"
    layers, reads = (), None
    in_loss = True

    def __init__(self, trainer):
        self.trainer = trainer
        data = trainer.train_dataset
        streams = trainer.all_streams_for(trainer.args) if data is None else data.streams
        if self.in_loss and self.stream not in streams:
            raise UserError(f"--regularizer {self.name} reads a {self.stream} set, which this method does not")

    def weight(self):
        """Return the coefficient at the present step."""
        raise NotImplementedError

    def values(self, output, standalone=False):
        """Return (B,) values per sequence or (B, T-1) per token.

        Args:
            output: StreamOutput of the stream.
            standalone: whether it is a batch by itself, and none of an optimizer step on all processes.
        """
        raise NotImplementedError

    def begin_step(self, batches):
        """Get to know the UnlearnBatches of an optimizer step of this process, before the first forward of them."""

    def require_output(self):
        """Refuse a run whose losses end below the output.

        Raises:
            UserError: saying what to type.
        """
        last = self.trainer.last_layer_for(self.trainer.args)
        if last is not None:
            raise UserError(
                f"--regularizer {self.name} reads the output, but this run's losses end at layer {last}; pass "
                "--retain_loss kl"
            )

    def attached(self):
        """Return the context of a training run in which it acts; entered while the model is the start model."""
        return contextlib.nullcontext()


class Orthogonality(Regularizer):
    """Forget rows of a batch at right angles to each other, so that no one direction brings all of them back.

    The mean positive cosine of the pooled states over all pairs of rows that are in one micro-batch, on all processes
    together, averaged over layers, times the rows' mean length, which makes up for the pooling in the gradient.

    Source: EleutherAI/unlearn (orthogonal circuit breakers).
    """

    name = "orthogonality"

    def __init__(self, trainer):
        super().__init__(trainer)
        args = trainer.args
        last = trainer.last_layer_for(args)
        chosen = args.orth_layers or list(trainer.layers_for(args)) or None
        self.layers = checked_layers(chosen, trainer.depth)
        if last is not None and max(self.layers) > last:
            raise UserError(f"--orth_layers {max(self.layers)} is above layer {last}, where this run's losses end")
        if args.per_device_train_batch_size * args.world_size < 2:
            raise UserError(
                "orthogonality needs a pair of forget rows in a micro-batch, but one row on one process leaves none; "
                "pass --per_device_train_batch_size 2"
            )

    def weight(self):
        """`--orth_coef` times its schedule."""
        args = self.trainer.args
        return args.orth_coef * schedule_factor(args.orth_schedule, self.trainer.progress())

    def values(self, output, standalone=False):
        """Return (B,): of each row the mean over layers and over its pairs, times the mean length."""
        gather, rank = self.trainer.accelerator.gather, self.trainer.args.process_index
        weights = output.weights
        own = torch.stack([pooled_directions(output.hidden[layer], output.mask, weights) for layer in self.layers], 1)
        lengths = output.mask.sum(-1)
        others, all_lengths = gather(own.detach().contiguous()), gather(lengths.contiguous())
        numbers = torch.arange(len(own), device=own.device) + rank * len(own)
        is_pair = (lengths > 0).unsqueeze(1) & (all_lengths > 0).unsqueeze(0)
        is_pair &= numbers.unsqueeze(1) != torch.arange(len(others), device=own.device).unsqueeze(0)
        found = [pair_similarity(own[:, n], others[:, n], is_pair) for n in range(len(self.layers))]
        length = all_lengths.sum() / (all_lengths > 0).sum().clamp(min=1)
        return torch.stack(found).mean(0) * length


class MaxEntropy(Regularizer):
    """The forget tokens' output distribution flattened: cross-entropy of the uniform distribution, over ln V.

    Source: EleutherAI/unlearn (max-entropy unlearning).
    """

    name = "max_entropy"
    reads = "uniform"

    def __init__(self, trainer):
        super().__init__(trainer)
        self.require_output()

    def weight(self):
        """`--max_entropy_coef`."""
        return self.trainer.args.max_entropy_coef

    def values(self, output, standalone=False):
        """Return (B, T-1), 1 where a distribution is uniform."""
        return output.uniform / math.log(self.trainer.model.config.get_text_config().vocab_size)


class L2SP(Regularizer):
    """The trained weights held to where they started; it acts on the gradients, after they are clipped.

    Source: Li et al. 2018, arXiv:1802.01483; see parameter_pull.PullToStart.
    """

    name = "l2_sp"
    in_loss = False

    def __init__(self, trainer):
        super().__init__(trainer)
        self.pull = PullToStart(trainer, self.weight)

    def weight(self):
        """`--l2sp_coef`."""
        return self.trainer.args.l2sp_coef

    def attached(self):
        """Return the context in which the optimizer's steps are pulled to the start."""
        return self.pull.attached()


REGULARIZERS = {
    "orthogonality": "llm_unlearn.regularizers:Orthogonality",
    "max_entropy": "llm_unlearn.regularizers:MaxEntropy",
    "l2_sp": "llm_unlearn.regularizers:L2SP",
    "ilu": "llm_unlearn.addons.invariance:invariance_of",
}
"""{name: what makes it of a trainer}"""


def regularizers_of(trainer):
    """Return the regularizers that a trainer's arguments ask for."""
    places = [REGULARIZERS[name].partition(":") for name in trainer.args.regularizer]
    return tuple(getattr(importlib.import_module(module), name)(trainer) for module, _, name in places)
