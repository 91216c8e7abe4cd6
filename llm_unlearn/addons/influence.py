"""The influence-function step: one Newton step, the baseline that SOUL makes iterative."""

import torch

from llm_unlearn.addons.shards import pieces
from llm_unlearn.optimizer_steps import local


class InfluenceStep(torch.optim.Optimizer):
    """One step along the gradient, divided by a damped diagonal curvature.

        theta_u = theta_o - lr * g / (max(h, 0) + lambda),   lambda = damping * mean of max(h, 0) over all weights

    With the gradient g of gradient ascent, that of minus the forget set's loss, it is the influence-function estimate
    theta_o + H^-1 grad L_f of the model that never saw the forget set, up to lr: for L_f a mean over tokens, the forget
    set's share of the tokens. Any other method's g takes its place.

    Attributes:
        decoupled_decay: a weight whose gradient is 0 does not move.
        damping_mean: mean of max(h, 0) over all weights on all processes, to be set before the step.

    Args:
        params: parameters, or groups of them.
        lr: factor of the step.
        damping: see above, > 0.
        weight_decay: of the groups that transformers makes; 0.
    Source: Koh and Liang 2017, arXiv:1703.04730; as the baseline of Jia et al. 2024, arXiv:2404.18239 (SOUL). The
        damping relative to the mean curvature is that of Grosse et al. 2023, arXiv:2308.03296, there for each layer.
    """

    decoupled_decay = True

    def __init__(self, params, lr=1.0, damping=0.1, weight_decay=0.0):
        self.damping_mean = None
        super().__init__(params, {"lr": lr, "damping": damping, "weight_decay": weight_decay})

    @torch.no_grad()
    def take_estimate(self, parameter, estimate, share=1.0):
        """Add an estimate, this process's part of it, to a parameter's curvature.

        Args:
            parameter: one of the optimizer's.
            estimate: of its curvature.
            share: its weight in the mean.
        """
        local(self._hessian(parameter)).add_(estimate, alpha=share)

    @torch.no_grad()
    def take_squares(self, parameter, tokens):
        """Take B * g^2 as the curvature of a parameter (the empirical Fisher), with the number of tokens as B."""
        self.take_estimate(parameter, local(parameter.grad).square(), share=tokens)

    def sums(self):
        """Return (2,) float64: the sum of max(h, 0) over this process's weights, and how many they are."""
        held = [local(state["hessian"]) for state in self.state.values()]
        total = sum(float(part.clamp(min=0).sum(dtype=torch.float64)) for part in held)
        return torch.tensor([total, sum(part.numel() for part in held)], dtype=torch.float64)

    @torch.no_grad()
    def step(self, closure=None):
        """Take the step; returns what the closure does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in (p for p in group["params"] if p.grad is not None):
                damping = group["damping"] * (self.damping_mean or 1.0)
                for weights, gradient, hessian in pieces(
                    local(parameter), local(parameter.grad), local(self._hessian(parameter))
                ):
                    weights.addcdiv_(gradient.to(weights.dtype), hessian.clamp(min=0).add_(damping), value=-group["lr"])
        return loss

    def _hessian(self, parameter):
        state = self.state[parameter]
        if not state:
            state["hessian"] = torch.zeros_like(parameter)
        return state["hessian"]
