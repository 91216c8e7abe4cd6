"""A model without its weights: built from the config alone, wrapped and quantized as it would be loaded."""

import copy
import functools
import math
import warnings
from dataclasses import dataclass

import torch
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.masking_utils import AttentionMaskInterface
from transformers.quantizers.base import get_keys_to_not_convert

from llm_unlearn.errors import UserError
from llm_unlearn.models import with_lora

_KERNEL = "what_a_kernel_keeps"  # transformers looks for a package where the name says flash
_BLOCK, _SECOND_BLOCK = 64, 256  # elements that share a scale in bitsandbytes, and scales that share one of their own


@dataclass(frozen=True)
class Sizes:
    """Parameters and bytes of a model.

    Attributes:
        total, trained: parameters, those of quantized matrices in full.
        embeddings: parameters of the embedding and of an untied head.
        head_shape: (vocabulary, hidden size) of the head.
        head_bytes: of the head; head_gradient_bytes: of its gradient, 0 where it is frozen.
        num_layers: decoder layers.
        is_uniform: whether they are all alike, so that a few stand for all.
        weight_bytes: parameters and buffers as they are held.
        by_dtype: {dtype name: bytes}.
        layer_bytes, root_bytes: the largest decoder layer, and everything outside the layers, as they are held.
        layer_gradient_bytes, root_gradient_bytes: their gradients.
        trained_shapes: ((shape, dtype, whether of an embedding), ...).
    """

    total: int
    trained: int
    embeddings: int
    head_shape: tuple
    head_bytes: int
    head_gradient_bytes: int
    num_layers: int
    is_uniform: bool
    weight_bytes: int
    by_dtype: dict
    layer_bytes: int
    root_bytes: int
    layer_gradient_bytes: int
    root_gradient_bytes: int
    trained_shapes: tuple

    @property
    def gradient_bytes(self):
        """One number for each trained weight, in its dtype."""
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype, _ in self.trained_shapes)


def build(case, num_layers=None):
    """Build the model of a case on the meta device.

    Args:
        case: Case.
        num_layers: decoder layers to keep, or None for all.
    Returns:
        PreTrainedModel or PeftModel, in training mode.
    Raises:
        UserError: an architecture that transformers does not know, or target modules that it does not have.
    """
    config, trusts = copy.deepcopy(case.source.config), case.source.flags.trust_remote_code
    attention = _KERNEL if (case.attention or "").startswith("flash") else case.attention
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = AutoModelForCausalLM.from_config(
                config,
                dtype=case.dtype,
                attn_implementation=attention,
                trust_remote_code=trusts,
            )
            if num_layers is not None:
                layers = decoder_layers(model)
                del layers[num_layers:]
            if case.load_in_4bit or case.load_in_8bit:
                _quantize(model, case)
            flags = case.lora_flags()
            wrapped = with_lora(model, flags) if flags else model
            return wrapped.train()
    except UserError:
        raise
    except (ValueError, ImportError, RuntimeError, AttributeError, KeyError) as error:
        first_line = str(error).strip().split("\n")[0]
        raise UserError(f"no model can be made of the config of '{config._name_or_path}': {first_line}") from error


def decoder_layers(model):
    """Return the torch.nn.ModuleList of a model's decoder layers: its longest one."""
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    if not lists:
        raise UserError(f"{type(model).__name__} has no list of decoder layers, so that its memory cannot be estimated")
    return max(lists, key=len)


def _is_uniform(model, layers):
    if len(set(getattr(model.config, "layer_types", None) or [None])) > 1:
        return False
    shapes = {tuple((n, p.shape, p.dtype, p.requires_grad) for n, p in layer.named_parameters()) for layer in layers}
    return len(shapes) == 1


