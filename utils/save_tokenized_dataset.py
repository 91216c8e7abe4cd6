"""Tokenize the ACL 2024 sets once, for run_unlearn.py to use.

python save_tokenized_dataset.py --tokenizer_name_or_path MODEL [--data_dir DIR]

Writes, below tokenized_dataset/ beside this folder, the plain sets of arXiv, GitHub and general, and for the two forget
sets their random labels and the adversarial labels of the model (`--target_model_name_or_path`, by default the same).
"""

import logging
from pathlib import Path

from llm_unlearn.cli.tokenizing import SetReader, tokenizing_parser
from llm_unlearn.data.tokenized_cache import NAMES, cache_key, variant, write_cache
from llm_unlearn.errors import run_cli
from llm_unlearn.models import load_model, model_fingerprint

ROOT = Path(__file__).resolve().parents[1]
logger = logging.getLogger("llm_unlearn.save_tokenized_dataset")


def main(argv=None):
    """Write every set that the sources hold; returns the exit code."""
    args = _parser().parse_args(argv)
    target = args.target_model_name_or_path or args.tokenizer_name_or_path
    read = SetReader(args, target)
    model = None
    for (domain, split), name in NAMES.items():
        if domain not in args.domain:
            continue
        source, rows = read(domain, split)
        made = [("normal", {}, rows)]
        if split == "forget":
            model = model or _adversary(target, args)
            made += _relabeled(rows, read.tokenizer, model, target, args)
        for folder, settings, labeled in made:
            path = args.output_dir / domain / name / folder
            key = cache_key(read.tokenizer, read.length, settings, {"forget": source.sha256})
            write_cache(path, {"forget": labeled}, key)
            logger.info("%s: %d sequences", path, len(labeled))


def _relabeled(rows, tokenizer, model, target, args):
    """Yield (folder, settings, rows) of both published ways of drawing wrong labels."""
    from llm_unlearn.methods.random_label import RandomLabelArguments, draw_sampled, draw_uniform

    common = {"seed": args.seed, "use_cpu": args.use_cpu}
    uniform = RandomLabelArguments(completely_random=True, **common)
    yield *variant("random_label", uniform), draw_uniform(rows, tokenizer, args.seed)
    adversarial = RandomLabelArguments(top_k=1, rm_groundtruth=True, **common)
    labeled = draw_sampled(model, rows, adversarial, args.per_device_eval_batch_size)
    yield *variant("random_label", adversarial, lambda: model_fingerprint(target)), labeled


def _adversary(name, args):
    import torch

    device = "cpu" if args.use_cpu or not torch.accelerator.is_available() else torch.accelerator.current_accelerator()
    return load_model(name, args.dtype).to(device).eval()


def _parser():
    parser = tokenizing_parser(__doc__, ["arxiv", "github", "general"], ROOT / "tokenized_dataset")
    parser.add_argument(
        "--target_model_name_or_path", help="Model of the adversarial labels; default: the tokenizer's."
    )
    parser.add_argument("--seed", type=int, default=42, help="Of the random labels.")
    parser.add_argument("--use_cpu", action="store_true", help="Stay on the CPU.")
    parser.add_argument("--dtype", default="float32", help="Of the model's weights.")
    parser.add_argument("--per_device_eval_batch_size", type=int, default=8, help="Chunks per forward.")
    return parser


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
