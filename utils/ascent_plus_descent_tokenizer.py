"""Tokenize forget and retain sets together, for ascent_plus_descent and ascent_plus_kl_divergence.

python ascent_plus_descent_tokenizer.py --tokenizer_name_or_path MODEL [--positive_ratio N] [--positive_factor W]

Writes {arxiv,github} x {own, general} retain sets below tokenized_dataset/ beside this folder. Where the retain chunks
run out, training starts them over; their weights never shift onto forget chunks.
"""

import logging
from pathlib import Path

from llm_unlearn.cli.tokenizing import SetReader, tokenizing_parser
from llm_unlearn.data.tokenized_cache import NAMES, cache_key, write_cache
from llm_unlearn.errors import run_cli

ROOT = Path(__file__).resolve().parents[1]
logger = logging.getLogger("llm_unlearn.ascent_plus_descent_tokenizer")


def main(argv=None):
    """Write the four published combinations; returns the exit code."""
    args = _parser().parse_args(argv)
    read = SetReader(args)
    settings = {"positive_ratio": args.positive_ratio, "positive_factor": args.positive_factor}
    for domain in args.domain:
        forget, forget_rows = read(domain, "forget")
        for retain_domain, folder in ((domain, "ascent_plus_descent"), ("general", "ascent_plus_descent_general")):
            retain, retain_rows = read(retain_domain, "retain")
            data = {"forget": forget.sha256, "retain": retain.sha256}
            key = cache_key(read.tokenizer, read.length, settings, data)
            path = args.output_dir / domain / NAMES[domain, "forget"] / folder
            write_cache(path, {"forget": forget_rows, "retain": retain_rows}, key)
            short = len(forget_rows) * args.positive_ratio - len(retain_rows)
            again = f"; {short} retain chunks come twice or more" if short > 0 else ""
            logger.info("%s: %d forget, %d retain sequences%s", path, len(forget_rows), len(retain_rows), again)


def _parser():
    parser = tokenizing_parser(__doc__, ["arxiv", "github"], ROOT / "tokenized_dataset")
    parser.add_argument("--positive_ratio", type=int, default=1, help="Retain chunks for each forget chunk.")
    parser.add_argument("--positive_factor", type=float, default=1.0, help="Weight of the retain term.")
    return parser


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
