"""StreamTrainer: from rows to the micro-batches of every process, and through one training step, on every backend."""

import contextlib
import dataclasses
import functools
import logging
import math
import signal

import torch
from accelerate.utils import DistributedType

from llm_unlearn.backward_turns import in_turns
from llm_unlearn.checkpoints import CheckpointedTrainer
from llm_unlearn.data.plan import WINDOW_STEPS, BatchPlan, drawn_rows
from llm_unlearn.data.streams import UnlearnDataset
from llm_unlearn.data.token_selection import select_tokens, with_selection_columns
from llm_unlearn.decoder import decoder_layers
from llm_unlearn.errors import UserError
from llm_unlearn.head import counts, divisors, wide_dtype
from llm_unlearn.models import checked_layers
from llm_unlearn.objectives.representation import STATE_DISTANCES
from llm_unlearn.processes import is_first_process
from llm_unlearn.regularizer_flags import STREAMS
from llm_unlearn.schedules import CONSTANT, schedule_factor
from llm_unlearn.truncation import truncate

logger = logging.getLogger(__name__)


class StreamTrainer(CheckpointedTrainer):
    """A Trainer whose batches are {stream: tensors}, planned by (seed, epoch, number) and counted over all processes.

    Attributes:
        streams: names of the streams that the method reads, the anchor of the epoch first.
        optional_streams: names of streams that it reads where they are given.
        paired_streams: {stream: the one from whose rows it is made}; rows of one number meet in every batch.
        companions: {stream: the one in whose term it stands}; it has no turn of its own, and runs with that one.
        retain_loss: the retain term of a method that leaves no choice; None takes `--retain_loss`.
        plan: BatchPlan of this process while it trains.
        step_batches: micro-batches of the present step, and {stream: (2,) sequences and tokens} that all count.
        is_probing: whether a forward is none of a step, so that nothing is to be logged or remembered of it.
        token_selection: what `unlearning.json` says of `--token_selection`, or None.
        truncation: what is out of the model while it trains, where the losses end below its last layer.
        gradient_filter: GradientFilter that keeps the streams' gradients apart, or None to sum them.
    """

    streams = ("forget",)
    optional_streams = ()
    paired_streams, companions = {}, {}
    retain_loss = None
    plan = token_selection = step_batches = truncation = gradient_filter = None
    regularizers, is_probing = (), False
    _only = None

    # ---- Which streams ----

    @classmethod
    def streams_for(cls, args):
        """Return the streams that a run with these arguments reads; a retain term of weight zero reads none."""
        skips = cls.retain_loss_for(args) == "none" or getattr(args, "retain_weight", 1) == 0
        return tuple(name for name in cls.streams if not (name == "retain" and skips))

    @classmethod
    def all_streams_for(cls, args):
        """Return `streams_for` with the streams that regularizers bring, which no method sees."""
        return (*cls.streams_for(args), *(STREAMS[name] for name in args.regularizer or () if name in STREAMS))

    @classmethod
    def retain_loss_for(cls, args):
        """Return which retain term runs with these arguments: nll, kl or none."""
        return cls.retain_loss or getattr(args, "retain_loss", "nll")

    def weight_of(self, stream, args=None):
        """Return the weight of a stream's term; a stream of weight 0 costs no forward.

        Args:
            stream: its name.
            args: None takes the run's own with their schedule, as of the present step; given, the schedule is left out.
        """
        weight = getattr(args or self.args, f"{stream}_weight", 0.0 if stream in STREAMS.values() else 1.0)
        schedule = CONSTANT if args is not None else getattr(self.args, f"{stream}_schedule", CONSTANT)
        return weight if schedule == CONSTANT else weight * schedule_factor(schedule, self.progress())

    def progress(self):
        """Return how far training has come, in [0, 1): optimizer steps done of all; 0 before it begins."""
        return self.state.global_step / self.state.max_steps if self.state.max_steps > 0 else 0.0

    @functools.cached_property
    def depth(self):
        """How many decoder layers the whole model has."""
        return len(decoder_layers(self.model))

    def layers_for(self, args):
        """Return the decoder layers that the losses read, or () where they read the output alone.

        Raises:
            UserError: a layer that the model does not have.
        """
        if not hasattr(args, "layers"):
            return ()
        return checked_layers(args.layers, self.depth)

    def last_layer_for(self, args):
        """Return the index of the highest decoder layer that the losses read, or None where they read the logits.

        The layers above it, the final norm and the head are then out of the model while it trains. A regularizer with
        a stream of its own reads the logits of that.
        """
        layers = () if STREAMS.keys() & set(args.regularizer or ()) else self.layers_for(args)
        return max(layers) if layers and self.retain_loss_for(args) in ("none", *STATE_DISTANCES) else None

    def trained_parameters_for(self, args):
        """Return the patterns of `models.train_only` that name what trains, or None for all that does already."""
        return None

    def runs(self, stream):
        """Return whether anything is computed of a stream now: something has a weight, and no other has its turn."""
        weighs = self.weight_of(stream) != 0 or any(p.in_loss and p.stream == stream for p in self.regularizers)
        return weighs and self._only in (None, self.companions.get(stream, stream))

    def rows_per_anchor(self):
        """Return {stream: rows for each row of the anchor}; 1 where missing."""
        return {}

    def turns(self):
        """Return the topic of each row of the anchor where steps take turns with topics, else None."""
        return None

    @classmethod
    def check_rows(cls, rows, tokenizer, args):
        """Refuse rows {stream: checked rows} that the method cannot train on, before the model is loaded."""

    @classmethod
    def reads_refusals(cls, args):
        """Return whether the method reads `preferred` of the forget rows, which `--refusal_data` fills."""
        return False

    def forget_note(self, tokenizer, args):
        """Return the `annotate` of tokenize_rows with which the method adds columns to forget rows, or None."""
        return None

    def prepare_streams(self, streams, tokenizer, args):
        """Change tokenized streams before training, for example their labels; returns {stream: examples}."""
        return streams

    # ---- Batches and steps ----

    def train(self, resume_from_checkpoint=None, **kwargs):
        """Train, with no layer above the last one that the losses read; see CheckpointedTrainer.train."""
        last_layer = self.last_layer_for(self.args)
        # As it saves, ZeRO-3 (deepspeed 0.19) looks at adapters that were out of the model when it was prepared.
        if last_layer is None or (self.zero_stage() == 3 and hasattr(self.model, "peft_config")):
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        self.truncation = truncate(self.model, last_layer, offload=True)
        try:
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        finally:
            self.truncation.restore(to_run=not self.is_sharded())
            self.truncation = None

    def save_model(self, output_dir=None, _internal_call=False):
        """Save the whole model, also while a part of it is out."""
        with self.truncation.whole(to_run=False) if self.truncation else contextlib.nullcontext():
            super().save_model(output_dir, _internal_call)

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Forward and backward one micro-batch; one stream after the other with `--sequential_backward` or a filter."""
        streams = [name for name in inputs if self.runs(name) and name not in self.companions]
        if not (self.args.sequential_backward or self.gradient_filter) or len(streams) < 2:
            return super().training_step(model, inputs, num_items_in_batch)
        return in_turns(self, super().training_step, streams, model, inputs, num_items_in_batch)

    def take_turns(self, stream):
        """Compute nothing but this stream, with its companions, from here on; None: all of them."""
        self._only = stream

    def make_plan(self):
        """Return the plan of batches of this process."""
        args = self.args
        strategy = args.train_sampling_strategy
        return BatchPlan(
            self.train_dataset.sizes,
            _data_seed(args),
            args.per_device_train_batch_size,
            args.world_size,
            args.process_index,
            self.rows_per_anchor() | {STREAMS["ilu"]: args.ilu_ratio or 1},
            args.gradient_accumulation_steps,
            None if strategy == "random" else self.train_dataset.lengths,
            WINDOW_STEPS if strategy == "group_by_length" else 1,
            self.paired_streams,
            self.turns(),
        )

    def num_updates(self, plan=None):
        """Return how many optimizer steps the whole run has."""
        args, plan = self.args, plan or self.make_plan()
        updates_per_epoch = -(-len(plan) // args.gradient_accumulation_steps)
        return args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * updates_per_epoch)

    def visited_rows(self):
        """Return {stream: row numbers} that training will read, on all processes together."""
        plan = self.make_plan()
        return plan.visited(self._num_batches(plan))

    def reading_record(self):
        """Return {"rows": {stream: different rows}, "tokens", "tokens_forwarded"}: what training reads in all."""
        plan = self.make_plan()
        count = self._num_batches(plan)
        tokens, forwarded = plan.tokens(count, self.train_dataset.lengths, self.data_collator.multiple)
        rows = {stream: len(visited) for stream, visited in plan.visited(count).items()}
        return {"rows": rows, "tokens": tokens, "tokens_forwarded": forwarded}

    def get_train_dataloader(self):
        """Return the loader over the plan of batches, which is cut by rank already and not to be prepared."""
        args = self.args
        if self.train_dataset is None:
            raise UserError(f"{type(self).__name__} was given no train_dataset")
        self.plan = self.make_plan()
        return torch.utils.data.DataLoader(
            self.train_dataset,
            batch_sampler=self.plan,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            pin_memory=args.dataloader_pin_memory,
            worker_init_fn=_ignore_termination,
            # The epoch is set on the plan in this process, which kept workers would not see.
            persistent_workers=False,
        )

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Fetch the micro-batches of one optimizer step, with what they count on all processes together."""
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        if not batches:
            return batches, None
        names = list(batches[0])
        local = torch.stack([sum(counts(batch[name]) for batch in batches) for name in names])
        local = local.to(device, wide_dtype(device))
        summed = self.accelerator.reduce(local, "sum")
        self.step_batches = batches, dict(zip(names, summed, strict=True))
        for part in self.regularizers:
            part.begin_step(batches)
        return batches, dict(zip(names, divisors(summed), strict=True))

    def floating_point_ops(self, inputs):
        """Return the floating-point operations of one micro-batch, all streams together."""
        return sum(super(StreamTrainer, self).floating_point_ops(stream) for stream in inputs.values())

    # ---- Backends ----

    def zero_stage(self):
        """Return the ZeRO stage that runs, 0 without DeepSpeed."""
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None) if self.is_deepspeed_enabled else None
        return plugin.zero_stage if plugin is not None else 0

    def is_sharded(self):
        """Return whether no process holds the whole model."""
        return self.zero_stage() == 3 or self.accelerator.distributed_type == DistributedType.FSDP

    def unwrapped(self, model):
        """Return the model without the wrapper of its backend."""
        return self.accelerator.unwrap_model(model, keep_torch_compile=False)

    def is_fsdp2(self):
        """Return whether FSDP2 (and not FSDP1) runs."""
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        return plugin is not None and plugin.fsdp_version == 2

    def reference_autocast(self, is_plain_module):
        """Return the context of a reference forward; wrapped models and DeepSpeed engines bring their own."""
        if not is_plain_module:
            return contextlib.nullcontext()
        if self.args.autocast_in_forward:
            return torch.autocast(self.args.device.type, torch.bfloat16)
        is_deepspeed = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        return contextlib.nullcontext() if is_deepspeed else self.accelerator.autocast()

    # ---- Private ----

    def _num_batches(self, plan):
        """Return how many micro-batches this process reads in the whole run."""
        args = self.args
        updates_per_epoch = -(-len(plan) // args.gradient_accumulation_steps)
        epochs, rest = divmod(self.num_updates(plan), updates_per_epoch)
        return epochs * len(plan) + min(rest * args.gradient_accumulation_steps, len(plan))

    def _training_streams(self, train_dataset, tokenizer, args):
        if train_dataset is None:
            return None
        given = UnlearnDataset.by_stream(train_dataset)
        needed = self.all_streams_for(args)
        missing = [name for name in needed if name not in given and name not in self.paired_streams]
        if missing:
            article = "an" if missing[0][0] in "aeiou" else "a"
            raise UserError(f"{type(self).__name__} needs {article} {missing[0]} set, but was given {list(given)}")
        wanted = [name for name in (*needed, *self.optional_streams) if name in given]
        chosen = {name: given[name] for name in wanted}
        is_ready = isinstance(train_dataset, UnlearnDataset)
        options, note = self.tokenize_options, None if is_ready else self.forget_note(tokenizer, args)
        streams = with_selection_columns(chosen, is_ready, tokenizer, options, args, note)
        if args.max_retain_rows and "retain" not in streams:
            raise UserError("--max_retain_rows has no effect: this run reads no retain set")
        if args.max_retain_rows:
            drawn = drawn_rows(streams["retain"], args.max_retain_rows, _data_seed(args))
            streams = {**streams, "retain": drawn}
        return UnlearnDataset(streams)

    def _prepare_data(self):
        """Leave the selected forget tokens, for which the model may be asked, and let the method change its streams."""
        if self.train_dataset is not None:
            streams, self.token_selection = select_tokens(self)
            own = {name: rows for name, rows in streams.items() if name not in STREAMS.values()}
            prepared = self.prepare_streams(own, self.processing_class, self.args)
            self.train_dataset = UnlearnDataset(prepared | {name: streams[name] for name in streams if name not in own})

    def _tokenized(self, data, tokenizer):
        return None if data is None else UnlearnDataset.of(data, tokenizer, self.tokenize_options)

    def _keep_outputs_wide(self):
        """Keep FSDP2 from rounding log-probabilities to bfloat16 as it leaves the model."""
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if self.is_fsdp2() and plugin.mixed_precision_policy is not None:
            plugin.mixed_precision_policy = dataclasses.replace(plugin.mixed_precision_policy, output_dtype=None)


def _data_seed(args):
    return args.data_seed if args.data_seed is not None else args.seed


def warn_of_low_precision(model):
    """Warn where weights that train are narrower than float32."""
    low = {p.dtype for p in model.parameters() if p.requires_grad and p.dtype in (torch.bfloat16, torch.float16)}
    if low and is_first_process():
        logger.warning(
            "the trained weights are in %s, which silently swallows small updates; load them in float32, "
            "and compute in bfloat16 with --bf16 True",
            " and ".join(str(dtype).removeprefix("torch.") for dtype in low),
        )


def _ignore_termination(worker):
    """A SIGTERM goes to the whole group of processes: the loader's workers live on until the checkpoint is saved."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def padding_multiple(device):
    """Return of how many tokens every width is a multiple: 8 where tensor cores want it, on a CPU 1."""
    return 1 if device.type == "cpu" else 8
