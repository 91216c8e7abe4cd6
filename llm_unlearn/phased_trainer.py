"""PhasedTrainer: one decoder layer after the other has its phase, with a schedule and an optimizer state of its own."""

import logging
from pathlib import Path

from accelerate.utils import DistributedType
from transformers import TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from llm_unlearn.decoder import decoder_layers
from llm_unlearn.errors import UserError
from llm_unlearn.gradient_filter import GradientFilter
from llm_unlearn.phases import (
    LayerSwitch,
    Phases,
    forget_moments,
    layers_back_to_front,
    phase_factors,
    phase_schedule,
    split_groups,
)
from llm_unlearn.processes import is_first_process
from llm_unlearn.reference import is_peft
from llm_unlearn.schedules import parse_schedule
from llm_unlearn.trainer import UnlearnTrainer

logger = logging.getLogger(__name__)


class PhasedTrainer(UnlearnTrainer):
    """A trainer whose run falls into phases, one for each of some decoder layers, from the back to the front.

    A whole model trains the phase's layer alone. A model with adapters trains all of them in every phase: what a phase
    means for its losses, the method says.

    Attributes:
        phase_layers: decoder layers in the order of their phases.
        switch: LayerSwitch of a whole model while it trains, else None.
    """

    switch = _planned = None
    _group_layers = ()

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.has_adapters = is_peft(self.model)
        if self.has_adapters and self.args.maintain_unlearned:
            raise UserError("--maintain_unlearned has no effect with adapters, which all train in every phase")
        self._refuse_backends()
        if self.args.same_sign_grads or self.args.asymmetric_filter:
            self.gradient_filter = GradientFilter(self, self.args.asymmetric_filter)
        self.add_callback(_PhaseStart(self))

    @property
    def phases(self):
        """Phases of the run while it trains, None before."""
        steps = self.state.max_steps
        return Phases(self.phase_layers, steps) if steps > 0 else None

    @property
    def phase_layers(self):
        """Decoder layers in the order of their phases."""
        return self.phase_layers_for(self.args)

    def phase_layers_for(self, args):
        """Return the decoder layers in the order of their phases under given arguments."""
        return layers_back_to_front(args.start_layer, args.end_layer, args.layer_step, self.depth)

    def trained_parameters_for(self, args):
        """Return the names of the parameters of the layers that have a phase, or None for adapters."""
        layers = self.phase_layers_for(args)
        if is_peft(self.model):
            return None
        chosen = {id(p) for layer in layers for p in decoder_layers(self.model)[layer].parameters()}
        return [name for name, p in self.model.named_parameters() if id(p) in chosen]

    def progress(self):
        """Return how far the present phase has come, in [0, 1); 0 before training."""
        return self.phases.progress(self.state.global_step) if self.phases else 0.0

    def target_layer(self):
        """Return the decoder layer whose phase it is."""
        return self.phases.layer(self.state.global_step) if self.phases else self.phase_layers[0]

    def trained_layers(self, phase):
        """Return the decoder layers of a whole model that train in a phase."""
        return self.phase_layers[0 if self.args.maintain_unlearned else phase : phase + 1]

    # ---- The Trainer's own hooks ----

    def train(self, resume_from_checkpoint=None, **kwargs):
        """Train phase by phase; see UnlearnTrainer.train.

        Raises:
            UserError: more phases than optimizer steps.
        """
        if self.train_dataset is not None:
            Phases(self.phase_layers, self.num_updates())
        try:
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        finally:
            if self.switch is not None:
                self.switch.release()
                self.switch = None

    def create_optimizer(self, model=None):
        """Make the optimizer, with groups of its own for each layer of a whole model."""
        is_made = self.optimizer is not None
        optimizer = super().create_optimizer(model)
        if not self.has_adapters and not is_made:
            layers = decoder_layers(self.model)
            layer_of = {id(p): index for index, layer in enumerate(layers) for p in layer.parameters()}
            self._group_layers = split_groups(optimizer, layer_of)
        return optimizer

    def create_scheduler(self, num_training_steps, optimizer=None):
        """Make the schedule that starts anew with each phase, once the model and the optimizer are as they train."""
        optimizer, phases = optimizer or self.optimizer, Phases(self.phase_layers, num_training_steps)
        self._planned = phases
        factors = phase_factors(phases, self.args)
        trains = [lambda phase, layer=layer: layer in self.trained_layers(phase) for layer in self._group_layers]
        if self.has_adapters:
            trains = [lambda phase: True] * len(optimizer.param_groups)
        if len(trains) != len(optimizer.param_groups):
            raise UserError(
                f"{type(self).__name__} needs one parameter group for each layer; leave the optimizer to it"
            )
        self.lr_scheduler, self._created_lr_scheduler = phase_schedule(optimizer, phases, factors, trains), True
        if not self.has_adapters:
            kind = self.accelerator.distributed_type
            is_free = self.args.world_size == 1 and kind != DistributedType.DEEPSPEED
            self.switch = LayerSwitch(decoder_layers(self.model), not (is_free or self.is_fsdp2()))
        if is_first_process():
            self._warn_of_short_phases([phases.length(phase) for phase in range(len(phases.layers))])
        return self.lr_scheduler

    def begin_step(self):
        """Before an optimizer step, turn to the layer of its phase, with a fresh state where the phase begins."""
        step, phases = self.state.global_step, self.phases
        if self.switch is not None:
            self.switch.turn_to(self.trained_layers(phases.index(step)))
        if phases.is_start(step):
            forget_moments(self.optimizer, in_place=self.is_deepspeed_enabled)
            if is_first_process():
                logger.info("phase %d of %d: layer %d", phases.index(step) + 1, len(phases.layers), phases.layer(step))

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Forward and backward one micro-batch, and leave gradients to the layers that train."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.switch is not None and not self.is_deepspeed_enabled:
            self.switch.drop_gradients()
        return loss

    def _load_optimizer_and_scheduler(self, checkpoint):
        if checkpoint is not None and self.switch is not None:
            # A state was saved for what trained in the step before; FSDP2 asks for one of all that asks for a gradient.
            step = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME)).global_step
            self.switch.turn_to(self.trained_layers(self._planned.index(max(step - 1, 0))))
        super()._load_optimizer_and_scheduler(checkpoint)

    def _get_learning_rate(self):
        return float(max(self.lr_scheduler.get_last_lr()))

    # ---- Private ----

    def _refuse_backends(self):
        config = self.args.deepspeed or {}
        for part in ("optimizer", "scheduler"):
            if part in config:
                raise UserError(
                    f"the {part} of a DeepSpeed file cannot begin anew with each layer; leave '{part}' out of "
                    "--deepspeed, and pass --optim and --lr_scheduler_type"
                )
        if not self.has_adapters and self.accelerator.distributed_type == DistributedType.FSDP and not self.is_fsdp2():
            raise UserError("FSDP version 1 cannot hold single layers still; leave 'version' out of --fsdp_config")

    def _warn_of_short_phases(self, lengths):
        for stream in self.streams_for(self.args) if min(lengths) == 1 else ():
            if parse_schedule(getattr(self.args, f"{stream}_schedule"))[0] == 0:
                logger.warning(
                    "a phase of 1 optimizer step has no %s term, whose weight begins at 0 in each phase; pass more "
                    "--num_train_epochs or --%s_schedule constant",
                    stream, stream,
                )  # fmt: skip
        if any(self.args.get_warmup_steps(length) >= length for length in lengths):
            logger.warning(
                "warm-up takes all of a phase of %d optimizer steps, so that its learning rate never reaches its full "
                "value; pass --warmup_ratio 0 or more --num_train_epochs",
                min(lengths),
            )


class _PhaseStart(TrainerCallback):
    """Tell the trainer that an optimizer step begins."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_step_begin(self, args, state, control, **kwargs):
        """See PhasedTrainer.begin_step."""
        self.trainer.begin_step()
