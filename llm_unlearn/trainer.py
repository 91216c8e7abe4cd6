"""UnlearnTrainer: the toolbox that every method composes in its `compute_loss`."""
# Shapes: B sequences, T tokens, N counted positions.

import contextlib

import torch

from llm_unlearn.activations import capture_layers, run_without_head
from llm_unlearn.addons.optimizers import set_up_optimizer
from llm_unlearn.addons.weight_mask import weight_mask_of
from llm_unlearn.callbacks import FiniteGradients, PlanEpoch, WarmupWarning
from llm_unlearn.data.streams import UnlearnCollator, pad_id
from llm_unlearn.decoder import name_decoder_layers
from llm_unlearn.errors import NonFiniteError, UserError
from llm_unlearn.evaluation.likelihood import stream_likelihoods
from llm_unlearn.head import StreamOutput, concatenate, counted_positions, divisors, own_states, split, wide_dtype
from llm_unlearn.head_reading import HeadReader, score_streams
from llm_unlearn.models import load_model, train_only
from llm_unlearn.objectives.likelihood import nll
from llm_unlearn.objectives.representation import STATE_DISTANCES
from llm_unlearn.reference import HIDDEN, LOGPS, Reference, states_at
from llm_unlearn.regularizers import regularizers_of
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
        weight_mask: addons.weight_mask.WeightMask that says which weights train, or None.
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
        self.model = model
        if args.decoder_layers:
            name_decoder_layers(model, args.decoder_layers)
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
        self._asked, self._anchor = (None, None), None
        self.reader = HeadReader(self.model)
        self._prepare_data()
        self.regularizers, self.weight_mask = regularizers_of(self), weight_mask_of(self)
        set_up_optimizer(self)
        readings = self.reference_readings(args)
        if not readings and (args.reference or args.reference_cache):
            raise UserError(f"--reference has no effect: {type(self).__name__} compares with none in this run")
        self._frozen_reference = Reference(self, readings) if readings else None
        self.reset_terms(0)

    # ---- What a method declares ----

    def reference_readings(self, args):
        """Return {stream: reference.Reading}: what a run with these arguments asks the frozen reference."""
        readings = {"forget": LOGPS} if self.needs_reference and self.weight_of("forget", args) else {}
        kind = self.retain_loss_for(args)
        if kind in ("kl", *STATE_DISTANCES) and "retain" in self.streams_for(args):
            readings["retain"] = HIDDEN if kind == "kl" else states_at(self.layers_for(args))
        return readings

    # ---- What a method composes ----

    def forward(self, model, inputs, streams=None, entropy=(), uniform=(), layers=(), scored=None, of_logits=None):
        """Run streams through the model in one forward, and read it at its head, inside, or both.

        Args:
            model: the wrapped model that `compute_loss` was given.
            inputs: UnlearnBatch.
            streams: names; None takes all that `inputs` holds.
            entropy: names of the streams whose entropy is wanted.
            uniform: names of the streams whose cross-entropy of the uniform distribution is wanted, or {name: k} for
                that over the k largest logits.
            layers: decoder layers whose states are wanted, from 0; none above `last_layer_for`.
            scored: names of the streams that are read at the head; None takes all. A model without its upper layers has
                no head: the log-probabilities are zeros then.
            of_logits: {stream: function of its logits, labels and, with the reading HIDDEN, the reference's logits};
                see `head_reading.score_streams`. The head is then made twice.
        Returns:
            {stream: StreamOutput}, with `kl` of the other streams with the reading HIDDEN; zeros for one of weight 0.
        """
        streams = tuple(streams or inputs)
        running = tuple(name for name in streams if self.runs(name))
        outputs = {name: StreamOutput.blank(inputs[name]) for name in streams}
        if not running:
            return outputs
        layers = sorted(
            {*layers, *(layer for part in self.regularizers for layer in part.layers if self.runs(part.stream))}
        )
        with capture_layers(model, layers) as states:
            if self.truncation is not None:
                run_without_head(model, *concatenate(inputs, running, self.data_collator.pad_token_id))
            else:
                outputs |= self._scored(model, inputs, running, entropy, uniform, scored, of_logits or {})
        for layer, hidden in states.items():
            for name, part in split(hidden, inputs, running).items():
                outputs[name].hidden[layer] = own_states(part)
        if layers and self.truncation is None:
            # Every weight above the layers gets a gradient, be it 0: DDP and ZeRO wait for all.
            self._anchor = 0.0 * sum(outputs[name].logps.sum() for name in running)
        return outputs

    def _scored(self, model, inputs, running, entropy, uniform, scored, of_logits):
        chosen = tuple(name for name in running if scored is None or name in scored) or running[:1]
        uniform = dict(uniform) if isinstance(uniform, dict) else dict.fromkeys(uniform)
        flattened = {part.stream for part in self.regularizers if part.reads == "uniform"}
        uniform |= {name: None for name in flattened if name not in uniform}
        entropy = {*entropy, *(part.stream for part in self.regularizers if part.reads == "entropy")}
        # Two values of the tokens that a regularizer flattens get a gradient.
        linear = tuple(name for name in self.token_terms if name not in flattened)
        readings = self._frozen_reference.readings if self._frozen_reference else {}
        hidden = {name: self._ask_reference(inputs)[name] for name in running if readings.get(name) is HIDDEN}
        return score_streams(
            self.reader, model, inputs, running, self.data_collator.pad_token_id, entropy=entropy, uniform=uniform,
            scored=tuple(name for name in running if name in {*chosen, *entropy, *uniform, *hidden, *of_logits}),
            linear=linear, of_logits=of_logits, ref_hidden=hidden,
            ref_projection=self._frozen_reference.projection if hidden else None,
        )  # fmt: skip

    def reference(self, inputs, streams=("forget",)):
        """Score streams under the frozen reference; {stream: StreamOutput}, no gradient, zeros for weight 0.

        Args:
            inputs: UnlearnBatch.
            streams: names, which `reference_readings` gives `LOGPS`.
        Raises:
            ValueError: a stream that `reference_readings` does not name.
        """
        readings = self._frozen_reference.readings if self._frozen_reference else {}
        unread = [name for name in streams if self.runs(name) and readings.get(name) is not LOGPS]
        if unread:
            raise ValueError(f"reference_readings of {type(self).__name__} does not give {unread[0]} the reading LOGPS")
        found = self._ask_reference(inputs)
        return {
            name: StreamOutput.of(inputs[name], found[name]) if name in found else StreamOutput.blank(inputs[name])
            for name in streams
        }

    def reference_states(self, inputs):
        """Return {stream: {layer: (B, T-1, D)}}: the reference's own states of the tokens, 0 where one does not count.

        Only streams with a reading of `reference.states_at`, and only those that run now.
        """
        found = {}
        for name, values in self._ask_reference(inputs).items():
            layers = self._frozen_reference.readings[name].layers
            mask = counted_positions(inputs[name])
            for number, layer in enumerate(layers):
                spread = values.new_zeros(*mask.shape, values.shape[-1])
                spread[mask] = values[:, number]
                found.setdefault(name, {})[layer] = spread
        return found

    def retain_term(self, outputs, inputs):
        """Return the retain values (B, T) that `--retain_loss` asks for, or None where no retain term runs now."""
        if "retain" not in outputs or not self.runs("retain"):
            return None
        kind, output = self.retain_loss_for(self.args), outputs["retain"]
        if kind in STATE_DISTANCES:
            held = self.reference_states(inputs)["retain"]
            return self.layer_mean(output, lambda layer, hidden: STATE_DISTANCES[kind](hidden, held[layer]))
        return output.kl if kind == "kl" else nll(output.logps)

    def layer_mean(self, output, values_of):
        """Return the mean of values (B, T) over the layers that the losses read, or None where the stream did not run.

        Args:
            output: StreamOutput of a forward with `layers`.
            values_of: function of (layer, its states (B, T, D)).
        """
        layers = self.layers_for(self.args)
        if not output.hidden:
            return None
        return sum(values_of(layer, output.hidden[layer]) for layer in layers) / len(layers)

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
        own = {name: divisors(output.counts()) for name, output in outputs.items()}
        items = own if standalone else num_items_in_batch
        loss, self._asked = 0.0, (None, None)
        for name, values in terms.items():
            if values is None or not self.runs(name):
                continue
            total, column = outputs[name].summed(values)
            divisor = items[name][column]
            self._log_term(name, total.detach() / divisor, standalone)
            if self.pooled:
                divisor = sum(items[other][column] for other, given in terms.items() if given is not None)
            loss = loss + self.weight_of(name) * total / divisor
        for part in self.regularizers:
            if part.in_loss and self.runs(part.stream):
                output = outputs[part.stream]
                total, column = output.summed(part.values(output, standalone))
                self._log_term(part.name, total.detach() / items[part.stream][column], standalone)
                loss = loss + part.weight() * total / items[part.stream][column]
        if self._anchor is not None:
            loss, self._anchor = loss + self._anchor, None
        loss = loss * (1 if standalone else self.accelerator.num_processes)
        self._require_finite(loss)
        return (loss, outputs) if return_outputs else loss

    # ---- The Trainer's own hooks ----

    def train(self, resume_from_checkpoint=None, **kwargs):
        """Ask a cached reference while the model is still what it was, then train; see CheckpointedTrainer.train."""
        if self._frozen_reference is not None and self.train_dataset is not None:
            self._frozen_reference.prepare()
        with contextlib.ExitStack() as stack:
            # The mask last: it has the last word on every gradient.
            for part in (*self.regularizers, *([self.weight_mask] if self.weight_mask else [])):
                stack.enter_context(part.attached())
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
            names = [name if "/" in name else f"loss/{name}" for name in self._term_sums]
            logs.update({name: mean.item() for name, mean in zip(names, means, strict=True)})
            self.reset_terms(self.state.global_step)
        super().log(logs, start_time)

    def reset_terms(self, step):
        """Start the averages of the logged terms anew at a step."""
        self._term_sums, self._terms_since = {}, step

    # ---- Private ----

    def _ask_reference(self, inputs):
        """Return {stream: values} of the reference on a batch, asked in one forward and once for all who want it."""
        if self._asked[0] is not inputs:
            readings = self._frozen_reference.readings if self._frozen_reference else {}
            streams = [name for name in readings if name in inputs and self.runs(name)]
            self._asked = inputs, self._frozen_reference.values(inputs, streams) if streams else {}
        return self._asked[1]

    def _log_term(self, name, value, standalone):
        if not standalone and self.model.training and not self.is_probing:
            self._term_sums[name] = self._term_sums.get(name, 0.0) + value.to(wide_dtype(value.device))

    def _require_finite(self, loss):
        if not torch.isfinite(self.accelerator.reduce(loss.detach().clone(), "sum")):
            raise NonFiniteError(self.non_finite_message("the loss"))
