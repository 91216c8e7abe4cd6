"""Tokenize forget and retain sets together, for ascent_plus_descent and ascent_plus_kl_divergence.

python ascent_plus_descent_tokenizer.py --tokenizer_name_or_path MODEL [--positive_ratio N] [--positive_factor W]

Writes {arxiv,github} x {own, general} retain sets below tokenized_dataset/ beside this folder. Where the retain chunks
run out, training starts them over; their weights never shift onto forget chunks.
"""

import argparse
import logging
from pathlib import Path

from llm_unlearn.arguments import DataFlags
from llm_unlearn.data.splits import load_split
from llm_unlearn.data.tokenize import TokenizeOptions, tokenize_rows
from llm_unlearn.data.tokenized_cache import NAMES, cache_key, write_cache
from llm_unlearn.errors import UserError, run_cli
from llm_unlearn.models import context_length, load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
logger = logging.getLogger("llm_unlearn.ascent_plus_descent_tokenizer")


def main(argv=None):
    """Write the four published combinations; returns the exit code."""
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if args.tokenizer_name_or_path is None:
        raise UserError("--tokenizer_name_or_path is missing; pass the folder or Hub name of the model")
    tokenizer = load_tokenizer(args.tokenizer_name_or_path)
    options = TokenizeOptions(args.max_length, None, context_length(args.tokenizer_name_or_path))
    settings = {"positive_ratio": args.positive_ratio, "positive_factor": args.positive_factor}

    def load(domain, split):
        flags = DataFlags(domain=domain, data_dir=args.data_dir, dataset_revision=args.dataset_revision)
        source = load_split(split, flags)
        return source, tokenize_rows(source.rows, tokenizer, options, f"{domain} {split}")

    for domain in args.domain:
        forget, forget_rows = load(domain, "forget")
        for retain_domain, folder in ((domain, "ascent_plus_descent"), ("general", "ascent_plus_descent_general")):
            retain, retain_rows = load(retain_domain, "retain")
            data = {"forget": forget.sha256, "retain": retain.sha256}
            key = cache_key(tokenizer, options.length("text"), settings, data)
            path = args.output_dir / domain / NAMES[domain, "forget"] / folder
            write_cache(path, {"forget": forget_rows, "retain": retain_rows}, key)
            short = len(forget_rows) * args.positive_ratio - len(retain_rows)
            again = f"; {short} retain chunks come twice or more" if short > 0 else ""
            logger.info("%s: %d forget, %d retain sequences%s", path, len(forget_rows), len(retain_rows), again)


def _parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-t", "--tokenizer_name_or_path", help="Folder or Hub name of the tokenizer.")
    parser.add_argument("--positive_ratio", type=int, default=1, help="Retain chunks for each forget chunk.")
    parser.add_argument("--positive_factor", type=float, default=1.0, help="Weight of the retain term.")
    parser.add_argument("--data_dir", help="Folder that replaces the Hub.")
    parser.add_argument("--dataset_revision", help="Branch, tag or commit of the Hub data set.")
    parser.add_argument(
        "--domain", nargs="+", choices=["arxiv", "github"], default=["arxiv", "github"], help="Default: both."
    )
    parser.add_argument("--output_dir", type=Path, default=ROOT / "tokenized_dataset", help="Where to write.")
    parser.add_argument("--max_length", type=int, help="Tokens per chunk; default 4096, never beyond the model's.")
    return parser


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
