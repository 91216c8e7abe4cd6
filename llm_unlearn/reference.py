"""The frozen reference: the model before unlearning, as a copy that is sharded like the policy, or as adapters off."""

import contextlib
import copy

import torch
from accelerate.utils import DistributedType

from llm_unlearn.head import concatenate, split_outputs
from llm_unlearn.models import LOADED_WITH


class Reference:
    """The model as it was before unlearning.

    Under LoRA it is the policy with its adapters off, and costs no memory. Otherwise it is a frozen copy, made when the
    trainer is made (so a resumed run compares with the same model) and sharded as the policy is under FSDP2 and ZeRO-3.

    Args:
        trainer: UnlearnTrainer, whose model is not wrapped yet.
    """

    def __init__(self, trainer):
        self.trainer = trainer
        self.adapter_off = is_peft(trainer.model)
        self.model = None if self.adapter_off else _frozen_copy(trainer)
        self.is_plain_module = not self.adapter_off and trainer.zero_stage() != 3

    def __call__(self, inputs, streams, keep_logits=()):
        """Score streams under the reference.

        Args:
            inputs: UnlearnBatch.
            streams: names of the streams to score, in one forward.
            keep_logits: names of the streams whose logits at counted positions are wanted.
        Returns:
            {stream: StreamOutput}, without gradients.
        """
        input_ids, attention_mask = concatenate(inputs, streams, self.trainer.data_collator.pad_token_id)
        return split_outputs(self.logits(input_ids, attention_mask), inputs, streams, keep_logits)

    @torch.no_grad()
    def logits(self, input_ids, attention_mask):
        """Return the reference's logits (B, T, V) for (B, T) ids, with dropout off."""
        with self._running() as model, self.trainer.reference_autocast(self.is_plain_module):
            return model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits

    @contextlib.contextmanager
    def _running(self):
        if self.model is not None:
            yield self.model
            return
        policy = self.trainer.model_wrapped
        peft_model = self.trainer.accelerator.unwrap_model(policy, keep_torch_compile=False)
        was_training = policy.training
        policy.eval()
        try:
            with peft_model.disable_adapter():
                yield policy
        finally:
            policy.train(was_training)


def is_peft(model):
    """Return whether the model carries PEFT adapters that can be switched off."""
    return hasattr(model, "disable_adapter") and hasattr(model, "peft_config")


def _frozen_copy(trainer):
    accelerator, zero_stage = trainer.accelerator, trainer.zero_stage()
    if zero_stage == 3:
        # A partitioned model cannot be copied; from_pretrained partitions again, all ranks together.
        source = trainer.model
        how = getattr(source, LOADED_WITH, {"dtype": source.dtype})
        model = type(source).from_pretrained(source.config._name_or_path, **how)
    else:
        model = copy.deepcopy(trainer.model)
    model.requires_grad_(False)
    model.eval()
    if zero_stage == 3:
        return _zero3_engine(model, trainer)
    if accelerator.distributed_type == DistributedType.FSDP and trainer.is_fsdp2():
        from accelerate.utils.fsdp_utils import fsdp2_prepare_model

        return fsdp2_prepare_model(accelerator, model)
    return model.to(trainer.args.device)


def _zero3_engine(model, trainer):
    import deepspeed

    config = copy.deepcopy(trainer.accelerator.state.deepspeed_plugin.deepspeed_config)
    for unused in ("optimizer", "scheduler"):
        config.pop(unused, None)
    config["zero_optimization"] = {"stage": 3, "stage3_param_persistence_threshold": 0}
    config["train_micro_batch_size_per_gpu"] = trainer.args.per_device_train_batch_size
    config["gradient_accumulation_steps"] = 1
    config.pop("train_batch_size", None)
    engine, *_ = deepspeed.initialize(model=model, config=config)
    engine.eval()
    return engine
