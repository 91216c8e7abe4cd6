"""Training steps as open-unlearning forwards them, and the bare unit that every step is divided by.

Written for this comparison from what that code forwards, counted in its steps: dense logits of every position, one
forward for each stream, a second retain forward under the divergence, a live copy as the reference. The losses are
ours, over the tokens that count, so that both sides must come to the same gradients; theirs average over prompts and
padding as well, which costs the same.
"""
# Shapes: B sequences, T tokens, V vocabulary.

import torch
import torch.nn.functional as F

BETA = 0.1
"""Of NPO, on both sides."""


def bare(model, stream):
    """Run the unit: forward and backward of one batch, dense logits, cross-entropy, every parameter training.

    Args:
        model: causal language model.
        stream: {"input_ids" (B, T), "labels" (B, T)[, "attention_mask"]} as in an UnlearnBatch.
    """
    logps, mask = _logps(_logits(model, stream), stream)
    (-logps.sum() / mask.sum()).backward()


def grad_diff_kl(model, reference, inputs):
    """Run GradDiff with the divergence: three policy forwards, one of the reference, two graphs backward.

    Args:
        model: the policy.
        reference: a frozen copy of it before training.
        inputs: {"forget": stream, "retain": stream}.
    """
    logps, mask = _logps(_logits(model, inputs["forget"]), inputs["forget"])
    forget = logps.sum() / mask.sum()
    # Its loss is never read, but its graph is held until the step is over.
    unread = _logits(model, inputs["retain"])
    own = _logits(model, inputs["retain"])[:, :-1].log_softmax(-1)
    with torch.no_grad():
        reference_logps = _logits(reference, inputs["retain"])[:, :-1].log_softmax(-1)
    values = F.kl_div(own, reference_logps, reduction="none", log_target=True).sum(-1)
    mask = _mask(inputs["retain"])
    (forget + (values * mask).sum() / mask.sum()).backward()
    del unread


def npo(model, reference, inputs):
    """Run NPO with descent on the retain set: two policy forwards, one of the reference, two graphs backward.

    Args: see `grad_diff_kl`.
    """
    logps, _ = _logps(_logits(model, inputs["forget"]), inputs["forget"])
    with torch.no_grad():
        reference_logps, _ = _logps(_logits(reference, inputs["forget"]), inputs["forget"])
    gaps = (logps - reference_logps).sum(-1)
    forget = -(2 / BETA) * F.logsigmoid(-BETA * gaps).mean()
    logps, mask = _logps(_logits(model, inputs["retain"]), inputs["retain"])
    (forget - logps.sum() / mask.sum()).backward()


def rmu(model, reference, layer, forget, retain, target):
    """Run RMU: three whole forwards with their heads, backward with gradients of all weights up to the layer.

    Args:
        model: the policy, every parameter training.
        reference: a frozen copy of it before training.
        layer: index of the layer whose states are steered.
        forget: (B, T) ids.
        retain: (B, T) ids.
        target: (D,) state that forget tokens are steered to.
    """
    from llm_unlearn.activations import capture, decoder_layers

    def states(read, ids):
        with capture(decoder_layers(read)[layer]) as found:
            logits = read(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        # open-unlearning passes labels along, so that a loss is made of the logits that nobody reads.
        F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        return found[0]

    steered, kept = states(model, forget), states(model, retain)
    with torch.no_grad():
        before = states(reference, retain)
    ((steered - target).square().mean() + (kept - before).square().mean()).backward()


STEPS = {"grad_diff_kl": grad_diff_kl, "npo": npo}


def _logits(model, stream):
    return model(
        input_ids=stream["input_ids"], attention_mask=stream.get("attention_mask"), use_cache=False
    ).logits.float()


def _mask(stream):
    return stream["labels"][:, 1:] != -100


def _logps(logits, stream):
    """Return ((B, T-1) log-probabilities of the tokens, 0 where they do not count; their mask)."""
    mask, labels = _mask(stream), stream["labels"][:, 1:].clamp(min=0)
    logps = -F.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
    return logps * mask, mask
