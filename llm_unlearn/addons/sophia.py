"""Sophia, the second-order optimizer of SOUL, and the step that SOUL's published code takes in its place."""

import torch

from llm_unlearn.addons.shards import pieces
from llm_unlearn.optimizer_steps import local

EPSILON = 1e-12
LEGACY_BATCH, LEGACY_EPSILON = 5120, 1e-15
"""Constants of SOUL's code: "batch size" and what is added to the denominator."""


class ClippedSteps(torch.optim.Optimizer):
    """Base of optimizers whose step is a momentum over a curvature, clipped to one learning rate.

        theta <- (1 - lr * weight_decay) * theta
        theta <- theta - lr * clip(m / d, 1)

    Everything is done element by element on this process's own shards, so that sharding changes nothing; a weight
    without a gradient is not touched. The state of a weight are m ("exp_avg") and its curvature h ("hessian"), in the
    weight's dtype.

    Attributes:
        decoupled_decay: weight decay is theta <- (1 - lr * weight_decay) * theta and nothing else, and a weight whose
            gradients are all 0 moves by nothing else.
    """

    decoupled_decay = True

    def __init__(self, params, lr, betas, rho, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "rho": rho, "weight_decay": weight_decay})
        self.reset_clipped()

    def advance(self, group, gradient, momentum, hessian):
        """Take a piece of a gradient into the pieces of m and h; returns d, which may be overwritten."""
        raise NotImplementedError

    def reset_clipped(self):
        """Count the clipped elements anew."""
        self._clipped, self._stepped = 0, 0

    def clipped(self):
        """Return (2,) float64: elements whose step was clipped, and elements stepped, on this process since a reset."""
        clipped = self._clipped.item() if torch.is_tensor(self._clipped) else self._clipped
        return torch.tensor([clipped, self._stepped], dtype=torch.float64)

    @torch.no_grad()
    def step(self, closure=None):
        """Take one step; returns what the closure does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(group, parameter)
        return loss

    def state_of(self, parameter):
        """Return the state of a parameter, zeros where there is none yet."""
        state = self.state[parameter]
        if not state:
            state["exp_avg"], state["hessian"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        return state

    def _step(self, group, parameter):
        state, weights = self.state_of(parameter), local(parameter)
        momentum, hessian = local(state["exp_avg"]), local(state["hessian"])
        for part in pieces(weights, local(parameter.grad).to(weights.dtype), momentum, hessian):
            weights, divisor = part[0], self.advance(group, *part[1:])
            ratio = torch.div(part[2], divisor, out=divisor).clamp_(-1, 1)
            self._clipped = self._clipped + ratio.abs().ge_(1).sum(dtype=torch.float32)
            self._stepped += ratio.numel()
            if group["weight_decay"]:
                weights.mul_(1 - group["lr"] * group["weight_decay"])
            weights.add_(ratio, alpha=-group["lr"])


class Sophia(ClippedSteps):
    """Sophia: momentum over a diagonal curvature that is estimated every few steps.

        m <- beta1 * m + (1 - beta1) * g                         every step
        h <- beta2 * h + (1 - beta2) * h^                        where there is an estimate h^
        theta <- (1 - lr * weight_decay) * theta - lr * clip(m / max(rho * h, 1e-12), 1)

    h^ estimates the diagonal of the curvature of a mean over tokens. What the authors' code writes as "batch size"
    times h, with h the average of squared gradients, is h here, because the number of tokens changes from step to step.
    There is no bias correction. Where h is not above 0, a weight moves by a whole lr against the sign of m.

    Attributes:
        fisher_tokens: B, where the next step is to take B * g^2 as h^ (the empirical Fisher); else None.

    Args:
        params: parameters, or groups of them.
        lr: learning rate, the length of a clipped weight's step.
        betas: (beta1, beta2).
        rho: the larger, the less is clipped; the authors look for a share of clipped weights between 0.5 and 0.9.
        weight_decay: decoupled, as in AdamW.
    Source: Liu et al. 2023, arXiv:2305.14342; for unlearning Jia et al. 2024, arXiv:2404.18239 (SOUL).
    """

    def __init__(self, params, lr=1e-5, betas=(0.965, 0.99), rho=0.04, weight_decay=0.0):
        self.fisher_tokens = None
        super().__init__(params, lr, betas, rho, weight_decay)

    @torch.no_grad()
    def take_estimate(self, parameter, estimate):
        """Take in an estimate of a parameter's curvature.

        Args:
            parameter: one of the optimizer's.
            estimate: h^, this process's part of it.
        """
        beta2 = next(g["betas"][1] for g in self.param_groups if any(p is parameter for p in g["params"]))
        hessian = local(self.state_of(parameter)["hessian"])
        hessian.lerp_(estimate.to(hessian.dtype), 1 - beta2)

    def advance(self, group, gradient, momentum, hessian):
        """See ClippedSteps."""
        beta1, beta2 = group["betas"]
        momentum.lerp_(gradient, 1 - beta1)
        if self.fisher_tokens is not None:
            hessian.mul_(beta2).addcmul_(gradient, gradient, value=(1 - beta2) * self.fisher_tokens)
        return (hessian * group["rho"]).clamp_(min=EPSILON)


class LegacySophia(ClippedSteps):
    """The step of SOUL's published code.

        h <- beta2 * h + (1 - beta2) * g^2
        m <- beta1 * (beta1 * m + (1 - beta1) * g) + (1 - beta1) * g
        theta <- (1 - lr * weight_decay) * theta - lr * sign(m) * min(1, |m| / (5120 * rho * h + 1e-15))

    It differs from Sophia: h is the square of the training gradient itself, in every step; the momentum is updated
    twice a step, so that beta1 acts as its square; the "batch size" is always 5120. With gradients clipped to norm 1
    nearly every weight of a large model is clipped, and the step is the sign of the momentum times lr.

    Args:
        params, lr, betas, rho, weight_decay: see Sophia; as published betas (0.9, 0.95), rho 0.04.
    Source: OPTML-Group/SOUL; Jia et al. 2024, arXiv:2404.18239. Differs from the authors' code: nothing but the dtype
        of the state, there that of bfloat16 weights.
    """

    def __init__(self, params, lr=1e-5, betas=(0.9, 0.95), rho=0.04, weight_decay=0.0):
        super().__init__(params, lr, betas, rho, weight_decay)

    def advance(self, group, gradient, momentum, hessian):
        """See ClippedSteps."""
        beta1, beta2 = group["betas"]
        hessian.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        for _ in range(2):
            momentum.mul_(beta1).add_(gradient, alpha=1 - beta1)
        return (hessian * (group["rho"] * LEGACY_BATCH)).add_(LEGACY_EPSILON)
