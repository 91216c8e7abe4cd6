"""The demo: an invented world, a small model that knows it, and NPO that makes it forget eight of its authors.

python -m llm_unlearn.cli.demo [--output_dir DIR] [--demo_seed N]
"""

import argparse
import json
import logging
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from llm_unlearn.errors import UserError, run_cli

logger = logging.getLogger("llm_unlearn.demo")
SETS = ("forget", "retain", "holdout")


def main(argv=None):
    """Run the demo; returns the exit code."""
    return run_cli(lambda: _main(sys.argv[1:] if argv is None else argv))


def _main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("demo_output"), help="Where everything goes.")
    parser.add_argument("--demo_seed", type=int, default=0, help="Seed of the invented world.")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    started = time.time()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    base, target, unlearned = (str(args.output_dir / name) for name in ("base", "target", "unlearned"))
    _say(f"1. A small untrained Llama and a tokenizer for an invented world (seed {args.demo_seed}) go to {base}")
    make_base_model(base, args.demo_seed)
    common = f"--domain demo --demo_seed {args.demo_seed} --overwrite_output_dir --save_strategy no --report_to none"
    _say("\n2. The target model learns the world: authors to forget, authors to keep")
    _run(f"--unlearn_method finetune --model_name_or_path {base} {common} {TARGET_FLAGS} --output_dir {target}")
    _say("\n3. Negative preference optimization makes it forget eight of the authors")
    _run(f"--unlearn_method npo --target_model_name_or_path {target} {common} {NPO_FLAGS} --output_dir {unlearned}")
    before, after = (measure(model, args.demo_seed) for model in (target, unlearned))
    seconds = round(time.time() - started, 1)
    result = {"before": before, "after": after, "seconds": seconds, "demo_seed": args.demo_seed}
    (args.output_dir / "demo.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    _say(table(before, after))
    _say(f"\n{seconds:.0f} s; the numbers are in {args.output_dir / 'demo.json'}, the unlearned model in {unlearned}")


TARGET_FLAGS = (
    "--learning_rate 5e-3 --num_train_epochs 20 --per_device_train_batch_size 16 --adam_beta2 0.95 --warmup_steps 20 "
    "--lr_scheduler_type cosine --logging_steps 20"
)
NPO_FLAGS = "--learning_rate 1e-3 --num_train_epochs 10 --retain_weight 5 --beta 0.1 --logging_steps 5"


def make_base_model(folder, demo_seed):
    """Write an untrained Llama of 0.4 million parameters with a tokenizer made for the demo world.

    Args:
        folder: where.
        demo_seed: seed of the world.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from llm_unlearn.data.synthetic import corpus, make_world

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=2048,
        show_progress=False,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(corpus(make_world(demo_seed)), trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", model_max_length=512
    )
    config = LlamaConfig(
        vocab_size=len(wrapped), hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(1)
    LlamaForCausalLM(config).save_pretrained(folder)
    wrapped.save_pretrained(folder)


def measure(model, demo_seed):
    """Score a model on the three sets of authors.

    Args:
        model: folder of the checkpoint.
        demo_seed: seed of the world.
    Returns:
        {"<set>/probability": mean over answers of exp(mean log-probability of the answer's tokens)}.
    """
    from transformers import PrinterCallback

    from llm_unlearn.arguments import DataFlags
    from llm_unlearn.data.splits import load_split
    from llm_unlearn.models import load_model, load_tokenizer
    from llm_unlearn.trainer import UnlearnTrainer
    from llm_unlearn.training_arguments import UnlearnArguments

    flags = DataFlags(domain="demo", demo_seed=demo_seed)
    trainer = UnlearnTrainer(
        model=load_model(model),
        args=UnlearnArguments(output_dir=model, per_device_eval_batch_size=40, disable_tqdm=True),
        eval_dataset={name: load_split(name, flags).rows for name in SETS},
        processing_class=load_tokenizer(model),
    )
    trainer.remove_callback(PrinterCallback)
    metrics = trainer.evaluate()
    return {f"{name}/probability": round(metrics[f"eval_{name}_probability"], 4) for name in SETS}


def table(before, after):
    """Return the table of the demo as text.

    Args:
        before: metrics of the target model.
        after: metrics of the unlearned model.
    """
    meaning = {"forget": "authors to forget", "retain": "authors to keep", "holdout": "authors never seen"}
    lines = ["", "Probability of the true answers  before   after", "-------------------------------  ------  ------"]
    for name in SETS:
        key = f"{name}/probability"
        lines.append(f"{meaning[name]:<31}  {before[key]:6.3f}  {after[key]:6.3f}")
    return "\n".join(lines)


def _run(flags):
    """Print a command as a user would type it, and run it."""
    script = Path(__file__).resolve().parents[2] / "run_unlearn.py"
    start = ["run_unlearn.py"] if script.is_file() else ["-m", "llm_unlearn.cli.unlearn"]
    _say(f"   $ python {start[0] if script.is_file() else ' '.join(start)} {flags}\n")
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    command = [sys.executable, *([str(script)] if script.is_file() else start), *shlex.split(flags)]
    status = subprocess.run(command, env=environment, check=False, stdout=subprocess.DEVNULL).returncode
    if status != 0:
        raise UserError(f"the command above ended with status {status}")


def _say(text):
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    raise SystemExit(main())
