"""`--unlearn_optimizer`: which optimizer a trainer makes, what it is told at each step, and where it cannot run."""

import functools

import torch
from accelerate.utils import DistributedType
from transformers import TrainerCallback

from llm_unlearn.addons.curvature import GaussNewton, Hutchinson, hessian_streams
from llm_unlearn.addons.influence import InfluenceStep
from llm_unlearn.addons.muon import MuonWithAdamW
from llm_unlearn.addons.sophia import LegacySophia, Sophia
from llm_unlearn.decoder import decoder_layers
from llm_unlearn.errors import UserError
from llm_unlearn.head import wide_dtype

PASSES = {"gnb": GaussNewton, "hutchinson": Hutchinson}
"""{estimator that takes passes of its own: its class}"""


def set_up_optimizer(trainer):
    """Let a trainer make the optimizer that `--unlearn_optimizer` asks for, or leave it to `--optim`.

    Args:
        trainer: UnlearnTrainer, whose model, data and arguments are there.
    Raises:
        UserError: where it cannot run.
    """
    args, kind = trainer.args, trainer.args.unlearn_optimizer
    if kind is None:
        return
    _refuse_what_cannot_run(trainer)
    options = {"lr": args.learning_rate}
    if kind in ("sophia", "soul_legacy"):
        made = Sophia if kind == "sophia" else LegacySophia
        options |= {"betas": tuple(args.sophia_betas), "rho": args.sophia_rho}
    elif kind == "influence":
        made, options = InfluenceStep, {**options, "damping": args.influence_damping}
    else:
        made, options = MuonWithAdamW, {**options, "is_matrix": _matrices_of(trainer)}
    trainer.optimizer_cls_and_kwargs = made, options
    if kind == "influence":
        trainer.add_callback(_InfluenceSteps(trainer))
    elif kind != "muon":
        trainer.add_callback(_SophiaSteps(trainer))


