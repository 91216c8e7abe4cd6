"""The demo: an invented world, a small model that knows it, NPO that makes it forget eight authors, and a report.

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

from llm_unlearn.errors import UserError, run_script

logger = logging.getLogger("llm_unlearn.demo")
SHOWN = {
    "forget/probability": "probability of answers on authors to forget",
    "retain/probability": "probability of answers on authors to keep",
    "holdout/probability": "probability of answers on authors never seen",
    "model_utility": "model utility",
    "forget_quality": "forget quality (p-value against the retrained)",
    "loss/auc": "membership AUC of the loss (.5: cannot be told)",
}


def main(argv=None):
    """Run the demo; returns the exit code."""
    return run_script(_main, argv)


def _main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("demo_output"), help="Where everything goes.")
    parser.add_argument("--demo_seed", type=int, default=0, help="Seed of the invented world.")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    started = time.time()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    base, target, retrained, unlearned = (
        str(args.output_dir / name) for name in ("base", "target", "retrained", "unlearned")
    )
    keep = write_keep_file(args.output_dir, args.demo_seed)
    _say(f"1. A small untrained Llama and a tokenizer for an invented world (seed {args.demo_seed}) go to {base}")
    make_base_model(base, args.demo_seed)
    world = f"--domain demo --demo_seed {args.demo_seed} --overwrite_output_dir"
    common = f"--retain_data {keep} {world} --save_strategy no --report_to none"
    unlearn, evaluate = ("run_unlearn.py", "llm_unlearn.cli.unlearn"), ("run_eval.py", "llm_unlearn.cli.evaluate")
    _say("\n2. The target model learns the world: authors to forget, authors to keep, common knowledge")
    start = f"--model_name_or_path {base} {common} {TARGET_FLAGS}"
    _run(unlearn, f"--unlearn_method finetune {start} --output_dir {target}")
    _say("\n3. The gold standard: the same model retrained without the authors to forget")
    _run(unlearn, f"--unlearn_method retrain {start} --output_dir {retrained}")
    _say("\n4. Negative preference optimization makes the target model forget eight of the authors")
    forget = f"--target_model_name_or_path {target} {common} {NPO_FLAGS}"
    _run(unlearn, f"--unlearn_method npo {forget} --output_dir {unlearned}")
    _say("\n5. Each model is asked once, and every metric is computed from its answers")
    reference = ""
    for model in (retrained, target, unlearned):
        _run(evaluate, f"--model_name_or_path {model} {world} {reference} --output_dir {model}/eval")
        reference = f"--retain_reference {retrained}/eval/results.json"
    page = args.output_dir / "report.html"
    _say("\n6. One page compares the three")
    shown = f"{target} {unlearned} {retrained} --title Demo --output {page}"
    _run((None, "llm_unlearn.cli.report"), shown)
    before, after = (measure(model) for model in (target, unlearned))
    seconds = round(time.time() - started, 1)
    result = {"before": before, "after": after, "seconds": seconds, "demo_seed": args.demo_seed}
    (args.output_dir / "demo.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    _say(table(before, after))
    _say(f"\n{seconds:.0f} s; the numbers are in {args.output_dir / 'demo.json'}, the unlearned model in {unlearned},")
    _say(f"and the page to look at is {page}")


TARGET_FLAGS = (
    "--learning_rate 5e-3 --num_train_epochs 20 --per_device_train_batch_size 16 --adam_beta2 0.95 --warmup_steps 20 "
    "--lr_scheduler_type cosine --logging_steps 20"
)
NPO_FLAGS = "--learning_rate 7e-4 --num_train_epochs 8 --retain_weight 8 --beta 0.1 --logging_steps 5"


def write_keep_file(folder, demo_seed):
    """Write what the models must keep, authors and common knowledge, as one file; returns its path.

    Args:
        folder: where.
        demo_seed: seed of the world.
    """
    from llm_unlearn.data.synthetic import make_world

    world = make_world(demo_seed)
    rows = [row for name in ("retain", "real_authors", "world_facts") for row in world[name]]
    path = Path(folder) / "keep.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


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


def measure(model):
    """Return the numbers of the demo from what run_eval.py found out about a model.

    Args:
        model: folder of the checkpoint, scored into its `eval` folder.
    Returns:
        {metric: value, four digits of it}.
    """
    found = json.loads((Path(model) / "eval/results.json").read_text(encoding="utf-8"))["metrics"]
    return {name: float(f"{found[name]['value']:.4g}") for name in SHOWN}


def table(before, after):
    """Return the table of the demo as text.

    Args:
        before: metrics of the target model.
        after: metrics of the unlearned model.
    """
    lines = ["", f"{'':<50}  before   after", f"{'-' * 50}  ------  ------"]
    rows = [f"{text:<50}  {_shown(before[name])}  {_shown(after[name])}" for name, text in SHOWN.items()]
    return "\n".join(lines + rows)


def _shown(value):
    return f"{value:6.3f}" if value >= 0.001 or value == 0 else f"{value:6.0e}"


def _run(script, flags):
    """Print a command as a user would type it, and run it; without a checkout the module runs in the script's place."""
    name, module = script
    path = Path(__file__).resolve().parents[2] / (name or "")
    typed = [name] if name and path.is_file() else ["-m", module]
    _say(f"   $ python {' '.join([*typed, *flags.split()])}\n")
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    start = [str(path)] if typed == [name] else typed
    # What the scripts print is for somebody who runs one of them.
    command = [sys.executable, *start, *shlex.split(flags)]
    status = subprocess.run(command, env=environment, check=False, stdout=subprocess.DEVNULL).returncode
    if status != 0:
        raise UserError(f"the command above ended with status {status}")


def _say(text):
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    raise SystemExit(main())
