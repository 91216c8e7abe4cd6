"""UnlearnTrainer: the toolbox that every method composes in its `compute_loss`."""
# Shapes: B sequences, T tokens, N counted positions.

import contextlib

import torch

from llm_unlearn.activations import capture, decoder_layers
from llm_unlearn.callbacks import FiniteGradients, PlanEpoch, WarmupWarning
from llm_unlearn.data.streams import UnlearnCollator, pad_id
from llm_unlearn.errors import NonFiniteError, UserError
from llm_unlearn.evaluation.likelihood import stream_likelihoods
from llm_unlearn.head import StreamOutput, concatenate, split, wide_dtype
from llm_unlearn.head_reading import HeadReader, score_streams
from llm_unlearn.models import load_model, train_only
from llm_unlearn.objectives.likelihood import nll
from llm_unlearn.reference import HIDDEN, LOGPS, Reference
from llm_unlearn.stream_trainer import StreamTrainer, padding_multiple, warn_of_low_precision
from llm_unlearn.training_arguments import UnlearnArguments


class UnlearnTrainer(StreamTrainer):
    """Base of every method: streams in, named terms out, one global normalization.

    A method overrides `compute_loss` and sets the class attributes. A term that `total_loss` gets has one value per
    sequence (B,) or per token (B, T); it is divided, once, by how many sequences or tokens the stream counts over the
    whole optimizer step on all processes. So 1 x 4, 2 x 2 and 4 x 1 micro-batches and any number of processes agree.

    Attributes:
        args_class: the method's arguments, a descendant of UnlearnArguments.
        needs_reference: whether `compute_loss` calls `reference`.
        streams: names of the streams that the method reads, the anchor of the epoch first.
        optional_streams: names of streams that it reads where they are given.
        retain_loss: the retain term of a method that leaves no choice; None takes `--retain_loss`.
        suite: what `evaluate` scores besides, an `evaluation.in_training.TrainingSuite` or None.
        pooled: divide every term by the sequences of all streams together, instead of its own.
        token_terms: streams whose term is one number times each token's log-probability or divergence (or token weight
            times it); the head then takes their gradient in the forward. Only speed depends on it.

    Args:
        model: a causal language model, plain or with PEFT adapters, or the name of one.
        args: an instance of `args_class`; None takes its defaults.
        train_dataset: {"forget": rows, "retain": rows} or an UnlearnDataset; rows are a list of dicts, a file or a
            datasets.Dataset. Bare rows are the forget set.
        eval_dataset: {name: rows} whose plain NLL `evaluate` reports.
        processing_class: the tokenizer.
        **kwargs: passed on to transformers.Trainer.
    Raises:
        UserError: a stream that the method needs is missing or empty.
    """

    args_class = UnlearnArguments
    needs_reference = False
    token_terms = ("retain",)
    pooled = False
    suite = None
    loss_is_scaled_for_ga = True

    def __init__(
        self, model, args=None, train_dataset=None, eval_dataset=None, processing_class=None, callbacks=None, **kwargs
    ):
        args = args or self.args_class()
        self.push_requested, args.push_to_hub = args.push_to_hub, False
        args._n_gpu = min(args.n_gpu, 1)
        model = load_model(model) if isinstance(model, str) else model
        trained = self.trained_parameters_for(args)
        if trained:
            train_only(model, trained)
        warn_of_low_precision(model)
        self.tokenize_options = args.tokenize_options(getattr(model.config, "max_position_embeddings", None))
        filler = 0 if processing_class is None else pad_id(processing_class)
        super().__init__(
            model=model,
            args=args,
            data_collator=UnlearnCollator(filler, padding_multiple(args.device)),
            train_dataset=self._training_streams(train_dataset, processing_class, args),
            eval_dataset=self._tokenized(eval_dataset, processing_class),
            processing_class=processing_class,
            callbacks=[PlanEpoch(self), FiniteGradients(self), WarmupWarning(), *(callbacks or [])],
            **kwargs,
        )
        # The division by the counts is ours (total_loss); with both set no transformers 5 divides again.
        self.model_accepts_loss_kwargs = True
        self._keep_outputs_wide()
        self._asked = (None, None)
        self.reader = HeadReader(self.model)
        readings = self.reference_readings(args)
        if not readings and (args.reference or args.reference_cache):
            raise UserError(f"--reference has no effect: {type(self).__name__} compares with none in this run")
        self._frozen_reference = Reference(self, readings) if readings else None
        self.reset_terms(0)

    # ---- What a method declares ----

    def reference_readings(self, args):
        """Return {stream: reference.Reading}: what a run with these arguments asks the frozen reference."""
        readings = {"forget": LOGPS} if self.needs_reference and self.weight_of("forget", args) else {}
        if self.retain_loss_for(args) == "kl" and "retain" in self.streams_for(args):
            readings["retain"] = HIDDEN
        return readings

    # ---- What a method composes ----

    def forward(self, model, inputs, streams=None, entropy=()):
        """Score streams under the model in one forward.

        Args:
            model: the wrapped model that `compute_loss` was given.
            inputs: UnlearnBatch.
            streams: names; None scores all that `inputs` holds.
            entropy: names of the streams whose entropy is wanted.
        Returns:
            {stream: StreamOutput}, with `kl` where the retain term is a divergence; zeros for a stream of weight 0.
        """
        streams = tuple(streams or inputs)
        running = tuple(name for name in streams if self._runs(name))
        outputs = {name: StreamOutput.blank(inputs[name]) for name in streams if name not in running}
        if running:
            hidden = {}
            if "retain" in running and self.retain_loss_for(self.args) == "kl":
                hidden = {"retain": self._ask_reference(inputs)["retain"]}
            outputs |= score_streams(
                self.reader, model, inputs, running, self.data_collator.pad_token_id, entropy=entropy,
                linear=self.token_terms, ref_hidden=hidden,
                ref_projection=self._frozen_reference.projection if hidden else None,
            )  # fmt: skip
        return {name: outputs[name] for name in streams}

    def hidden_states(self, model, inputs, layers, streams=None):
        """Return what decoder layers hand on, in one forward of all streams.

        Args:
            model: the wrapped model that `compute_loss` was given.
            inputs: UnlearnBatch.
            layers: indices of decoder layers, from 0; none above `last_layer_for`.
            streams: names; None takes all that `inputs` holds, those of weight 0 left out.
        Returns:
            {stream: list of (B, T, D), one for each layer}, with gradients.
        """
        streams = [name for name in streams or inputs if self._runs(name)]
        modules = decoder_layers(model)
        input_ids, attention_mask = concatenate(inputs, streams, self.data_collator.pad_token_id)
        with capture(*(modules[layer] for layer in layers)) as found:
            model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        parts = [split(hidden, inputs, streams) for hidden in found]
        return {name: [part[name] for part in parts] for name in streams}

    def reference(self, inputs, streams=("forget",)):
        """Score streams under the frozen reference; {stream: StreamOutput}, no gradient, zeros for weight 0.

        Args:
            inputs: UnlearnBatch.
            streams: names, which `reference_readings` gives `LOGPS`.
        Raises:
            ValueError: a stream that `reference_readings` does not name.
        """
        readings = self._frozen_reference.readings if self._frozen_reference else {}
        unread = [name for name in streams if self._runs(name) and readings.get(name) is not LOGPS]
        if unread:
            raise ValueError(f"reference_readings of {type(self).__name__} does not give {unread[0]} the reading LOGPS")
        found = self._ask_reference(inputs)
        return {
            name: StreamOutput.of(inputs[name], found[name]) if name in found else StreamOutput.blank(inputs[name])
            for name in streams
        }

    def retain_term(self, outputs, inputs):
        """Return the retain values (B, T) that `--retain_loss` asks for, or None where the run has no retain stream."""
        if "retain" not in outputs:
            return None
        return outputs["retain"].kl if self.retain_loss_for(self.args) == "kl" else nll(outputs["retain"].logps)

    def total_loss(self, terms, outputs, return_outputs=False, num_items_in_batch=None):
        """Weigh, normalize and log the named terms.

        Args:
            terms: {stream: values (B,) per sequence or (B, T) per token, or None}; weighed by `<stream>_weight`.
            outputs: {stream: StreamOutput} of this micro-batch.
            return_outputs: also return `outputs`, as `compute_loss` does.
            num_items_in_batch: {stream: (2,) sequences and tokens of the whole step}; None counts this batch alone.
        Returns:
            scalar loss, times the number of processes because gradients are averaged over them.
        Raises:
            NonFiniteError: if the loss, summed over all processes, is NaN or infinite; raised before the backward.
        """
        standalone = num_items_in_batch is None
        own = {name: output.counts().clamp(min=1) for name, output in outputs.items()}
        items = own if standalone else num_items_in_batch
        loss, self._asked = 0.0, (None, None)
        for name, values in terms.items():
            if values is None or not self._runs(name):
                continue
            total, column = _summed(values, outputs[name])
            divisor = items[name][column]
            self._log_term(name, total.detach() / divisor, standalone)
            if self.pooled:
                divisor = sum(items[other][column] for other, given in terms.items() if given is not None)
            loss = loss + self.weight_of(name) * total / divisor
        loss = loss * (1 if standalone else self.accelerator.num_processes)
        self._require_finite(loss)
        return (loss, outputs) if return_outputs else loss

    # ---- The Trainer's own hooks ----

    def train(self, resume_from_checkpoint=None, **kwargs):
        """Ask a cached reference while the model is still what it was, then train; see CheckpointedTrainer.train."""
        if self._frozen_reference is not None and self.train_dataset is not None:
            self._frozen_reference.prepare()
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def discard_reference_cache(self):
        """Delete the answers of a cached reference, once the model is finished."""
        if self._frozen_reference is not None:
            self._frozen_reference.discard()

    def reference_record(self):
        """Return {"mode", "cached_bytes"} of the frozen reference, or None where the run compares with none."""
        found = self._frozen_reference
        return found and {"mode": found.mode, "cached_bytes": found.cache.num_bytes() if found.cache else 0}

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Report the plain NLL (nats per token) and probability of every evaluation set, sharded over the processes.

        Args:
            eval_dataset: {name: rows}; None takes the trainer's own.
            ignore_keys: unused, there are no other outputs.
            metric_key_prefix: of the metrics.
        Returns:
            {f"{prefix}_{name}_nll", f"{prefix}_{name}_probability"}, and f"{prefix}_loss", the mean of the retain-like
            sets' NLL, else of all sets'; with a `suite` its metrics too.
        """
        data = self.eval_dataset if eval_dataset is None else self._tokenized(eval_dataset, self.processing_class)
        if not data:
            raise UserError("evaluation needs an eval_dataset")
        if self.truncation is not None and self.is_sharded():
            raise UserError("a sharded model without its upper layers cannot be evaluated; run run_eval.py afterwards")
        with self.truncation.whole() if self.truncation else contextlib.nullcontext():
            found = stream_likelihoods(self, data.streams)
            metrics = {f"{metric_key_prefix}_{key}": value for key, value in found.items()}
            metrics |= self.suite(self, metric_key_prefix) if self.suite is not None else {}
        kept = [metrics[f"{metric_key_prefix}_{name}_nll"] for name in data.streams if name == "retain"]
        kept = kept or [value for key, value in metrics.items() if key.endswith("_nll")]
        metrics[f"{metric_key_prefix}_loss"] = sum(kept) / len(kept)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs, start_time=None):
        """Add the mean of each named term since the last log, over all processes, as `loss/<name>`."""
        if "loss" in logs and self._term_sums:
            steps = max(self.state.global_step - self._terms_since, 1)
            means = self.accelerator.reduce(torch.stack(list(self._term_sums.values())), "sum") / steps
            logs.update({f"loss/{name}": mean.item() for name, mean in zip(self._term_sums, means, strict=True)})
            self.reset_terms(self.state.global_step)
        super().log(logs, start_time)

    def reset_terms(self, step):
        """Start the averages of the logged terms anew at a step."""
        self._term_sums, self._terms_since = {}, step

    # ---- Private ----

    def _runs(self, stream):
        """Return whether a stream's term is computed now: its weight is not 0, and no other stream has its turn."""
        return self.weight_of(stream) != 0 and self._only in (None, stream)

    def _ask_reference(self, inputs):
        """Return {stream: values} of the reference on a batch, asked in one forward and once for all who want it."""
        if self._asked[0] is not inputs:
            readings = self._frozen_reference.readings if self._frozen_reference else {}
            streams = [name for name in readings if name in inputs and self._runs(name)]
            self._asked = inputs, self._frozen_reference.values(inputs, streams) if streams else {}
        return self._asked[1]

    def _log_term(self, name, value, standalone):
        if not standalone and self.model.training:
            self._term_sums[name] = self._term_sums.get(name, 0.0) + value.to(wide_dtype(value.device))

    def _require_finite(self, loss):
        if not torch.isfinite(self.accelerator.reduce(loss.detach().clone(), "sum")):
            raise NonFiniteError(self.non_finite_message("the loss"))


def _summed(values, output):
    """Return (sum of the values that count, 0 for sequences or 1 for tokens)."""
    if values.dim() == 1:
        return values.masked_fill(~output.mask.any(-1), 0.0).sum(), 0
    return (values if output.weights is None else values * output.weights).sum(), 1
