"""run_unlearn.py: parse, load, train, save, push."""

import logging
import math
import os
import time

from llm_unlearn.errors import UserError, run_script
from llm_unlearn.memory.request import split_request
from llm_unlearn.parsing import parse
from llm_unlearn.processes import set_up_logging

logger = logging.getLogger("llm_unlearn")


def main(argv=None):
    """Run one unlearning job.

    Args:
        argv: list of words; None takes the process's own.
    Returns:
        int exit code: 0 done, 2 the user's mistake, 3 saved but not pushed, 143 stopped by SIGTERM with a checkpoint.
    """
    return run_script(_main, argv)


def _main(argv):
    request, words, config = split_request(argv)
    if request is not None:
        from llm_unlearn.memory.command import print_estimate

        return print_estimate(request, words, config)
    parsed = parse(argv)
    if parsed is None:
        return
    from llm_unlearn.data.splits import check_trainable
    from llm_unlearn.output_directory import check_output_directory, output_directory

    set_up_logging()
    if parsed.args.use_cpu:
        # DeepSpeed, where it is installed, says at every import that it found no GPU unless told so.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    for note in dict.fromkeys(parsed.notes):
        logger.info(note)
    check_trainable(parsed.data.domain)
    start = start_model(parsed)
    _warn_of_start(parsed)
    parsed.args.output_dir = output_directory(parsed.method, parsed.args, parsed.model, parsed.data)
    check_output_directory(parsed.args, start)
    trainer, sources = build_trainer(parsed)
    _say_what_runs(parsed, trainer)
    if not parsed.args.do_unlearn:
        logger.info("--do_unlearn False: everything is prepared, nothing was trained")
        return
    _train_and_save(parsed, trainer, sources)


def start_model(parsed):
    """Return the model from which a run starts.

    Args:
        parsed: Parsed command line.
    Returns:
        str: the target model; for `retrain` and `finetune` --model_name_or_path where it is given.
    Raises:
        UserError: no model was named.
    """
    from llm_unlearn.methods.finetune import FinetuneTrainer

    names = [parsed.model.target_model_name_or_path, parsed.model.model_name_or_path]
    if issubclass(parsed.trainer, FinetuneTrainer):
        names.reverse()
    found = next((name for name in names if name), None)
    if found is None:
        raise UserError("no model was named; pass --target_model_name_or_path FOLDER_OR_HUB_NAME")
    return found


def _warn_of_start(parsed):
    """A gold model retrained from a model that has seen the forget set is none."""
    if parsed.method == "retrain" and parsed.model.model_name_or_path is None:
        logger.warning(
            "retrain starts from the target model, which has seen the forget set; pass --model_name_or_path with the "
            "model before that to make a gold model"
        )


def build_trainer(parsed):
    """Load model, tokenizer and data, and make the trainer.

    Args:
        parsed: Parsed command line, its output directory resolved.
    Returns:
        (UnlearnTrainer, {stream: Source}).
    Raises:
        UserError: whatever is wrong with the model, the data or the flags, before any training.
    """
    from transformers import set_seed

    from llm_unlearn.data.training_sets import training_sets
    from llm_unlearn.models import (
        check_vocabulary,
        context_length,
        load_model,
        load_tokenizer,
        model_fingerprint,
        quantization_config,
        with_lora,
    )

    args, flags, name = parsed.args, parsed.model, start_model(parsed)
    hub = _hub(flags, parsed.data)
    args.require_packages()
    quantization = quantization_config(flags)
    set_seed(args.seed)
    tokenizer = load_tokenizer(flags.tokenizer_name or name, **hub)
    parsed.context_length = context_length(name, **hub)
    parsed.fingerprint = lambda: model_fingerprint(name, **hub)
    sources, train_dataset, eval_dataset = training_sets(parsed, tokenizer)
    _choose_teacher(parsed, tokenizer, hub)
    model = load_model(
        name, flags.dtype, attn_implementation=flags.attn_implementation, quantization_config=quantization, **hub
    )
    check_vocabulary(model, tokenizer)
    trainer = parsed.trainer(
        model=with_lora(model, flags),
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
    )
    trainer.suite = _suite(parsed, trainer)
    return trainer, sources


def _hub(flags, data):
    """Return what from_pretrained is told about the Hub."""
    if flags.trust_remote_code and flags.model_revision == "main":
        raise UserError("--trust_remote_code True runs code from the Hub; pin it with --model_revision COMMIT")
    return {
        "revision": flags.model_revision, "cache_dir": data.cache_dir, "token": data.token,
        "trust_remote_code": flags.trust_remote_code,
    }  # fmt: skip


def _choose_teacher(parsed, tokenizer, hub):
    """Score the checkpoints that a method was given to choose its teacher from, before the model itself is loaded."""
    if getattr(parsed.args, "candidate_revisions", None):
        from llm_unlearn.candidates import choose_teacher

        choose_teacher(parsed.args, parsed.data, tokenizer, hub, parsed.context_length, parsed.model.dtype)


def _suite(parsed, trainer):
    """Return what every evaluation scores besides the likelihoods, or None."""
    if parsed.args.eval_suite != "full":
        return None
    from llm_unlearn.evaluation.in_training import TrainingSuite

    return TrainingSuite(parsed.data, parsed.args, trainer.tokenize_options)


def _train_and_save(parsed, trainer, sources):
    from llm_unlearn.checkpoints import asks_to_resume, checkpoints_of, save_final
    from llm_unlearn.hub import push_checkpoint
    from llm_unlearn.records import as_json, model_card, run_record

    args = parsed.args
    resumes = asks_to_resume(args.resume_from_checkpoint)
    if args.overwrite_output_dir and not resumes and args.should_save:
        trainer.stale_checkpoints = tuple(checkpoints_of(args.output_dir))
    started = time.time()
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    record = run_record(parsed, start_model(parsed), trainer, sources, time.time() - started)
    save_final(trainer, {"unlearning.json": as_json(record), "README.md": model_card(record)})
    trainer.discard_reference_cache()
    logger.info("the unlearned model is in %s", args.output_dir)
    if trainer.push_requested and trainer.is_world_process_zero():
        token = args.hub_token or parsed.data.token
        push_checkpoint(args.output_dir, args.hub_model_id, token, args.hub_private_repo, args.hub_revision)


def _say_what_runs(parsed, trainer):
    dataset, args = trainer.train_dataset, trainer.args
    tokens = dataset.num_tokens()
    streams = ", ".join(f"{name} {size} sequences / {tokens[name]} tokens" for name, size in dataset.sizes.items())
    rows_per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    steps = (
        args.max_steps if args.max_steps > 0 else math.ceil(-(-len(dataset) // rows_per_step) * args.num_train_epochs)
    )
    logger.info("%s on %s: %s; %d optimizer steps", parsed.method, start_model(parsed), streams, steps)
    logger.info("the checkpoint goes to %s", args.output_dir)


if __name__ == "__main__":
    raise SystemExit(main())
