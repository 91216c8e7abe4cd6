"""ILU: a regularizer that keeps the model where fine-tuning on unrelated data has nothing to gain, on any method."""
# Shapes: B sequences, T tokens, E environments.

import contextlib

import torch
from accelerate.utils import DistributedType
from torch.nn.parallel import DistributedDataParallel

from llm_unlearn.errors import UserError
from llm_unlearn.head import counted_positions, wide_dtype
from llm_unlearn.head_reading import score_streams
from llm_unlearn.objectives.invariance import irm_penalty, scale_gradient
from llm_unlearn.objectives.likelihood import nll
from llm_unlearn.optimizer_steps import local
from llm_unlearn.regularizers import Regularizer


def invariance_of(trainer):
    """Return the regularizer of `--ilu_mode`."""
    return {"logit_scale": LogitScale, "parameter_gradient": ParameterGradient}[trainer.args.ilu_mode](trainer)


class Invariance(Regularizer):
    """A penalty on the gradient of the loss on unrelated data, by which fine-tuning on it would move the model.

    Rows of the stream `invariance` belong to environments (column `environment`, from 0); each has a penalty of its
    own, over its tokens in the whole optimizer step on all processes, and they are averaged.

    Args:
        trainer: UnlearnTrainer.
    Raises:
        UserError: losses that end below the output.
    """

    name, stream = "ilu", "invariance"

    def __init__(self, trainer):
        super().__init__(trainer)
        self.require_output()
        rows = [{}] if trainer.train_dataset is None else trainer.train_dataset.streams[self.stream]
        numbers = [row.get("environment", 0) for row in rows]
        names = sorted(set(numbers))
        self.environments = torch.tensor([names.index(number) for number in numbers], device=trainer.args.device)
        self.num_environments = len(names)

    def weight(self):
        """`--ilu_weight`."""
        return self.trainer.args.ilu_weight

    def environments_of(self, index):
        """Return (B,) environments of rows by their number; fillers, none of whose tokens counts, are in the first."""
        return self.environments[index.clamp(min=0)]

    def by_environment(self, index, values):
        """Return (E, K) sums of values (B, K) of rows, in the widest type."""
        values = values.to(wide_dtype(values.device))
        found = values.new_zeros(self.num_environments, values.shape[1])
        return found.index_add_(0, self.environments_of(index), values)

    def score(self, model, stream, **wanted):
        """Run one micro-batch of the stream by itself; returns its StreamOutput.

        Args:
            model: the wrapped model.
            stream: of an UnlearnBatch, on the device.
            **wanted: see `head_reading.score_streams`, with True for its names.
        """
        trainer, names = self.trainer, (self.stream,)
        wanted = {key: names for key, is_wanted in wanted.items() if is_wanted}
        filler = trainer.data_collator.pad_token_id
        with trainer.compute_loss_context_manager():
            return score_streams(trainer.reader, model, {self.stream: stream}, names, filler, **wanted)[self.stream]


class LogitScale(Invariance):
    """IRMv1: the squared derivative of the mean loss by one factor on all logits.

        P = (mean over the tokens of an environment of NLL - entropy)^2

    A closed form with an ordinary backward, so that it shards, and goes through the chunked head. The first micro-batch
    of a step has to know what the later ones will say, which are measured before it, by forwards without gradients and
    without dropout: with one micro-batch in a step, on however many processes, it costs none.

    Source: see objectives.invariance.irm_penalty.
    """

    reads = "entropy"
    _later, _step = 0.0, None

    def begin_step(self, batches):
        """Measure the micro-batches after the first."""
        trainer, model = self.trainer, self.trainer.model_wrapped
        self._later, self._step = 0.0, None
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad():
                for batch in batches[1:]:
                    stream = trainer._prepare_inputs(batch[self.stream])
                    self._later = self._later + self._totals(self.score(model, stream, entropy=True))
        finally:
            model.train(was_training)

    def values(self, output, standalone=False):
        """Return (B, T-1) whose mean over the tokens of the step is the penalty."""
        totals = self._totals(output)
        if not standalone:
            if self._step is None:
                self._step = self.trainer.accelerator.reduce(totals + self._later, "sum")
            totals = self._step
        environments = self.environments_of(output.index)
        return irm_penalty(scale_gradient(output.logps, output.entropy), environments, totals)

    def _totals(self, output):
        """Return (E, 2): what this batch adds to the sums of scale gradients and to the numbers of tokens."""
        values = scale_gradient(output.logps, output.entropy).detach()
        weights = output.mask if output.weights is None else output.mask * output.weights
        return self.by_environment(output.index, torch.stack([(values * weights).sum(-1), weights.sum(-1)], -1))


