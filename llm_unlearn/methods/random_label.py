"""Fine-tuning on wrong labels: random ones, the reference's likeliest other tokens, or answers to other questions."""
# Shapes: B sequences, T tokens, V vocabulary, N counted positions.

from dataclasses import dataclass

import torch

from llm_unlearn.arguments import flag
from llm_unlearn.data.plan import permutation
from llm_unlearn.data.rows import form_of
from llm_unlearn.data.streams import UnlearnCollator
from llm_unlearn.data.tokenize import IGNORED, answer_place
from llm_unlearn.errors import UserError
from llm_unlearn.head import counted_positions
from llm_unlearn.objectives.labels import gumbel_noise, random_labels, sampled_labels, with_answer_of
from llm_unlearn.objectives.likelihood import nll
from llm_unlearn.reference import Reading
from llm_unlearn.trainer import UnlearnTrainer
from llm_unlearn.training_arguments import UnlearnArguments

ALL_TOKENS = 10_000_000_000
LABEL_SOURCES = ("tokens", "retain_answers")


@dataclass
class RandomLabelArguments(UnlearnArguments):
    """Arguments of `random_label`."""

    label_source: str = flag(
        "tokens",
        "Where labels come from: tokens, each drawn by itself as --completely_random or --top_k say; retain_answers, "
        "for each forget question the whole answer of a retain row, drawn by the seed.",
        choices=["tokens", "retain_answers"],
    )
    completely_random: bool = flag(False, "Draw each label uniformly from the vocabulary.")
    top_k: int = flag(ALL_TOKENS, "Draw each label from the reference's k likeliest tokens; 1 takes the likeliest.")
    top_p: float = flag(1.0, "Draw each label from the reference's nucleus of this probability, in (0, 1].")
    rm_groundtruth: bool = flag(False, "Never draw the true token.")
    legacy_shift: bool = flag(False, "Place each sampled label one position late, as the published code did.")

    def __post_init__(self):
        chosen = self.top_k != ALL_TOKENS or self.top_p != 1 or self.rm_groundtruth or self.legacy_shift
        if self.label_source not in LABEL_SOURCES:
            raise UserError(f"--label_source must be {' or '.join(LABEL_SOURCES)}, but is '{self.label_source}'")
        if self.label_source == "retain_answers":
            if chosen or self.completely_random or self.token_selection:
                raise UserError(
                    "--label_source retain_answers takes whole answers; leave out --completely_random, --top_k, "
                    "--top_p, --rm_groundtruth, --legacy_shift and --token_selection"
                )
            return super().__post_init__()
        if self.completely_random and chosen:
            raise UserError(
                "--completely_random draws from the whole vocabulary; leave out --top_k, --top_p and the rest"
            )
        if not self.completely_random and not chosen:
            raise UserError(
                "random_label needs --completely_random True, --top_k K --rm_groundtruth True, or --label_source "
                "retain_answers"
            )
        if self.top_k < 1 or not 0 < self.top_p <= 1:
            raise UserError(f"--top_k must be >= 1 and --top_p in (0, 1], but they are {self.top_k} and {self.top_p}")
        super().__post_init__()


