"""Streams of tokenized rows, and the batches made of them."""
# Shapes: B sequences, T tokens.

import functools
import os

import torch

from llm_unlearn.data.plan import FILLER
from llm_unlearn.data.rows import check_rows, fingerprint, read_rows
from llm_unlearn.data.tokenize import IGNORED, ROW_COLUMNS, TokenizeOptions, tokenize_rows

UnlearnBatch = dict[str, dict[str, torch.Tensor]]
"""{stream: {"input_ids" (B,T), "attention_mask" (B,T), "labels" (B,T), "index" (B,)[, "weights" (B,T)]}}"""


class UnlearnDataset(torch.utils.data.Dataset):
    """Tokenized streams, addressed by (stream, row number).

    Args:
        streams: {stream: list of {"input_ids": list[int], "labels": list[int][, "weights": list[float]]}}, the anchor
            first.
    """

    def __init__(self, streams):
        self.streams = dict(streams)

    @classmethod
    def from_rows(cls, rows, tokenizer, options=None, annotate=None):
        """Tokenize rows stream by stream.

        Args:
            rows: {stream: checked rows}.
            tokenizer: a transformers tokenizer.
            options: TokenizeOptions.
            annotate: {stream: function that adds columns, see `tokenize_rows`}.
        Returns:
            UnlearnDataset.
        Raises:
            UserError: see `tokenize_rows`.
        """
        options, annotate = options or TokenizeOptions(), annotate or {}
        return cls(
            {name: tokenize_rows(part, tokenizer, options, name, annotate.get(name)) for name, part in rows.items()}
        )

    @classmethod
    def of(cls, data, tokenizer, options=None, annotate=None):
        """Tokenize data in any form that a trainer takes.

        Args:
            data: UnlearnDataset, {stream: rows} or rows of the forget set; rows are a list of dicts, a file or a
                datasets.Dataset.
            tokenizer: a transformers tokenizer.
            options: TokenizeOptions.
            annotate: see `from_rows`; without effect on an UnlearnDataset.
        Returns:
            UnlearnDataset.
        Raises:
            UserError: see `check_rows` and `tokenize_rows`.
        """
        if isinstance(data, cls):
            return data
        rows = {name: _as_rows(part, name) for name, part in cls.by_stream(data).items()}
        return cls.from_rows(rows, tokenizer, options, annotate)

    @classmethod
    def by_stream(cls, data):
        """Return {stream: rows} of data in any form; bare rows are the forget set."""
        if isinstance(data, cls):
            return data.streams
        return data if isinstance(data, dict) else {"forget": data}

    @functools.cached_property
    def lengths(self):
        """{stream: tokens of each sequence}."""
        return {name: [len(row["input_ids"]) for row in rows] for name, rows in self.streams.items()}

    @property
    def sizes(self):
        """{stream: number of sequences}."""
        return {name: len(rows) for name, rows in self.streams.items()}

    def num_tokens(self):
        """{stream: number of tokens that count}."""
        return dict(self._tokens)

    @functools.cached_property
    def _tokens(self):
        return {
            name: sum(label != IGNORED for row in rows for label in row["labels"][1:])
            for name, rows in self.streams.items()
        }

    @functools.cached_property
    def fingerprints(self):
        """{stream: sha256 of its token ids and labels, weights and what rows keep where there is any, in order}."""
        columns = ("input_ids", "labels", "weights", *ROW_COLUMNS)
        return {
            name: fingerprint([[row[column] for column in columns if column in row] for row in rows])
            for name, rows in self.streams.items()
        }

    def __len__(self):
        return len(next(iter(self.streams.values())))

    def __getitem__(self, key):
        """Return one row with its stream and number; number -1 is a filler of two tokens that do not count."""
        stream, row = key
        if row == FILLER:
            first = self.streams[stream][0]["input_ids"][:1]
            return {"stream": stream, "index": FILLER, "input_ids": first * 2, "labels": [IGNORED] * 2}
        return {"stream": stream, "index": row, **self.streams[stream][row]}


class UnlearnCollator:
    """Pad the rows of each stream on the right, and keep the streams apart.

    The attention mask comes from the lengths, never from a comparison with the pad id, so that a tokenizer without a
    pad token works and genuine end-of-sequence tokens stay visible.

    Args:
        pad_token_id: fills `input_ids`; its value changes nothing.
        multiple: pad to a multiple of this many tokens.
    """

    def __init__(self, pad_token_id=0, multiple=1):
        self.pad_token_id, self.multiple = pad_token_id, multiple

    def __call__(self, examples):
        """Collate rows of any streams.

        Args:
            examples: list of what UnlearnDataset returns.
        Returns:
            UnlearnBatch, streams in the order of their first row.
        """
        by_stream = {}
        for example in examples:
            by_stream.setdefault(example["stream"], []).append(example)
        return {stream: self.pad(rows) for stream, rows in by_stream.items()}

    def pad(self, rows):
        """Pad the rows of one stream.

        Args:
            rows: list of {"input_ids", "labels"[, "weights"][, "alignment"][, "index"]}, lists.
        Returns:
            dict of tensors, see UnlearnBatch.
        """
        longest = max(len(row["input_ids"]) for row in rows)
        width = -(-longest // self.multiple) * self.multiple

        def padded(column, value, dtype=torch.long):
            return torch.tensor([[*row[column], *[value] * (width - len(row[column]))] for row in rows], dtype=dtype)

        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        batch = {
            "input_ids": padded("input_ids", self.pad_token_id),
            "attention_mask": (torch.arange(width) < lengths.unsqueeze(1)).long(),
            "labels": padded("labels", IGNORED),
            "index": torch.tensor([row.get("index", FILLER) for row in rows]),
        }
        if any("weights" in row for row in rows):
            rows = [{"weights": [1.0] * len(row["input_ids"]), **row} for row in rows]
            batch["weights"] = padded("weights", 0.0, torch.float32)
        if any("alignment" in row for row in rows):
            rows = [{"alignment": [1] * len(row["input_ids"]), **row} for row in rows]
            batch["alignment"] = padded("alignment", 1)
        return batch


def _as_rows(data, name):
    if isinstance(data, (str, os.PathLike)):
        return read_rows(data)
    return check_rows((dict(row) for row in data), f"the {name} set")


def pad_id(tokenizer):
    """Return an id to pad with: the tokenizer's pad token, else its end-of-sequence token, else 0."""
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(candidate for candidate in candidates if candidate is not None)
