"""Some rows of a batch without the adapters of the upper layers, in one forward with rows that have them all."""
# Shapes: B sequences, T tokens, D hidden size.

import contextlib
from functools import partial

import torch

from llm_unlearn.decoder import decoder_layers
from llm_unlearn.errors import UserError


class AdapterRows:
    """Leaves LoRA adapters above a decoder layer out of chosen rows: they see the frozen base there.

    What an adapter adds to those rows is set to 0, so that its weights still have a gradient, 0 from those rows, which
    DDP and DeepSpeed wait for. The choice has to stand until the backward is over, because gradient checkpointing runs
    the layers again there.

    Args:
        model: PeftModel that is not wrapped yet.
    Raises:
        UserError: adapters that are not a low-rank matrix added to the output of a layer inside the decoder.
    """

    def __init__(self, model):
        self._rows, self._layer, self._added = None, None, []
        layers = decoder_layers(model)
        inside = {id(module) for layer in layers for module in layer.modules()}
        for name, module in model.named_modules():
            is_lora = _is_lora(module)
            if _is_adapter(module) and (not is_lora or getattr(module, "lora_variant", None)):
                raise UserError(
                    f"only plain LoRA adapters can be left out of single rows, but '{name}' is none; leave --use_dora, "
                    "--lora_modules_to_save and --lora_target_parameters out"
                )
            if is_lora and id(module) not in inside and len(module.lora_B):
                raise UserError(
                    f"the adapter of '{name}' is outside the decoder layers; pass --lora_target_modules without it"
                )
        for index, layer in enumerate(layers):
            self._added += [
                (index, part) for module in layer.modules() if _is_lora(module) for part in module.lora_B.values()
            ]

    @contextlib.contextmanager
    def installed(self):
        """Watch the adapters while the context is open."""
        hooks = [part.register_forward_hook(partial(self._without, index)) for index, part in self._added]
        try:
            yield self
        finally:
            self.leave_out(None, None)
            for hook in hooks:
                hook.remove()

    def leave_out(self, rows, above):
        """Choose whose adapters are left out, until the next choice.

        Args:
            rows: (B,) bool, True where a row of the next batches goes without; None leaves none out.
            above: index of the layer up to which every row has its adapters.
        """
        self._rows, self._layer = rows, above

    def _without(self, index, _module, _args, output):
        if self._rows is None or index <= self._layer:
            return None
        if output.dim() != 3 or len(output) != len(self._rows):
            if not torch.is_grad_enabled():
                return None  # HeadReader's first look at a few tokens
            raise UserError(
                f"an adapter in layer {index} gets no rows of sequences, so that it cannot be left out of some; pass "
                "--lora_target_modules without it"
            )
        return output.masked_fill(self._rows.view(-1, 1, 1), 0.0)


def _is_adapter(module):
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    return isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)


def _is_lora(module):
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import ParamWrapper

    # A wrapped parameter is changed itself; no module of its adapter is called.
    is_lora = isinstance(module, LoraLayer) and not isinstance(module, ParamWrapper)
    return is_lora and all(isinstance(part, torch.nn.Linear) for part in module.lora_B.values())
