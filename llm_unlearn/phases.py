"""Training in phases: which decoder layer has its turn at which optimizer step, and at which learning rate."""

from dataclasses import dataclass

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from llm_unlearn.errors import UserError


@dataclass(frozen=True)
class Phases:
    """One phase for each of some decoder layers, as equally long as whole optimizer steps allow.

    Step t of n is in phase floor(t * P / n) of P: a function of the step alone, so that every process and every resumed
    run agree.

    Attributes:
        layers: indices of decoder layers, in the order of their phases.
        num_steps: optimizer steps of the whole run, at least one for each phase.
    """

    layers: tuple
    num_steps: int

    def __post_init__(self):
        if len(self.layers) > self.num_steps:
            raise UserError(
                f"{len(self.layers)} layers, one phase each, do not fit into {self.num_steps} optimizer "
                f"step{'s' * (self.num_steps != 1)}; pass a larger --layer_step, more --num_train_epochs or fewer "
                "--gradient_accumulation_steps"
            )

    def index(self, step):
        """Return the number of the phase, from 0, that an optimizer step is in; the last one's after the end."""
        return min(step, self.num_steps - 1) * len(self.layers) // self.num_steps

    def start(self, phase):
        """Return the first optimizer step of a phase."""
        return -(-phase * self.num_steps // len(self.layers))

    def length(self, phase):
        """Return how many optimizer steps a phase has, at least 1."""
        return self.start(phase + 1) - self.start(phase)

    def is_start(self, step):
        """Return whether a phase begins with an optimizer step."""
        return self.start(self.index(step)) == step

    def layer(self, step):
        """Return the decoder layer whose turn it is."""
        return self.layers[self.index(step)]

    def progress(self, step):
        """Return how far the phase of an optimizer step has come, in [0, 1): 0 at its first step."""
        phase = self.index(step)
        return (step - self.start(phase)) / self.length(phase)


def layers_back_to_front(start_layer, end_layer, layer_step, depth):
    """Return the decoder layers that have a phase each, in order.

    Args:
        start_layer: the first; None takes the model's last.
        end_layer: none below it; None takes 8, as published for 32 layers, or a quarter of the depth if that is less.
        layer_step: how many layers further down the next one is.
        depth: how many decoder layers the model has.
    Returns:
        tuple of indices, the largest first.
    Raises:
        UserError: a layer that the model does not have, an end above the start, or a step below 1.
    """
    start = depth - 1 if start_layer is None else start_layer
    end = min(8, depth // 4) if end_layer is None else end_layer
    for name, layer in (("start_layer", start), ("end_layer", end)):
        if not 0 <= layer < depth:
            raise UserError(f"--{name} {layer} does not exist: the model has layers 0 to {depth - 1}")
    if layer_step < 1:
        raise UserError(f"--layer_step must be at least 1, but is {layer_step}")
    if end > start:
        is_default = " (its default)" if end_layer is None else ""
        raise UserError(
            f"layers are unlearned from the back to the front, but --end_layer {end}{is_default} is above "
            f"--start_layer {start}; pass an --end_layer between 0 and {start}"
        )
    return tuple(range(start, end - 1, -layer_step))


def split_groups(optimizer, layer_of):
    """Split an optimizer's parameter groups by decoder layer, in place and before its first step.

    Args:
        optimizer: torch.optim.Optimizer without a state yet.
        layer_of: {id of a parameter: index of its decoder layer}, of all that it trains.
    Returns:
        list of the decoder layer of each group there is now.
    """
    groups, layers = [], []
    for group in optimizer.param_groups:
        by_layer = {}
        for parameter in group["params"]:
            by_layer.setdefault(layer_of[id(parameter)], []).append(parameter)
        groups += [{**group, "params": parameters} for parameters in by_layer.values()]
        layers += by_layer
    optimizer.param_groups[:] = groups
    return layers


def phase_factors(phases, args):
    """Return, for each phase, the learning rate's factor as a function of the steps since the phase began.

    It is the schedule of `--lr_scheduler_type` over the phase's own steps, warm-up included.

    Args:
        phases: Phases.
        args: TrainingArguments.
    Raises:
        UserError: a schedule that looks at more than the step.
    """
    factors = []
    for phase in range(len(phases.layers)):
        length = phases.length(phase)
        schedule = get_scheduler(
            args.lr_scheduler_type,
            torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=args.learning_rate),
            num_warmup_steps=args.get_warmup_steps(length),
            num_training_steps=length,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        )
        if not isinstance(schedule, LambdaLR):
            raise UserError(
                f"--lr_scheduler_type {getattr(args.lr_scheduler_type, 'value', args.lr_scheduler_type)} cannot begin "
                "anew with each layer; pass linear, cosine or constant"
            )
        factors.append(schedule.lr_lambdas[0])
    return factors


def phase_schedule(optimizer, phases, factors, trains):
    """Return a scheduler that starts anew with each phase, and holds at 0 the groups that do not train in it.

    Args:
        optimizer: with the groups that the scheduler sets.
        phases: Phases.
        factors: see `phase_factors`.
        trains: for each group, function of a phase's number that says whether the group trains in it.
    Returns:
        torch.optim.lr_scheduler.LambdaLR.
    """

    def factor(group_trains):
        def at(step):
            phase = phases.index(step)
            return factors[phase](min(step, phases.num_steps) - phases.start(phase)) if group_trains(phase) else 0.0

        return at

    return LambdaLR(optimizer, [factor(group_trains) for group_trains in trains])


def forget_moments(optimizer, in_place):
    """Bring an optimizer's state back to where it begins: no momentum, step 0.

    Args:
        optimizer: torch.optim.Optimizer, or what accelerate and DeepSpeed wrap around one.
        in_place: zero the tensors instead of dropping them, for DeepSpeed, which holds on to them.
    """
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    if not in_place:
        optimizer.state.clear()
        return
    for state in optimizer.state.values():
        for name, value in state.items():
            if torch.is_tensor(value):
                value.zero_()
            elif isinstance(value, int | float) and not isinstance(value, bool):
                state[name] = type(value)(0)


class LayerSwitch:
    """Lets some decoder layers train and holds the others really still: no gradient, no momentum, no decay.

    Where nothing counts on a gradient of each parameter, as on one process and under FSDP2, those of the other layers
    do not ask for one, and the backward ends at the lowest layer that trains. DDP and DeepSpeed wait for all gradients:
    there they become 0 as soon as they are made.

    Args:
        model: with its trained parameters chosen; under FSDP2 sharded already.
        layers: its decoder layers.
        needs_all: whether the backend needs a gradient of every parameter.
    """

    def __init__(self, layers, needs_all):
        self.needs_all, self._trained, self._hooks = needs_all, frozenset(), []
        self.parameters = {
            index: [p for p in layer.parameters() if p.requires_grad] for index, layer in enumerate(layers)
        }
        for index, parameters in self.parameters.items() if needs_all else ():
            self._hooks += [parameter.register_hook(self._hook(index)) for parameter in parameters]

    def turn_to(self, layers):
        """Let these decoder layers train, and no other."""
        self._trained = frozenset(layers)
        for index, parameters in self.parameters.items() if not self.needs_all else ():
            for parameter in parameters:
                parameter.requires_grad_(index in self._trained)

    def drop_gradients(self):
        """Let the other layers have no gradient at all, so that no optimizer touches them or counts them."""
        for index, parameters in self.parameters.items():
            if index not in self._trained:
                for parameter in parameters:
                    parameter.grad = None

    def release(self):
        """Let all layers train again, as before the switch was made."""
        for hook in self._hooks:
            hook.remove()
        for parameter in (p for parameters in self.parameters.values() for p in parameters):
            parameter.requires_grad_(True)

    def _hook(self, index):
        return lambda gradient: None if index in self._trained else torch.zeros_like(gradient)
