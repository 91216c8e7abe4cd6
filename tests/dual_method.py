"""A method with a state of its own, for tests: the retain term is weighed by a dual variable that every step updates.

As primal-dual methods do it: the weight rises while the loss that it guards is above a bound. The variable is the same
on every process, because it is updated with the loss summed over them.
"""

import os
import signal

import torch

from llm_unlearn.methods.grad_diff import GradDiffArguments, GradDiffTrainer
from llm_unlearn.objectives.likelihood import ascent

BOUND, RATE = 0.02, 3.0


class DualTrainer(GradDiffTrainer):
    """GradDiff whose retain weight is a dual variable."""

    args_class = GradDiffArguments

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.dual = torch.ones((), dtype=torch.float64)
        self.seen = torch.zeros(2, dtype=torch.long)

    def method_state(self):
        """The dual variable, and how many steps it has seen."""
        return {"dual": self.dual, "seen": self.seen}

    def load_method_state(self, state):
        """Take them over."""
        self.dual, self.seen = state["dual"], state["seen"]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Weigh the retain term by the dual variable, then update that."""
        outputs = self.forward(model, inputs)
        retain = self.retain_term(outputs, inputs)
        terms = {"forget": ascent(outputs["forget"].logps), "retain": float(self.dual) * retain}
        loss = self.total_loss(terms, outputs, return_outputs, num_items_in_batch)
        guarded = self.accelerator.reduce(retain.detach().double().mean(), "mean")
        self.dual = torch.relu(self.dual + RATE * (guarded.cpu() - BOUND))
        self.seen = self.seen + 1
        return loss


class OtherDualTrainer(DualTrainer):
    """The same name of the class in checkpoints, another name of the variable."""

    def method_state(self):
        """The dual variable under another name."""
        return {"multiplier": self.dual, "seen": self.seen}


class StatelessTrainer(DualTrainer):
    """The method as it was before it had a state."""

    def method_state(self):
        """Nothing."""
        return {}

    def load_method_state(self, state):
        """Nothing."""


class LongerDualTrainer(DualTrainer):
    """One variable for each of four constraints instead of two."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seen = torch.zeros(4, dtype=torch.long)


OtherDualTrainer.__name__ = StatelessTrainer.__name__ = LongerDualTrainer.__name__ = "DualTrainer"


class SignalledTrainer(GradDiffTrainer):
    """GradDiff whose last process gets SIGTERM in the middle of the step that the environment names."""

    args_class = GradDiffArguments

    def training_step(self, *args, **kwargs):
        """Send the signal, then step on."""
        is_last = self.args.process_index == self.args.world_size - 1
        if is_last and self.state.global_step + 1 == int(os.environ.get("SIGTERM_IN_STEP", "0")):
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        return super().training_step(*args, **kwargs)
