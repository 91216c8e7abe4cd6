"""Muon for the matrices inside the decoder layers and AdamW for the rest, as one optimizer."""

import torch

from llm_unlearn.addons.shards import own_shard, whole
from llm_unlearn.optimizer_steps import local

MOMENTUM, BETAS = 0.95, (0.9, 0.95)


class MuonWithAdamW(torch.optim.Optimizer):
    """Moves matrices by their orthogonalized Nesterov momentum, and everything else by AdamW.

        m <- 0.95 * m + 0.05 * g
        W <- (1 - lr * weight_decay) * W - 0.2 * sqrt(max(W.shape)) * lr * orthogonalized(0.05 * g + 0.95 * m)

    Steps are as long as AdamW's would be (`match_rms_adamw`), so that both take one learning rate. Embeddings, the
    head, norms and biases are AdamW's, as are the weights of experts in one tensor, which is no matrix. Sharded
    matrices are gathered, one after the other, and every process orthogonalizes all of them, so that the number of
    processes changes nothing.

    A group of parameters says which of the two it belongs to ("is_muon"). Groups, state and state dict are those of
    this one object, so that whoever schedules, shards or saves it needs to know of nothing.

    Args:
        params: groups of parameters.
        lr: learning rate of both.
        is_matrix: function of a parameter, as it is given here, that says whether it is a matrix in a decoder layer.
        weight_decay: decoupled, of groups that do not say their own.
    Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon; Liu et al. 2025, arXiv:2502.16982;
        momentum 0.95 and AdamW(0.9, 0.95) as in EleutherAI/unlearn. Differs from the authors' code, which tells
        embeddings from matrices by a first dimension of 50,000 and more.
    """

    def __init__(self, params, lr, is_matrix, weight_decay=0.0):
        groups = [part for group in params for part in _split(group, is_matrix)]
        blank = [torch.zeros(1, 1, requires_grad=True)]
        # Without a momentum and a decay of its own what is left of it is the orthogonalized step.
        self._muon = torch.optim.Muon(
            blank, lr=lr, momentum=0.0, nesterov=False, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
        )
        self._adamw = torch.optim.AdamW(blank, lr=lr, betas=BETAS)
        own = {True: {"momentum": MOMENTUM}, False: self._adamw.defaults}
        groups = [{**own[group["is_muon"]], "weight_decay": weight_decay, "lr": lr, **group} for group in groups]
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure=None):
        """Take one step; returns what the closure does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"] if group["is_muon"] else ():
                if parameter.grad is not None:
                    self._step_matrix(group, parameter)
        # Whoever shards, loads or splits the groups replaces them here; AdamW is handed what is there.
        self._adamw.param_groups = [group for group in self.param_groups if not group["is_muon"]]
        self._adamw.state = self.state
        self._adamw.step()
        return loss

    def _step_matrix(self, group, parameter):
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        gradient = local(parameter.grad).to(parameter.dtype)
        momentum, weights = local(state["momentum_buffer"]), local(parameter)
        momentum.lerp_(gradient, 1 - group["momentum"])
        update = whole(gradient.lerp(momentum, group["momentum"]), parameter)
        moved = own_shard(self._orthogonal_step(update, group["lr"]), parameter)
        weights.mul_(1 - group["lr"] * group["weight_decay"]).add_(moved)

    def _orthogonal_step(self, update, lr):
        """Return what Muon adds to a whole matrix whose momentum is `update`."""
        moved = torch.zeros_like(update).requires_grad_()
        moved.grad = update
        self._muon.param_groups[0].update(params=[moved], lr=lr)
        self._muon.state.clear()
        self._muon.step()
        return moved.detach()


def _split(group, is_matrix):
    """Yield the parts of a group, of matrices and of the rest, without empty ones."""
    params = list(group["params"])
    chosen = [bool(is_matrix(p)) for p in params]
    for is_muon in (True, False):
        part = [p for p, is_own in zip(params, chosen, strict=True) if is_own is is_muon]
        if part:
            yield {**group, "params": part, "is_muon": is_muon}
