"""Training a tuned lens: every depth's distribution toward the model's own, the model frozen and whole on each process.

The rows of a batch are split over the processes; each sum over tokens is divided by the tokens of all of them, and the
gradients are added up, so that one process and several train the same lens.
"""
# Shapes: B sequences, T tokens, N positions, D hidden size, L decoder layers.

from dataclasses import dataclass

import torch
from accelerate.utils import reduce
from tqdm.auto import tqdm

from llm_unlearn.activations import capture
from llm_unlearn.data.plan import FILLER
from llm_unlearn.decoder import causal_lm, decoder_layers
from llm_unlearn.errors import NonFiniteError
from llm_unlearn.head import wide_dtype

OPTIMIZERS = ("adam", "sgd", "muon")
LEARNING_RATES = {"adam": 1e-3, "sgd": 0.1, "muon": 1e-3}
_LARGEST_NORM = 1.0


@dataclass(frozen=True)
class LensOptions:
    """How a lens is trained.

    Attributes:
        optimizer: of `OPTIMIZERS`, see `make_optimizers`.
        learning_rate: at the first step; it falls linearly to 0.
        max_steps: how many.
        batch_size: rows on each process.
        seed: of the order of the rows.
    """

    optimizer: str = "adam"
    learning_rate: float = LEARNING_RATES["adam"]
    max_steps: int = 250
    batch_size: int = 8
    seed: int = 42


class DepthStates:
    """What a frozen model holds at every depth for a batch, and the distributions that it makes of it.

    Args:
        model: causal language model, plain and on its device.
        lens: TunedLens made of it.
    """

    def __init__(self, model, lens):
        self.model, self.lens = model.requires_grad_(False).eval(), lens

    @torch.no_grad()
    def __call__(self, stream):
        """Return (hidden_states[0..L-1] of transformers, (B, T, D) each; mask (B, T); what the head gets (N, D)).

        Args:
            stream: one stream of an UnlearnBatch, on the device. Every token but padding is read, whatever the labels.
        """
        mask = stream["attention_mask"].bool() & (stream["index"] != FILLER).unsqueeze(1)
        inputs = {name: stream[name] for name in ("input_ids", "attention_mask")}
        # Without its head, whose logits of all tokens nobody needs.
        with capture(decoder_layers(self.model)[-1]) as captured:
            output = causal_lm(self.model).base_model(**inputs, output_hidden_states=True, use_cache=False)
        last = self.lens.hidden(self.lens.num_layers, captured[0][mask])
        return output.hidden_states[: self.lens.num_layers], mask, last


def fit(lens, states, batches, options, progress=False):
    """Train the translators; all processes together.

        L = (1/|I|) * sum_{i in I} (1/N) * sum_n KL(p_n || lens_i(h_in)),   p the model's own output

    N counts the tokens of all processes that are no padding; I are the depths with a translator. One backward for each
    depth, so that the graph of one is held at a time, and the vocabulary chunk by chunk. The gradient's norm is cut at
    1, the learning rate falls linearly to 0.

    Args:
        lens: TunedLens with translators, on the device.
        states: DepthStates.
        batches: probe_training.Batches.
        options: LensOptions.
        progress: show a bar.
    Returns:
        list of L by step, nats.
    Raises:
        NonFiniteError: L is NaN or infinite; the update was not made.
    Source: Belrose et al. 2023, arXiv:2303.08112; EleutherAI/unlearn for the mean over depths. Differs from
        their code: padding is left out, and the mean is over tokens, where theirs is over rows, with padding.
    """
    optimizers = make_optimizers(lens, options)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / options.max_steps)
        for optimizer in optimizers
    ]
    parameters, losses = list(lens.translators.parameters()), []
    bar = tqdm(total=options.max_steps, desc="lens", disable=not progress)
    for stream in _endless(batches, options.max_steps):
        for parameter in parameters:
            parameter.grad = None
        loss = _backward(lens, *states(stream))
        if not torch.isfinite(loss):
            raise NonFiniteError(
                f"the lens's divergence is not finite at step {len(losses) + 1}; the update was not made, and nothing "
                "was saved. A lower --learning_rate may help"
            )
        for parameter in parameters:
            parameter.grad = reduce(parameter.grad, "sum")
        torch.nn.utils.clip_grad_norm_(parameters, _LARGEST_NORM)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        losses.append(float(loss))
        bar.set_postfix(kl=f"{losses[-1]:.3f}")
        bar.update()
    bar.close()
    return losses