class ParameterGradient(Invariance):
    """The squared gradient of the mean loss by the trained weights, whose own gradient is a finite difference.

        P = ||g||^2,   g = gradient of the mean loss of an environment
        gradient of P = 2 H g ~ 2 ||g|| / radius * (gradient at theta + radius * g / ||g|| - g)

    Once per optimizer step, before its gradients are clipped, the step's rows are run forward and backward twice; the
    weights come back bit for bit. Each environment is run by itself, over all rows of the step. Only weights to which
    the other terms give a gradient count: those that train in this step. It takes the memory of the trained weights
    three times, for their originals while they are moved, for g and for the other terms' gradients.

    Source: the reading of arXiv:2506.01339 as a gradient-norm penalty; the finite difference as in Zhao et al. 2022,
        arXiv:2202.03599. Differs from the former: no code of it is published.

    Raises:
        UserError: a backend that does not let gradients be taken away between two backwards; fp16.
    """

    in_loss = False

    def __init__(self, trainer):
        super().__init__(trainer)
        kind = trainer.accelerator.distributed_type
        if kind == DistributedType.DEEPSPEED or (kind == DistributedType.FSDP and not trainer.is_fsdp2()):
            name = "DeepSpeed" if kind == DistributedType.DEEPSPEED else "FSDP version 1"
            raise UserError(
                f"--ilu_mode parameter_gradient needs gradients of its own, which {name} does not hand out; pass "
                "--ilu_mode logit_scale, or --fsdp True without a version"
            )
        if trainer.accelerator.mixed_precision == "fp16":
            raise UserError(
                "--ilu_mode parameter_gradient compares gradients, which --fp16 True rescales; pass --bf16 True or "
                "--ilu_mode logit_scale"
            )
        self._batches = None

    def begin_step(self, batches):
        """Keep the rows of the step until its gradients are there."""
        self._batches = [batch[self.stream] for batch in batches]

    @contextlib.contextmanager
    def attached(self):
        """Act where transformers takes the gradient's norm, which it does in every step, be it only to log it."""
        accelerator = self.trainer.accelerator
        original = accelerator.clip_grad_norm_

        def clip_grad_norm_(*given, **options):
            if self._batches is not None:
                self.add_gradient()
            return original(*given, **options)

        accelerator.clip_grad_norm_ = clip_grad_norm_
        try:
            yield self
        finally:
            accelerator.clip_grad_norm_ = original
            self._batches = None

    def add_gradient(self):
        """Add the gradient of the penalty of the step to the gradients of the other terms, and log the penalty."""
        trainer, model = self.trainer, self.trainer.model_wrapped
        batches, self._batches = [trainer._prepare_inputs(batch) for batch in self._batches], None
        tokens = sum(self.by_environment(part["index"], _rows_counted(part)) for part in batches)
        tokens = trainer.accelerator.reduce(tokens, "sum").flatten()
        parameters = [p for p in model.parameters() if p.grad is not None]
        added = [p.grad for p in parameters]
        total, share = torch.zeros((), device=trainer.args.device), self.weight() / max(int((tokens > 0).sum()), 1)
        for number in tokens.nonzero().flatten().tolist():
            rows = [self._of_environment(number, part) for part in batches]
            norm, first, second = self._two_gradients(model, parameters, rows, tokens[number])
            total += norm**2
            factor = share * 2 * norm / trainer.args.ilu_radius
            added = [_plus(old, a, b, factor) for old, a, b in zip(added, first, second, strict=True)]
        model.zero_grad()
        for parameter, gradient in zip(parameters, added, strict=True):
            parameter.grad = gradient
        if trainer.weight_mask is not None:
            trainer.weight_mask.mask_gradients()
        shares = trainer.args.world_size * max(int((tokens > 0).sum()), 1)
        trainer._log_term(self.name, total / shares, standalone=False)

    def _of_environment(self, number, stream):
        """Return the stream in which no token of another environment counts."""
        is_other = self.environments_of(stream["index"]) != number
        return {**stream, "labels": stream["labels"].masked_fill(is_other.unsqueeze(-1), -100)}

    def _two_gradients(self, model, parameters, rows, tokens):
        """Return (norm, gradients, gradients at the moved weights), lists in the order of the parameters."""
        device = self.trainer.args.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            first = self._gradients(model, parameters, rows, tokens)
        norm = torch.nn.utils.get_total_norm([gradient for gradient in first if gradient is not None])
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        kept = [local(parameter).clone() for parameter in parameters]
        with torch.no_grad():
            for parameter, gradient in zip(parameters, first, strict=True):
                if gradient is not None and norm > 0:
                    step = (self.trainer.args.ilu_radius / norm).to(parameter.device)
                    local(parameter).add_(local(gradient) * step)
        # The random numbers of dropout are those of the first time again.
        second = self._gradients(model, parameters, rows, tokens)
        for parameter, values in zip(parameters, kept, strict=True):
            local(parameter).copy_(values)
        return norm, first, second

    def _gradients(self, model, parameters, rows, tokens):
        """Return the gradient of the mean NLL of rows on all processes, for each parameter its own or None."""
        model.zero_grad()
        for number, stream in enumerate(rows, start=1):
            waits = isinstance(model, DistributedDataParallel) and number < len(rows)
            with model.no_sync() if waits else contextlib.nullcontext():
                output = self.score(model, stream, linear=True)
                total, _ = output.summed(nll(output.logps))
                # Processes are averaged over.
                self.trainer.accelerator.backward(total / tokens * self.trainer.args.world_size)
        if self.trainer.weight_mask is not None:
            self.trainer.weight_mask.mask_gradients()
        return [parameter.grad for parameter in parameters]


def _rows_counted(stream):
    """Return (B, 1): the tokens of each row that count, their weights where given."""
    counted = counted_positions(stream)
    counted = counted * stream["weights"][:, 1:] if "weights" in stream else counted
    return counted.sum(-1, keepdim=True)


def _plus(old, first, second, factor):
    """Return old + factor * (second - first), where None is 0; second is used up."""
    if second is None:
        return old
    change = second.sub_(first).mul_(factor.to(second.device))
    return change if old is None else old.add_(change)