def causal_model(model):
    """Return the PreTrainedModel inside a PeftModel, or the model itself."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def sizes_of(case):
    """Count the parameters and bytes of a case's model; tied weights count once.

    Args:
        case: Case.
    Returns:
        Sizes.
    Raises:
        UserError: see `build`.
    """
    return _measured(case.of_model())


@functools.lru_cache(maxsize=64)
def _measured(case):
    model = build(case)
    inner, layers = causal_model(model), decoder_layers(model)
    parameters = list(model.parameters())
    embedding, head = inner.get_input_embeddings(), inner.get_output_embeddings()
    ends = {id(module.weight): module.weight for module in (embedding, head)}
    by_dtype = {}
    for tensor in [*parameters, *model.buffers()]:
        name = str(tensor.dtype).removeprefix("torch.")
        by_dtype[name] = by_dtype.get(name, 0) + _bytes([tensor])
    largest = max(layers, key=_held_bytes)
    embedded = {id(p) for m in model.modules() if isinstance(m, torch.nn.Embedding) for p in m.parameters()}
    trained = [p for p in parameters if p.requires_grad]
    return Sizes(
        total=sum(_elements(p) for p in parameters),
        trained=sum(p.numel() for p in trained),
        embeddings=sum(weight.numel() for weight in ends.values()),
        head_shape=tuple(head.weight.shape),
        head_bytes=_bytes([head.weight]),
        head_gradient_bytes=_bytes([head.weight]) if head.weight.requires_grad else 0,
        num_layers=len(layers),
        is_uniform=_is_uniform(inner, layers),
        weight_bytes=sum(by_dtype.values()),
        by_dtype=by_dtype,
        layer_bytes=_held_bytes(largest),
        root_bytes=sum(by_dtype.values()) - _held_bytes(layers),
        layer_gradient_bytes=_bytes(p for p in largest.parameters() if p.requires_grad),
        root_gradient_bytes=_bytes(trained) - _bytes(p for p in layers.parameters() if p.requires_grad),
        trained_shapes=tuple((tuple(p.shape), p.dtype, id(p) in embedded) for p in trained),
    )


def as_fake(model):
    """Give a meta model parameters and buffers of the current FakeTensorMode, on the CPU, in place.

    A meta device knows no autocast and takes the slow path of attention; a fake CPU runs what a real one would.
    """
    made = {}

    def fake(tensor):
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")

    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in made:
                # The old one is kept too, so that no id is given out twice.
                made[id(parameter)] = parameter, torch.nn.Parameter(fake(parameter), parameter.requires_grad)
            module._parameters[name] = made[id(parameter)][1]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = fake(buffer)
        for name, value in vars(module).items():
            if isinstance(value, torch.Tensor):
                setattr(module, name, fake(value))
    return model


class Quantized(torch.nn.Linear):
    """A linear layer as bitsandbytes holds it, with the memory of its matrix product and nothing of its values.

    Args:
        linear: torch.nn.Linear on the meta device.
        bits: 4 or 8.
        nested: whether the scales of 4 bits are quantized once more.
        compute: dtype that 4 bits are multiplied in.
    """

    def __init__(self, linear, bits, nested, compute):
        # Not Linear's own: it would make the matrix.
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bits, self.compute = bits, compute
        elements = linear.weight.numel()
        self.weight = torch.nn.Parameter(
            torch.empty((elements * bits // 8, 1), dtype=torch.uint8, device=linear.weight.device), requires_grad=False
        )
        self.weight.elements = elements
        self.bias = linear.bias
        self.register_buffer("scales", torch.empty(self._scale_bytes(nested), dtype=torch.uint8))

    def _scale_bytes(self, nested):
        if self.bits == 8:
            return 4 * self.out_features
        blocks = -(-self.weight.elements // _BLOCK)
        return blocks + 4 * -(-blocks // _SECOND_BLOCK) if nested else 4 * blocks

    def forward(self, hidden):
        """Return (..., out_features) of (..., in_features)."""
        narrow = hidden.to(self.compute) if self.bits == 4 else hidden
        return _QuantizedProduct.apply(narrow, self.out_features, self.bits == 8).to(hidden.dtype)


class _QuantizedProduct(torch.autograd.Function):
    """bitsandbytes' MatMul4Bit, which keeps no input, and MatMul8bitLt, which does; both unpack the matrix."""

    @staticmethod
    def forward(ctx, hidden, out_features, keeps_input):
        ctx.kept = hidden if keeps_input else None
        ctx.in_features = hidden.shape[-1]
        weight = hidden.new_empty(out_features, ctx.in_features)
        return hidden.detach() @ weight.T

    @staticmethod
    def backward(ctx, grad):
        return grad @ grad.new_empty(grad.shape[-1], ctx.in_features), None, None


def _quantize(model, case):
    """Replace the linear layers that transformers would quantize; embeddings, norms and the head stay as they are."""
    flags, kept = case.source.flags, set(get_keys_to_not_convert(model))
    bits = 4 if case.load_in_4bit else 8
    for name, module in list(model.named_modules()):
        if not isinstance(module, torch.nn.Linear) or any(name == key or name.startswith(f"{key}.") for key in kept):
            continue
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, Quantized(module, bits, flags.use_bnb_nested_quant, case.dtype))
    setattr(model, f"is_loaded_in_{bits}bit", True)


def _elements(parameter):
    return getattr(parameter, "elements", parameter.numel())


def _held_bytes(module):
    return _bytes([*module.parameters(), *module.buffers()])


def _bytes(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class _FlashAttention(torch.autograd.Function):
    """What a flash attention kernel keeps for its backward: its inputs, its output and one number for each row."""

    @staticmethod
    def forward(ctx, query, key, value):
        out = torch.empty_like(query)
        normalizers = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, normalizers)
        return out

    @staticmethod
    def backward(ctx, grad):
        query, key, value, _, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _flash(module, query, key, value, attention_mask, **kwargs):
    return _FlashAttention.apply(query, key, value).transpose(1, 2).contiguous(), None


AttentionInterface.register(_KERNEL, _flash)
AttentionMaskInterface.register(_KERNEL, lambda **kwargs: None)