def _backward(lens, hidden_states, mask, last):
    """Add the gradients of this process's tokens; returns L over all processes' tokens."""
    count = reduce(mask.sum().to(wide_dtype(mask.device)), "sum").clamp(min=1)
    indices = [int(index) for index in lens.translators]
    total = count.new_zeros(())
    for index in indices:
        kl = divergence(lens, index, hidden_states[index][mask], last, takes_gradient=True).sum()
        (kl / (count * len(indices))).backward()
        total += kl.detach()
    return reduce(total, "sum") / (count * len(indices))


def divergence(lens, index, states, last, takes_gradient=False):
    """Return (N,) KL(p_n || lens_i(h_n)), nats.

    Args:
        lens: TunedLens.
        index: i.
        states: (N, D) hidden_states[i].
        last: (N, D) what the model's head gets at the same tokens.
        takes_gradient: whether the loss is a multiple of the sum, whose gradient is then taken in the forward.
    """
    labels = torch.zeros(len(states), dtype=torch.long, device=states.device)
    linear = torch.ones(len(states), device=states.device) if takes_gradient else None
    return lens.scores(index, states, labels, reference=(last, lens.projection), linear=linear)[1]


@torch.no_grad()
def measure(lens, states, batches):
    """Return {i: mean KL(p || lens_i), nats per token} over all rows and processes, for every depth from 0 to L - 1.

    Args:
        lens: TunedLens.
        states: DepthStates.
        batches: probe_training.Batches.
    """
    device = lens.head_weight.device
    sums = torch.zeros(lens.num_layers + 1, dtype=wide_dtype(device), device=device)
    for stream in batches.epoch(0):
        hidden_states, mask, last = states(stream)
        sums[-1] += mask.sum()
        for index, hidden in enumerate(hidden_states):
            sums[index] += divergence(lens, index, hidden[mask], last).sum()
    sums = reduce(sums, "sum")
    return {index: float(sums[index] / sums[-1]) for index in range(lens.num_layers)}


def make_optimizers(lens, options):
    """Return the optimizers of a lens's translators.

    adam: Adam with amsgrad, no weight decay. It is the default because its steps need no tuning by model: the lengths
    of hidden states, and the gradients with them, differ by orders of magnitude between models and between depths. It
    is the other choice of the tuned-lens package, whose learning rate for it is 1e-3.
    sgd: that package's own default, Nesterov momentum 0.9, rate 1 * (1 - 0.9), decay 1e-3 toward the logit lens.
    muon: EleutherAI/unlearn's, Muon (momentum 0.95, decay 0.01, steps as long as AdamW's) for the A, and AdamW
    (0.9, 0.95) for the b.

    Args:
        lens: TunedLens.
        options: LensOptions.
    """
    rate, parameters = options.learning_rate, list(lens.translators.parameters())
    if options.optimizer == "adam":
        return [torch.optim.Adam(parameters, lr=rate, amsgrad=True)]
    if options.optimizer == "sgd":
        return [torch.optim.SGD(parameters, lr=rate, momentum=0.9, nesterov=True, weight_decay=1e-3)]
    assert options.optimizer == "muon", options.optimizer
    weights, biases = ([p for p in parameters if p.dim() == dim] for dim in (2, 1))
    return [
        torch.optim.Muon(weights, lr=rate, momentum=0.95, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(biases, lr=rate, betas=(0.9, 0.95), weight_decay=0.01),
    ]


def _endless(batches, count):
    """Yield so many batches, epoch after epoch."""
    epoch = 0
    while True:
        for stream in batches.epoch(epoch):
            if count == 0:
                return
            count -= 1
            yield stream
        epoch += 1
