"""Tokenize the ACL 2024 sets once, for run_unlearn.py to use.

python save_tokenized_dataset.py --tokenizer_name_or_path MODEL [--data_dir DIR]

Writes, below tokenized_dataset/ beside this folder, the plain sets of arXiv, GitHub and general, and for the two forget
sets their random labels and the adversarial labels of the model (`--target_model_name_or_path`, by default the same).
"""

import argparse
import logging
from pathlib import Path

from llm_unlearn.arguments import DataFlags
from llm_unlearn.data.splits import load_split
from llm_unlearn.data.tokenize import TokenizeOptions, tokenize_rows
from llm_unlearn.data.tokenized_cache import NAMES, cache_key, variant, write_cache
from llm_unlearn.errors import UserError, run_cli
from llm_unlearn.models import context_length, load_model, load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
logger = logging.getLogger("llm_unlearn.save_tokenized_dataset")


def main(argv=None):
    """Write every set that the sources hold; returns the exit code."""
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if args.tokenizer_name_or_path is None:
        raise UserError("--tokenizer_name_or_path is missing; pass the folder or Hub name of the model")
    tokenizer = load_tokenizer(args.tokenizer_name_or_path)
    target = args.target_model_name_or_path or args.tokenizer_name_or_path
    options = TokenizeOptions(args.max_length, None, context_length(target))
    model = None
    for (domain, split), name in NAMES.items():
        if domain not in args.domain:
            continue
        flags = DataFlags(domain=domain, data_dir=args.data_dir, dataset_revision=args.dataset_revision)
        source = load_split(split, flags)
        rows = tokenize_rows(source.rows, tokenizer, options, f"{domain} {split}")

        def write(folder, settings, labeled, domain=domain, name=name, source=source):
            key = cache_key(tokenizer, options.length("text"), settings, {"forget": source.sha256})
            write_cache(args.output_dir / domain / name / folder, {"forget": labeled}, key)
            logger.info("%s: %d sequences", args.output_dir / domain / name / folder, len(labeled))

        write("normal", {}, rows)
        if split == "forget":
            model = model or _adversary(target, args)
            for folder, settings, labeled in _relabeled(rows, tokenizer, model, args):
                write(folder, settings, labeled)


def _relabeled(rows, tokenizer, model, args):
    """Yield (folder, settings, rows) of both published ways of drawing wrong labels."""
    from llm_unlearn.methods.random_label import RandomLabelArguments, draw_sampled, draw_uniform

    common = {"seed": args.seed, "use_cpu": args.use_cpu}
    uniform = RandomLabelArguments(completely_random=True, **common)
    yield *variant("random_label", uniform), draw_uniform(rows, tokenizer, args.seed)
    adversarial = RandomLabelArguments(top_k=1, rm_groundtruth=True, **common)
    labeled = draw_sampled(model, rows, adversarial, args.per_device_eval_batch_size)
    yield *variant("random_label", adversarial), labeled


def _adversary(name, args):
    import torch

    device = "cpu" if args.use_cpu or not torch.accelerator.is_available() else torch.accelerator.current_accelerator()
    return load_model(name, args.dtype).to(device).eval()


def _parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-t", "--tokenizer_name_or_path", help="Folder or Hub name of the tokenizer.")
    parser.add_argument(
        "--target_model_name_or_path", help="Model of the adversarial labels; default: the tokenizer's."
    )
    parser.add_argument("--data_dir", help="Folder that replaces the Hub.")
    parser.add_argument("--dataset_revision", help="Branch, tag or commit of the Hub data set.")
    parser.add_argument(
        "--domain", nargs="+", choices=["arxiv", "github", "general"], default=["arxiv", "github", "general"],
        help="Which domains; default: all three.",
    )  # fmt: skip
    parser.add_argument("--output_dir", type=Path, default=ROOT / "tokenized_dataset", help="Where to write.")
    parser.add_argument("--max_length", type=int, help="Tokens per chunk; default 4096, never beyond the model's.")
    parser.add_argument("--seed", type=int, default=42, help="Of the random labels.")
    parser.add_argument("--use_cpu", action="store_true", help="Stay on the CPU.")
    parser.add_argument("--dtype", default="float32", help="Of the model's weights.")
    parser.add_argument("--per_device_eval_batch_size", type=int, default=8, help="Chunks per forward.")
    return parser


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
