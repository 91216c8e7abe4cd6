"""What the two tokenizing scripts of utils/ share: their flags, the tokenizer, and the sets they read."""

import argparse
import logging
from pathlib import Path

from llm_unlearn.arguments import DataFlags
from llm_unlearn.data.splits import load_split
from llm_unlearn.data.tokenize import TokenizeOptions, tokenize_rows
from llm_unlearn.errors import UserError
from llm_unlearn.models import context_length, load_tokenizer


def tokenizing_parser(description, domains, output_dir):
    """Return the parser with the flags of both scripts.

    Args:
        description: the script's docstring.
        domains: names that --domain takes; all by default.
        output_dir: default folder of the tokenized sets.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("-t", "--tokenizer_name_or_path", help="Folder or Hub name of the tokenizer.")
    parser.add_argument("--data_dir", help="Folder that replaces the Hub.")
    parser.add_argument("--dataset_revision", help="Branch, tag or commit of the Hub data set.")
    parser.add_argument("--domain", nargs="+", choices=domains, default=domains, help="Which domains; default: all.")
    parser.add_argument("--output_dir", type=Path, default=output_dir, help="Where to write.")
    parser.add_argument("--max_length", type=int, help="Tokens per chunk; default 4096, never beyond the model's.")
    return parser


class SetReader:
    """Loads and tokenizes sets of the ACL 2024 domains.

    Args:
        args: namespace of `tokenizing_parser`.
        model: folder or Hub name of the model whose context bounds the chunks; None takes the tokenizer's.
    Raises:
        UserError: no tokenizer was named, or it cannot be loaded.
    """

    def __init__(self, args, model=None):
        if args.tokenizer_name_or_path is None:
            raise UserError("--tokenizer_name_or_path is missing; pass the folder or Hub name of the model")
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        self.args = args
        self.tokenizer = load_tokenizer(args.tokenizer_name_or_path)
        self.options = TokenizeOptions(args.max_length, None, context_length(model or args.tokenizer_name_or_path))

    @property
    def length(self):
        """Tokens per chunk."""
        return self.options.length("text")

    def __call__(self, domain, split):
        """Return (Source, tokenized rows) of one split."""
        flags = DataFlags(domain=domain, data_dir=self.args.data_dir, dataset_revision=self.args.dataset_revision)
        source = load_split(split, flags)
        return source, tokenize_rows(source.rows, self.tokenizer, self.options, f"{domain} {split}")