def stepping_optimizer(optimizer):
    """Return the torch.optim.Optimizer that does the steps, inside what accelerate and DeepSpeed wrap around it."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


class _CurvatureSteps(TrainerCallback):
    """Base of what gives an optimizer its curvature.

    Attributes:
        passes: CurvaturePasses, or None where the gradient itself is squared.
    """

    def __init__(self, trainer):
        self.trainer = trainer
        made = PASSES.get(trainer.args.hessian_estimator)
        self.passes = made and made(trainer)

    @property
    def optimizer(self):
        """The optimizer that steps."""
        return stepping_optimizer(self.trainer.optimizer)

    def on_train_begin(self, args, state, control, **kwargs):
        """Refuse what is known only now.

        Raises:
            UserError: gradients that are not those of one function.
        """
        if self.trainer.gradient_filter is not None and isinstance(self.passes, Hutchinson):
            raise UserError(
                "--hessian_estimator hutchinson differences the gradient of one objective, which filtered gradients "
                "are not; pass --hessian_estimator gnb, or leave out --same_sign_grads and --asymmetric_filter"
            )

    def tokens(self):
        """Return how many tokens the step counts, all streams and processes together."""
        _, counts = self.trainer.step_batches
        return float(sum(counted[1] for counted in counts.values()))


class _SophiaSteps(_CurvatureSteps):
    """Gives Sophia an estimate every `--hessian_interval` steps, and logs how much of its steps is clipped."""

    def on_step_begin(self, args, state, control, **kwargs):
        """Count anew, and let the step square its gradient where that is the estimate."""
        optimizer = self.optimizer
        optimizer.reset_clipped()
        if args.hessian_estimator == "empirical_fisher":
            optimizer.fisher_tokens = self.tokens() if self._is_due() else None

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        """Take the passes of an estimate."""
        optimizer = self.optimizer
        if self.passes is not None and self._is_due():
            self.passes.estimate(optimizer, optimizer.take_estimate)

    def on_optimizer_step(self, args, state, control, **kwargs):
        """Log the share of weights whose step was clipped."""
        trainer, device = self.trainer, args.device
        clipped, stepped = trainer.accelerator.reduce(self.optimizer.clipped().to(device, wide_dtype(device)), "sum")
        # What is logged is summed over processes.
        share = clipped / stepped.clamp(min=1) / args.world_size
        trainer._log_term("optimizer/clipped_share", share, standalone=False)

    def _is_due(self):
        """Return whether the step takes an estimate; the interval begins anew with each phase, as the state does."""
        step, phases = self.trainer.state.global_step, getattr(self.trainer, "phases", None)
        since = step - phases.start(phases.index(step)) if phases else step
        return since % self.trainer.args.hessian_interval == 0


class _InfluenceSteps(_CurvatureSteps):
    """Gives the influence step the mean of several estimates, and its damping."""

    def on_train_begin(self, args, state, control, **kwargs):
        """Refuse more than one step.

        Raises:
            UserError: see there.
        """
        super().on_train_begin(args, state, control, **kwargs)
        if state.max_steps != 1:
            batches = len(self.trainer.make_plan())
            raise UserError(
                f"--unlearn_optimizer influence takes one step, but this run has {state.max_steps}; pass --max_steps 1 "
                f"--gradient_accumulation_steps {batches}, which is one over all rows"
            )

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        """Estimate, and set the damping."""
        optimizer, accelerator = self.optimizer, self.trainer.accelerator
        if self.passes is None:
            tokens = self.tokens()
            for parameter in (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None):
                optimizer.take_squares(parameter, tokens)
        for draw in range(args.influence_draws if self.passes is not None else 0):
            take = functools.partial(optimizer.take_estimate, share=1 / args.influence_draws)
            self.passes.estimate(optimizer, take, draw)
        total, count = accelerator.reduce(optimizer.sums().to(args.device, wide_dtype(args.device)), "sum").tolist()
        if not total > 0:
            raise UserError("the estimated curvature is nowhere above 0; pass --hessian_estimator gnb")
        optimizer.damping_mean = total / count


def _matrices_of(trainer):
    """Return the function that says of a parameter whether it is a matrix inside a decoder layer."""
    held = functools.cache(lambda: {id(p) for p in decoder_layers(trainer.model).parameters() if p.dim() == 2})
    return lambda parameter: id(parameter) in held()


def _refuse_what_cannot_run(trainer):
    args, kind = trainer.args, trainer.args.unlearn_optimizer
    if trainer.optimizer is not None:
        raise UserError("--unlearn_optimizer has no effect: the trainer was given an optimizer")
    if kind == "muon" and not hasattr(torch.optim, "Muon"):
        raise UserError(f"--unlearn_optimizer muon needs PyTorch 2.9 or newer, but this is {torch.__version__}")
    backend, estimator = trainer.accelerator.distributed_type, args.hessian_estimator
    if backend == DistributedType.FSDP and not trainer.is_fsdp2():
        raise UserError(
            f"--unlearn_optimizer {kind} needs weights in their own shapes, which FSDP version 1 flattens; leave the "
            "version out of --fsdp_config"
        )
    if backend == DistributedType.DEEPSPEED:
        _refuse_deepspeed(args, kind, estimator)
    if args.fp16 and estimator in PASSES:
        raise UserError(
            f"--hessian_estimator {estimator} takes gradients of its own, to which the loss scale of --fp16 does not "
            "fit; pass --bf16 True, or --hessian_estimator empirical_fisher"
        )
    if estimator == "hutchinson" and (args.bf16 or args.autocast_in_forward):
        raise UserError(
            "--hessian_estimator hutchinson differences gradients, in which bfloat16's roundings are larger than the "
            "differences; pass --hessian_estimator gnb, or leave out --bf16"
        )
    last = trainer.last_layer_for(args)
    if estimator == "gnb" and last is not None:
        raise UserError(
            f"--hessian_estimator gnb draws labels from the output, but this run's losses end at layer {last}; pass "
            "--retain_loss kl, or another estimator"
        )
    if estimator in PASSES and trainer.train_dataset is not None:
        if not hessian_streams(trainer.train_dataset.streams, args.hessian_data):
            raise UserError(
                f"--hessian_data {args.hessian_data} asks for rows that this run does not read; it reads "
                f"{', '.join(trainer.train_dataset.streams)}"
            )


def _refuse_deepspeed(args, kind, estimator):
    if kind == "muon":
        raise UserError(
            "--unlearn_optimizer muon needs whole matrices, which DeepSpeed flattens; pass --fsdp True in place of "
            "--deepspeed"
        )
    if kind == "influence" or estimator in PASSES:
        what = "--unlearn_optimizer influence" if kind == "influence" else f"--hessian_estimator {estimator}"
        instead = "" if kind == "influence" else " --hessian_estimator empirical_fisher, or"
        raise UserError(
            f"{what} takes gradients between a backward and its step, which DeepSpeed does not part; pass{instead} "
            "--fsdp True in place of --deepspeed"
        )
    if "optimizer" in args.deepspeed:
        raise UserError(
            f"--unlearn_optimizer {kind} and the optimizer of the DeepSpeed file exclude each other; leave 'optimizer' "
            "out of --deepspeed"
        )
