"""From a parsed command line to the case whose memory is asked for."""

from pathlib import Path

import psutil
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from llm_unlearn.cli.unlearn import start_model
from llm_unlearn.command_line import load_json
from llm_unlearn.data.environments import are_at_hand
from llm_unlearn.data.splits import DOMAINS
from llm_unlearn.data.streams import UnlearnDataset
from llm_unlearn.data.training_sets import training_sets
from llm_unlearn.errors import UserError
from llm_unlearn.memory.case import BUCKET_ELEMENTS, LIVE_ELEMENTS, Backend, Case, Source
from llm_unlearn.memory.request import fsdp_settings
from llm_unlearn.models import _DTYPES, _load, load_tokenizer, quantization_config
from llm_unlearn.reference import HIDDEN
from llm_unlearn.regularizer_flags import STREAMS
from llm_unlearn.stream_trainer import padding_multiple


def make_case(parsed, request):
    """Read everything that an estimate depends on.

    Args:
        parsed: Parsed command line, without its backend's flags.
        request: Request, which has them.
    Returns:
        Case.
    Raises:
        UserError: no model was named, or its config cannot be read; flags that contradict each other.
    """
    args, flags = parsed.args, parsed.model
    quantization_config(flags)
    config = _config(parsed)
    streams, readings, is_linear = _declared(parsed, config)
    device_type, device_bytes = _device(args, request)
    width, width_from = _width(parsed, config)
    multiple = padding_multiple(torch.device(device_type))
    is_kl = HIDDEN in readings.values()
    return Case(
        source=Source(config, flags, args, parsed.method, bool(readings), is_kl, is_linear, width_from),
        dtype=_DTYPES.get(flags.dtype) or getattr(config, "dtype", None) or torch.float32,
        autocast=torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None,
        use_peft=flags.use_peft,
        load_in_4bit=flags.load_in_4bit,
        load_in_8bit=flags.load_in_8bit,
        streams=streams,
        width=-(-width // multiple) * multiple,
        checkpointing=bool(args.gradient_checkpointing),
        accumulation=args.gradient_accumulation_steps,
        sequential=args.sequential_backward,
        optim=args.unlearn_optimizer or str(getattr(args.optim, "value", args.optim)),
        reference=args.reference,
        backend=make_backend(request),
        attention=flags.attn_implementation,
        device_type=device_type,
        device_bytes=device_bytes,
    )


def make_backend(request):
    """Return the Backend that a request's flags describe.

    Args:
        request: Request.
    Raises:
        UserError: a missing or malformed configuration; FSDP on one process.
    """
    fsdp, processes = fsdp_settings(request.backend), request.processes
    if request.backend["deepspeed"]:
        return zero_backend(load_json(request.backend["deepspeed"]), processes)
    if processes == 1:
        return Backend()
    if fsdp is None:
        return Backend("ddp", processes)
    reshards = str(fsdp.get("reshard_after_forward", True)).lower() != "false"
    offloads = str(fsdp.get("cpu_offload", False)).lower() == "true"
    return Backend("fsdp", processes, 0, reshards, offloads, offloads)


def zero_backend(config, processes):
    """Return the Backend of a DeepSpeed configuration.

    Args:
        config: dict as in ds_configs/.
        processes: how many.
    """
    zero = config.get("zero_optimization", {})
    stage, pools = int(zero.get("stage", 0)), 2 if zero.get("overlap_comm") and zero.get("stage", 0) < 3 else 1
    if stage == 0:
        return Backend("ddp" if processes > 1 else "single", processes)

    def number(name, default):
        given = zero.get(name, default)
        return default if given == "auto" else int(given)

    def offloads(name):
        return zero.get(name, {}).get("device", "none") != "none"

    return Backend(
        "zero", processes, stage, True, offloads("offload_param"), offloads("offload_optimizer"),
        pools * number("reduce_bucket_size", BUCKET_ELEMENTS), number("stage3_max_live_parameters", LIVE_ELEMENTS),
    )  # fmt: skip


def _config(parsed):
    name = start_model(parsed)
    try:
        return _load(AutoConfig, name, "model", **_hub(parsed))
    except StrictDataclassError as error:
        raise UserError(f"the config of '{name}' contradicts itself: {' '.join(str(error).split())}") from error


def _hub(parsed):
    return {
        "revision": parsed.model.model_revision,
        "cache_dir": parsed.data.cache_dir,
        "token": parsed.data.token,
        "trust_remote_code": parsed.model.trust_remote_code,
    }


def _declared(parsed, config):
    """Return (((stream, rows), ...), readings of the reference, whether a term is linear) without making a trainer."""
    trainer = object.__new__(parsed.trainer)
    trainer.args, trainer.train_dataset = parsed.args, None
    trainer.depth = config.get_text_config(decoder=True).num_hidden_layers
    ratio = trainer.rows_per_anchor() | {STREAMS["ilu"]: parsed.args.ilu_ratio}
    names = [name for name in parsed.trainer.streams_for(parsed.args) if trainer.weight_of(name, parsed.args)]
    # By parameter gradients its stream runs by itself, beside no other.
    names += [STREAMS["ilu"]] if parsed.args.ilu_mode == "logit_scale" else []
    streams = tuple((name, parsed.args.per_device_train_batch_size * ratio.get(name, 1)) for name in names)
    return streams, trainer.reference_readings(parsed.args), bool(set(parsed.trainer.token_terms) & set(names))


def _device(args, request):
    """Return (type, bytes) of the device that is asked about."""
    is_cpu = args.use_cpu
    if request.device_bytes is not None:
        # A size is a GPU's unless the command line itself chose the CPU.
        return "cpu" if is_cpu and request.uses_cpu else "cuda", request.device_bytes
    if is_cpu:
        return "cpu", float(psutil.virtual_memory().total)
    _, total = torch.accelerator.get_memory_info()
    return "cuda", float(total)


def _width(parsed, config):
    """Return (tokens of the longest row, where that was read): the data where it is at hand, else the flags."""
    context = getattr(config, "max_position_embeddings", None)
    options = parsed.args.tokenize_options(context)
    forget = DOMAINS.get(parsed.data.domain, {}).get("forget")
    kind = "text" if forget is not None and forget.kind == "text" else "qa"
    limit = options.length(kind)
    if not _is_at_hand(parsed):
        return limit, "--max_length" if options.max_length else f"the default --max_length of {kind} rows"
    parsed.context_length = context
    tokenizer = load_tokenizer(parsed.model.tokenizer_name or start_model(parsed), **_hub(parsed))
    _, train, _ = training_sets(parsed, tokenizer)
    rows = UnlearnDataset.of(train, tokenizer, options).streams
    return max(len(row["input_ids"]) for part in rows.values() for row in part), "the longest row of the data"


def _is_at_hand(parsed):
    """Whether every set that the method reads lies on this machine, with the tokenizer."""
    data, name = parsed.data, parsed.model.tokenizer_name or start_model(parsed)
    streams = [name for name in parsed.trainer.streams_for(parsed.args) if name not in parsed.trainer.paired_streams]
    files = [getattr(data, f"{stream}_data", None) for stream in streams]
    local = [Path(path).is_file() if path else bool(data.data_dir) or data.domain == "demo" for path in files]
    has_tokenizer = any((Path(name) / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json"))
    return all(local) and are_at_hand(parsed.args.ilu_data or (), data) and has_tokenizer
