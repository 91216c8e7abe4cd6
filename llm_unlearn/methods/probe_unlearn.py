"""Unlearning against transformer probes: what they recover from hidden states says nothing about the next token."""
# Shapes: B sequences, T tokens, D hidden size, V vocabulary, L layers, N counted positions.

from dataclasses import dataclass

import torch

from llm_unlearn.arguments import flag
from llm_unlearn.errors import UserError
from llm_unlearn.head import counted_labels, counted_positions, counted_weights, scatter
from llm_unlearn.lens import TunedLens, whole_copies
from llm_unlearn.manifests import file_sha256
from llm_unlearn.models import checked_layers, loaded_fingerprint
from llm_unlearn.objectives.entropy import max_entropy
from llm_unlearn.probe import load_probes, probe_file, read_probe_config
from llm_unlearn.trainer import UnlearnTrainer
from llm_unlearn.training_arguments import RampedArguments


@dataclass
class ProbeUnlearnArguments(RampedArguments):
    """Arguments of `probe_unlearn`."""

    probe_dir: str | None = flag(
        None, "Folder of probes from utils/train_probe.py; without --layers all that are in it are used."
    )

    def __post_init__(self):
        if not self.probe_dir:
            raise UserError("--probe_dir is missing; train probes with utils/train_probe.py and pass their folder")
        super().__post_init__()


class ProbeUnlearnTrainer(UnlearnTrainer):
    """Hidden states from which a probe recovers nothing: what the head reads off it becomes uniform.

        L_t = (1/L) * sum_l (logsumexp_v z_tv - mean_v z_tv) / ln V,   z_t = head(norm(probe_l(h_l)_t))

    The probes, which map an early checkpoint's states to the final model's, the norm and the head are frozen; the
    gradient goes through the states of the whole row, which a probe attends over. 1 is the least: all tokens equally
    likely.

    Source: EleutherAI/unlearn, its history up to January 2026 (probe unlearning). Differs from the authors' code: it
        draws a random target for each token, of which this is the expectation, without the noise; it leaves out the
        final norm, which the head has always read through; it holds the retain states at all layers, not at --layers
        alone; and its layer L is what layer L - 1 hands on.
    """

    args_class = ProbeUnlearnArguments
    streams = ("forget", "retain")

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        layers, model = self.layers_for(self.args), self.reader.language_model
        self.args.layers = list(layers)
        fingerprint = self.on_first_rank(lambda: _fingerprint(model))
        size = model.config.get_text_config(decoder=True).hidden_size
        probes = load_probes(self.args.probe_dir, layers, fingerprint, size)
        self.probes = {layer: probe.to(self.args.device) for layer, probe in probes.items()}
        # Without translators it is the norm and the head as they are before training.
        self.lens = TunedLens.of(self.model, copies=lambda parts: whole_copies(parts, self))
        if self.zero_stage() != 3:
            self.on_first_rank(lambda: self.lens.require_agreement(self.model))
        if self.args.autocast_in_forward or self.accelerator.mixed_precision == "bf16":
            self.lens.narrow(torch.bfloat16)

    def layers_for(self, args):
        """Return the decoder layers whose probes are used, all of the folder's where `--layers` names none."""
        layers = args.layers or [int(layer) for layer in read_probe_config(args.probe_dir)["depths"]]
        return checked_layers(layers, self.depth)

    def run_state(self):
        """What a resumed run must share: the probes too."""
        files = [file_sha256(probe_file(self.args.probe_dir, layer)) for layer in self.probes]
        return {**super().run_state(), "probes": files}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Average both terms over the tokens of the step."""
        outputs = self.forward(model, inputs, layers=self.layers_for(self.args), scored=("retain",))
        recovered = self.layer_mean(outputs["forget"], lambda layer, hidden: self.recovered(layer, hidden, inputs))
        terms = {"forget": recovered, "retain": self.retain_term(outputs, inputs)}
        return self.total_loss(terms, outputs, return_outputs, num_items_in_batch)

    def recovered(self, layer, hidden, inputs):
        """Return (B, T-1), 1 where what a probe recovers is uniform, 0 where a token does not count.

        Args:
            layer: whose probe.
            hidden: (B, T-1, D) what the layer hands on at the forget tokens.
            inputs: UnlearnBatch.
        """
        stream = inputs["forget"]
        tokens, counted = stream["attention_mask"][:, 1:].bool(), counted_positions(stream)
        wanted = {"uniform": True, "linear": counted_weights(stream)}
        with self.reference_autocast(is_plain_module=True):
            states = self.probes[layer](hidden, tokens)[counted]
            uniform = self.lens.scores(self.lens.num_layers, states, counted_labels(stream), **wanted)[-1]
        return max_entropy(scatter(uniform, counted), len(self.lens.head_weight))


def _fingerprint(model):
    if not model.config._name_or_path:
        raise UserError("probes belong to a model by its files, but this one was not loaded from any")
    return loaded_fingerprint(model)
