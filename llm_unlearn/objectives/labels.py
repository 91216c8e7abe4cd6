"""Wrong labels to train on: uniform over the vocabulary, the reference's most likely other token, other answers."""
# Shapes: B sequences, T tokens, V vocabulary, N counted positions.

import torch

from llm_unlearn.data.tokenize import answer_place


def random_labels(labels, vocab_size, generator, keep_ids=()):
    """Replace each supervised label by a token drawn uniformly from the vocabulary.

        y_t ~ Uniform{0, ..., V-1}

    The true token is not excluded, as published. Labels that are special tokens keep themselves.

    Args:
        labels: (T,) int64, -100 where a token does not count.
        vocab_size: V.
        generator: seeded torch.Generator on the CPU.
        keep_ids: token ids that are never replaced (pad, eos, bos, unk).
    Returns:
        (T,) int64, -100 exactly where `labels` is.
    Source: Yao et al. 2024, arXiv:2402.15159 (fine-tuning with random labels). Differs from the authors' code, where a
        drawn pad id silently turned into -100.
    """
    drawn = torch.randint(0, vocab_size, labels.shape, generator=generator)
    keep = (labels == -100) | torch.isin(labels, torch.tensor(list(keep_ids), dtype=labels.dtype))
    return torch.where(keep, labels, drawn)


def sampled_labels(logits, forbidden, top_k, top_p, noise):
    """Draw each label from the reference's distribution, cut to top-k and top-p, without the forbidden token.

        y_n ~ r(v | x_<t) over the k most likely v != forbidden_n whose cumulative probability reaches top_p

    With top_k 1 this is argmax over all tokens but the true one: an adversarial sample.

    Args:
        logits: (N, V) the reference's logits.
        forbidden: (N,) int64 token that must not be drawn, or None.
        top_k: how many tokens stay, >= 1; values above V keep all.
        top_p: the nucleus: tokens are kept until their cumulative probability exceeds it, in (0, 1].
        noise: (N, V) standard Gumbel noise, or None for top_k 1.
    Returns:
        (N,) int64.
    Source: Yao et al. 2024, arXiv:2402.15159 (unlearning with adversarial samples). Differs from the authors' code,
        which also forbids the last row of the vocabulary, whatever it holds.
    """
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32)).clone()
    if forbidden is not None:
        scores.scatter_(-1, forbidden.unsqueeze(-1), float("-inf"))
    if top_k < scores.shape[-1]:
        lowest_kept = scores.topk(top_k, dim=-1).values[:, -1:]
        scores = scores.masked_fill(scores < lowest_kept, float("-inf"))
    if top_p < 1:
        ordered, order = scores.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(-1)
        beyond = probabilities.cumsum(-1) - probabilities > top_p
        scores = scores.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), float("-inf"))
    return (scores if noise is None else scores + noise).argmax(-1)


def gumbel_noise(shape, seed):
    """Standard Gumbel noise from a seed: argmax(log p + noise) is a draw from p.

    Args:
        shape: of the result.
        seed: int; the same seed and shape give the same noise on every machine.
    Returns:
        float32 tensor on the CPU.
    """
    generator = torch.Generator().manual_seed(seed % 2**63)
    uniform = torch.rand(shape, generator=generator).clamp_(min=torch.finfo(torch.float32).tiny)
    return -torch.log((-torch.log(uniform)).clamp_(min=torch.finfo(torch.float32).tiny))


def with_answer_of(row, other, length):
    """Return a question with the answer to another one, of which every token counts.

    Args:
        row: {"input_ids", "labels"} of the question and its own answer, lists.
        other: the same of the question whose answer is taken, its end of sequence included.
        length: tokens at most; what is beyond is cut off.
    Returns:
        {"input_ids", "labels"}.
    Source: Jia et al. 2024, arXiv:2404.18239 (SOUL, its RL). Differs from the authors' code, see `RandomLabelTrainer`.
    """
    question = row["input_ids"][: answer_place(row["labels"])[0]]
    first, last = answer_place(other["labels"])
    answer = other["input_ids"][first:last]
    labels = [-100] * len(question) + answer
    return {"input_ids": (question + answer)[:length], "labels": labels[:length]}
