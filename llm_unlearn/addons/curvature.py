"""Estimates of the diagonal of a Hessian from the batches of one optimizer step, shard by shard on every process."""
# Shapes: N counted tokens of a stream.

import contextlib
import functools
import hashlib

import torch

from llm_unlearn.addons.label_draws import LabelDraws, scores_of_drawn
from llm_unlearn.addons.shards import own_shard
from llm_unlearn.errors import NonFiniteError
from llm_unlearn.head import (
    concatenate,
    counted_states,
    counted_weights,
    divisors,
    split,
    wide_dtype,
)
from llm_unlearn.optimizer_steps import local
from llm_unlearn.regularizer_flags import STREAMS

STEP = 3e-3
"""How far each weight moves to difference gradients, beside the root mean square of all."""


class CurvaturePasses:
    """Base of estimators that take forwards and backwards of their own over the batches of an optimizer step.

    They run between the last backward of the step and the step itself, through the wrapped model and in the step's own
    micro-batches, and reduce once; the step's gradients, its logged terms and the random state stay what they are. What
    is drawn depends on the seed, the step, and the row or the weight alone: so accumulation, the number of processes
    and a resume change nothing.

    Args:
        trainer: UnlearnTrainer.
    """

    def __init__(self, trainer):
        self.trainer = trainer

    def measure(self, stepped, take, draw):
        """Take passes and call `take`; gradients are None before, and whatever after.

        Args:
            stepped: {parameter: its number} of what the optimizer is about to step.
            take: function of (parameter, this process's part of its estimate).
            draw: which of several estimates of one step.
        """
        raise NotImplementedError

    @torch.no_grad()
    def estimate(self, optimizer, take, draw=0):
        """Estimate the curvature of the parameters that have a gradient.

        Args:
            optimizer: torch.optim.Optimizer that is about to step them.
            take: function of (parameter, this process's part of its estimate).
            draw: which of several estimates of one step.
        Raises:
            NonFiniteError: an estimate is NaN or infinite.
        """
        trainer = self.trainer
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        held = [p.grad for p in parameters]
        stepped = {p: number for number, p in enumerate(parameters) if p.grad is not None}
        total = torch.zeros((), device=trainer.args.device)

        def checked(parameter, estimate):
            total.add_(estimate.sum().to(total.device))
            take(parameter, estimate)

        trainer.is_probing = True
        try:
            for parameter in parameters:
                parameter.grad = None
            with _forked_randomness(trainer.args.device):
                self.measure(stepped, checked, draw)
        finally:
            trainer.is_probing = False
            for parameter, gradient in zip(parameters, held, strict=True):
                parameter.grad = gradient
        if not torch.isfinite(trainer.accelerator.reduce(total, "sum")):
            raise NonFiniteError(trainer.non_finite_message("the estimated curvature"))

    def backwards(self, parts, backward, draw):
        """Run a backward for each micro-batch of the step and each part of its streams; gradients add up.

        Args:
            parts: lists of names of streams that share a forward.
            backward: function of (model, micro-batch, names).
            draw: seeds dropout.
        """
        trainer, accelerator = self.trainer, self.trainer.accelerator
        batches, _ = trainer.step_batches
        jobs = [(batch, names) for batch in batches for names in parts]
        torch.manual_seed(self.seed("dropout", draw, trainer.args.process_index))
        for number, (batch, names) in enumerate(jobs, start=1):
            is_last = number == len(jobs)
            accelerator.gradient_state._set_sync_gradients(is_last)
            waiting = contextlib.nullcontext() if is_last else accelerator.no_sync(model=trainer.model_wrapped)
            with waiting, torch.enable_grad():
                backward(trainer.model_wrapped, batch, names)
            trainer.current_flos += float(trainer.floating_point_ops({name: batch[name] for name in names}))
        if trainer.weight_mask is not None:
            trainer.weight_mask.mask_gradients()

    def seed(self, *parts):
        """Return a seed from the run's, the present step and whatever else."""
        text = repr((self.trainer.args.seed, self.trainer.state.global_step, *parts)).encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "big")

    def names(self):
        """Return the streams whose curvature is asked for, of those in a batch."""
        wanted, (batches, _) = self.trainer.args.hessian_data, self.trainer.step_batches
        return hessian_streams(batches[0], wanted)


class GaussNewton(CurvaturePasses):
    """Gauss-Newton-Bartlett: the squared gradient of the loss on labels that the model draws itself.

        y_n ~ p_n(v)                                                 for every counted token n of the step
        h_i = (d/d theta_i  sum_n sqrt(w_n / W) * -log p_n(y_n))^2,  W = sum_n w_n

    In expectation over the labels it is the diagonal of the Gauss-Newton matrix, J^T (diag(p) - p p^T) J, of the mean
    loss per token, because gradients on drawn labels are independent and 0 on average. With token weights w of 1 it is
    the paper's batch size times squared mean gradient. It takes one forward and one backward, of the counted tokens
    whatever the method's loss reads.

    Source: Liu et al. 2023, arXiv:2305.14342, Algorithm 2. Differs from the authors' code: labels of the step's own
        batch and not of another one, and its tokens counted instead of assumed.
    """

    def measure(self, stepped, take, draw):
        """See CurvaturePasses."""
        names = self.names()
        _, counts = self.trainer.step_batches
        tokens = sum(counts[name][1] for name in names).clamp(min=1e-12)
        parts = [[name] for name in names] if self.trainer.args.sequential_backward else [names]
        self.backwards(parts, lambda *job: self._backward(*job, tokens.sqrt(), draw), draw)
        for parameter in stepped:
            if parameter.grad is not None:
                take(parameter, local(parameter.grad).square())

    def _backward(self, model, batch, names, root, draw):
        trainer = self.trainer
        inputs, factors = trainer._prepare_inputs(batch), {}

        def read(head, states):
            parts, found = split(states, inputs, names), []
            for name in names:
                hidden = counted_states(parts[name], inputs[name])
                factors[name] = counted_weights(inputs[name]).clamp(min=0).sqrt()
                labels = LabelDraws(inputs[name], functools.partial(self.seed, name, draw))
                found.append(scores_of_drawn(head, hidden, labels, factors[name]))
            return torch.cat(found)

        model.train()
        with trainer.compute_loss_context_manager():
            logps = trainer.reader(model, read, *concatenate(inputs, names, trainer.data_collator.pad_token_id))
            loss = -(logps * torch.cat([factors[name] for name in names])).sum() / root
        trainer.accelerator.backward(loss.to(logps.dtype) * trainer.accelerator.num_processes)