class RandomLabelTrainer(UnlearnTrainer):
    """Descend on wrong labels for the forget set, so that the right ones are overwritten.

    The labels depend on the seed and the row alone: every epoch, process count and resumed run sees the same ones.
    Sampled labels come from the frozen reference while training; rows that bring labels of their own (from
    utils/save_tokenized_dataset.py) are taken as they are. With `--label_source retain_answers` a forget question is
    followed by the answer of a retain row, of which the model reads what it is to say; the retain set is not trained on
    otherwise.

    Source: Yao et al. 2024, arXiv:2402.15159; with retain answers Jia et al. 2024, arXiv:2404.18239 (SOUL, its RL).
    Differs from the authors' code of the latter, whose labels stand where they stood in the retain row, so that they
    are not those of the answer that was put in.
    """

    args_class = RandomLabelArguments
    token_terms = ("forget",)

    @classmethod
    def streams_for(cls, args):
        """The retain set is read where labels come from it."""
        return ("forget", "retain") if args.label_source == "retain_answers" else cls.streams

    @classmethod
    def check_rows(cls, rows, tokenizer, args):
        """Refuse texts, which have no answers to exchange."""
        for name in rows if args.label_source == "retain_answers" else ():
            for number, row in enumerate(rows[name], start=1):
                if row.get("input_ids") is None and form_of(row) == "text":
                    raise UserError(_no_answer(name, number))

    def weight_of(self, stream, args=None):
        """Of the retain set the answers alone are read."""
        return 0.0 if stream == "retain" else super().weight_of(stream, args)

    def reference_readings(self, args):
        """Sampled labels need it, unless the rows bring theirs."""
        if args.completely_random or args.label_source == "retain_answers" or self._has_labels():
            return {}

        def read(head, states, stream):
            return sample_from(_LazyLogits(head, states), stream, args)[:, 1:][counted_positions(stream)]

        drawn_by = (args.seed, args.top_k, args.top_p, args.rm_groundtruth, args.legacy_shift)
        return {"forget": Reading("labels", read, drawn_by)}

    def prepare_streams(self, streams, tokenizer, args):
        """Draw the uniform labels, or the answers to other questions, once."""
        if args.label_source == "retain_answers":
            length = self.tokenize_options.length("qa")
            return {"forget": draw_answers(streams["forget"], streams["retain"], args.seed, length)}
        if args.completely_random and not any("relabeled" in row for row in streams["forget"]):
            return {"forget": draw_uniform(streams["forget"], tokenizer, args.seed)}
        return streams

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Average the negative log-likelihood of the wrong labels over the tokens of the step."""
        if self._frozen_reference is not None:
            stream = inputs["forget"]
            counted = torch.nn.functional.pad(counted_positions(stream), (1, 0))
            labels = stream["labels"].masked_scatter(counted, self._ask_reference(inputs)["forget"])
            inputs = {**inputs, "forget": {**stream, "labels": labels}}
        outputs = self.forward(model, inputs)
        return self.total_loss({"forget": nll(outputs["forget"].logps)}, outputs, return_outputs, num_items_in_batch)

    def _has_labels(self):
        return self.train_dataset is not None and any(
            "relabeled" in row for row in self.train_dataset.streams["forget"]
        )


class _LazyLogits:
    """Logits (B, T, V) that are made where they are looked at: at some positions of one row."""

    def __init__(self, head, states):
        self.head, self.states = head, states
        self.device = states.device

    def __getitem__(self, place):
        return self.head.logits(self.states[place])


def draw_uniform(rows, tokenizer, seed):
    """Replace the labels of rows by uniform random tokens; special tokens keep themselves.

    Args:
        rows: list of {"input_ids", "labels"}.
        tokenizer: gives the vocabulary and the special tokens.
        seed: int; row n draws from (seed, n).
    Returns:
        list of rows with the new labels, marked `relabeled`.
    """
    relabeled = []
    for number, row in enumerate(rows):
        generator = torch.Generator().manual_seed(_row_seed(seed, number))
        labels = random_labels(torch.tensor(row["labels"]), len(tokenizer), generator, tokenizer.all_special_ids)
        relabeled.append({**row, "labels": labels.tolist(), "relabeled": True})
    return relabeled


def draw_answers(rows, others, seed, length):
    """Replace the answers of tokenized rows by answers of other rows.

    Args:
        rows: list of {"input_ids", "labels"} of questions with answers.
        others: the same, from which answers are drawn without replacement, until all were; row n of `rows` draws from
            (seed, n).
        seed: int.
        length: tokens of a sequence at most.
    Returns:
        list of rows, marked `relabeled`; one whose question fills the length is left out.
    Raises:
        UserError: a row without a question, which is a text; no row is left.
    """
    for name, part in (("forget", rows), ("retain", others)):
        bad = next((number for number, row in enumerate(part, start=1) if not answer_place(row["labels"])[0]), None)
        if bad is not None:
            raise UserError(_no_answer(name, bad))
    relabeled, size = [], len(others)
    for number, row in enumerate(rows):
        drawn = permutation(seed, "answers", number // size, size)[number % size]
        made = with_answer_of(row, others[drawn], length)
        if any(label != IGNORED for label in made["labels"]):
            relabeled.append({**made, "relabeled": True})
    if not relabeled:
        raise UserError(f"every forget question fills the {length} tokens of a sequence; pass a larger --max_length")
    return relabeled


def _no_answer(name, number):
    return (
        f"--label_source retain_answers exchanges the answers to questions, but row {number} of the {name} set is a "
        "text; pass rows of question and answer, or --completely_random True"
    )


@torch.no_grad()
def draw_sampled(model, rows, args, batch_size):
    """Replace the labels of rows by samples from a model, as training does from the reference.

    Args:
        model: causal language model in eval mode.
        rows: list of {"input_ids", "labels"}.
        args: RandomLabelArguments.
        batch_size: rows per forward.
    Returns:
        list of rows with the new labels, marked `relabeled`.
    """
    relabeled, collator = [], UnlearnCollator()
    for first in range(0, len(rows), batch_size):
        part = [{**row, "index": number} for number, row in enumerate(rows)][first : first + batch_size]
        stream = {name: tensor.to(model.device) for name, tensor in collator.pad(part).items()}
        logits = model(input_ids=stream["input_ids"], attention_mask=stream["attention_mask"], use_cache=False).logits
        for row, labels in zip(part, sample_from(logits, stream, args).tolist(), strict=True):
            labels = labels[: len(row["input_ids"])]
            relabeled.append({"input_ids": row["input_ids"], "labels": labels, "relabeled": True})
    return relabeled


def sample_from(logits, stream, args):
    """Replace the labels of a batch by samples from the reference.

    The label at position t is drawn from the reference's prediction of t (its logits at t - 1), without the true token
    where asked. `legacy_shift` takes the logits at t instead, which predict the next token: the published off-by-one.

    Args:
        logits: (B, T, V) of the reference.
        stream: one stream of an UnlearnBatch; `index` seeds each row's draw.
        args: RandomLabelArguments.
    Returns:
        (B, T) int64 labels, -100 exactly where they were.
    """
    labels = stream["labels"].clone()
    counted = labels != IGNORED
    counted[:, 0] = False
    for number in range(len(labels)):
        positions = counted[number].nonzero().squeeze(-1)
        if len(positions) == 0:
            continue
        predicted = logits[number, positions if args.legacy_shift else positions - 1]
        noise = None
        if args.top_k > 1:
            noise = gumbel_noise(predicted.shape, _row_seed(args.seed, int(stream["index"][number]))).to(logits.device)
        truth = labels[number, positions] if args.rm_groundtruth else None
        labels[number, positions] = sampled_labels(predicted, truth, args.top_k, args.top_p, noise)
    return labels


def _row_seed(seed, row):
    return (seed * 1_000_003 + row) % 2**63