class Hutchinson(CurvaturePasses):
    """Hutchinson's estimator, with the Hessian of the whole objective times a random direction from two gradients.

        h_i = u_i * (g_i(theta + e * u) - g_i(theta - e * u)) / (2 * e),   u_i = +1 or -1 with equal probability

    g is the gradient of what the method minimizes on the step's batch, or of its forget or retain term alone, and e the
    weights' root mean square times `STEP`. In expectation over u it is the diagonal of the Hessian up to e^2. No
    gradient is differentiated, so that it needs no more of a model, a kernel or a backend than training does. It takes
    two forwards and backwards; in memory one more copy of the trained weights, and one of their gradients.

    Source: Liu et al. 2023, arXiv:2305.14342, Algorithm 1. Differs from the authors' code: differences in place of a
        double backward, and signs in place of normal numbers, which have the larger variance.
    """

    def measure(self, stepped, take, draw):
        """See CurvaturePasses."""
        kept = {parameter: local(parameter).clone() for parameter in stepped}
        length = STEP * self._root_mean_square(kept)
        try:
            ahead = self._gradients(stepped, kept, length, draw)
            behind = self._gradients(stepped, kept, -length, draw)
        finally:
            for parameter, weights in kept.items():
                local(parameter).copy_(weights)
        for parameter, number in stepped.items():
            difference = ahead.pop(parameter).sub_(behind.pop(parameter))
            take(parameter, difference.mul_(self.direction(parameter, number, draw)).div_(2 * length))

    def direction(self, parameter, number, draw):
        """Return this process's part of u: of a parameter the same signs on every process, however it is cut."""
        generator = torch.Generator(parameter.device).manual_seed(self.seed("direction", draw, number))
        options = {"generator": generator, "device": parameter.device, "dtype": torch.int8}
        return own_shard(torch.randint(2, parameter.shape, **options).mul_(2).sub_(1), parameter).to(parameter.dtype)

    def _gradients(self, stepped, kept, length, draw):
        for parameter, number in stepped.items():
            moved = self.direction(parameter, number, draw).mul_(length).add_(kept[parameter])
            local(parameter).copy_(moved)
        trainer, (batches, _) = self.trainer, self.trainer.step_batches
        for part in trainer.regularizers:
            if part.in_loss:
                part.begin_step(batches)
        # Of the whole objective training_step runs every stream, or one after the other.
        is_whole = trainer.args.hessian_data == "both"
        running = [name for name in (batches[0] if is_whole else self.names()) if trainer.runs(name)]
        if running:
            parts = [running] if is_whole else [[name] for name in running if name not in trainer.companions]
            self.backwards(parts, self._backward, draw)
        found = {}
        for parameter, weights in kept.items():
            found[parameter] = torch.zeros_like(weights) if parameter.grad is None else local(parameter.grad).clone()
            parameter.grad = None
        return found

    def _backward(self, model, batch, names):
        trainer, (_, counts) = self.trainer, self.trainer.step_batches
        items = {name: divisors(counted) for name, counted in counts.items()}
        trainer.take_turns(None if trainer.args.hessian_data == "both" else names[0])
        try:
            trainer.training_step(model, batch, items)
        finally:
            trainer.take_turns(None)

    def _root_mean_square(self, kept):
        device = self.trainer.args.device
        squares = sum(weights.square().sum(dtype=torch.float64) for weights in kept.values())
        sums = torch.stack([squares.cpu(), torch.tensor(float(sum(weights.numel() for weights in kept.values())))])
        squares, count = self.trainer.accelerator.reduce(sums.to(device, wide_dtype(device)), "sum").tolist()
        return (squares / count) ** 0.5


def hessian_streams(streams, wanted):
    """Return the streams, of those that there are, whose curvature `--hessian_data` asks for.

    Those that a regularizer brings are none of them.
    """
    own = [name for name in streams if name not in STREAMS.values()]
    return [name for name in own if wanted == "both" or (name == "retain") == (wanted == "retain")]


@contextlib.contextmanager
def _forked_randomness(device):
    """Let the training's own random numbers go on afterwards as if nothing had been drawn."""
    if device.type == "cpu":
        with torch.random.fork_rng(devices=[]):
            yield
        return
    with torch.random.fork_rng(devices=[device.index or 0], device_type=device.type):
        yield
