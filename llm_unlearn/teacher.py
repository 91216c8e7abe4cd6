"""A frozen teacher: another checkpoint, asked for what its layers hand on, beside the model that trains."""
# Shapes: B sequences, T tokens, D hidden size of the model that trains, E of the teacher.

import logging

import torch

from llm_unlearn.activations import capture_layers, run_without_head
from llm_unlearn.affine import AffineMaps, identity
from llm_unlearn.decoder import decoder_layers
from llm_unlearn.errors import UserError
from llm_unlearn.head import own_states
from llm_unlearn.models import LOADED_WITH, check_vocabulary, load_model, load_tokenizer
from llm_unlearn.reference import frozen_as_policy

logger = logging.getLogger(__name__)


class FrozenTeacher:
    """Another checkpoint without its upper layers and its head, sharded as the policy is under FSDP2 and ZeRO-3.

    It is loaded like the policy, in its precision, and read in the precision of the policy's forward.

    Attributes:
        facts: what unlearning.json says of it: {"name", "revision", "fingerprint", "affine_map", "layers"}.

    Args:
        trainer: UnlearnTrainer whose model is loaded, and not wrapped yet.
        name: folder of the teacher, or its name on the Hub.
        revision: branch, tag or commit on the Hub.
        layers: decoder layers that are read, counted from 0, in both models.
        affine_map: folder, or name on the Hub, of maps from the teacher's states to the policy's; None takes them as
            they are.
    Raises:
        UserError: a teacher with another tokenizer, another hidden size and no map, too few layers, or a map of other
            models.
    """

    def __init__(self, trainer, name, revision, layers, affine_map=None):
        self.trainer, self.layers = trainer, tuple(layers)
        policy = trainer.reader.language_model
        loaded_with = getattr(policy, LOADED_WITH, {})
        hub = {key: loaded_with[key] for key in ("cache_dir", "token", "trust_remote_code") if loaded_with.get(key)}
        if hub.get("trust_remote_code") and revision is None:
            raise UserError(
                "--trust_remote_code True runs the teacher's code too; pin it with --teacher_revision COMMIT"
            )
        if trainer.processing_class is not None:
            require_same_tokenizer(load_tokenizer(name, revision=revision, **hub), trainer.processing_class, name)
        # Read once, because the files of a large model take minutes to hash.
        self.facts = trainer.on_first_rank(lambda: identity(name, revision, **hub))
        self.facts |= {"affine_map": affine_map, "layers": list(self.layers)}
        self.maps = self._maps(affine_map, policy, loaded_with.get("revision"), hub)
        attention = loaded_with.get("attn_implementation")
        dtype = loaded_with.get("dtype", policy.dtype)
        model = load_model(name, dtype, revision=revision, attn_implementation=attention, **hub)
        self._check(model, name, policy)
        self.model = frozen_as_policy(trainer, model, max(self.layers))
        logger.info("the teacher is %s%s, read at %d layers", name, f" at {revision}" if revision else "", len(layers))

    @torch.no_grad()
    def states(self, stream):
        """Return {layer: (B, T-1, D)}: the teacher's own states of the tokens but the first, mapped to the policy's.

        Args:
            stream: one stream of an UnlearnBatch; all processes call together.
        """
        trainer, is_plain = self.trainer, self.trainer.zero_stage() != 3
        with trainer.reference_autocast(is_plain), capture_layers(self.model, self.layers) as states:
            run_without_head(self.model, stream["input_ids"], stream["attention_mask"])
        states = {layer: own_states(hidden) for layer, hidden in states.items()}
        if self.maps is None:
            return states
        # The maps are plain, and in float32 like the states that they lead to unless the forward is in bfloat16.
        with trainer.reference_autocast(is_plain_module=True):
            return {layer: self.maps(layer, hidden.float()) for layer, hidden in states.items()}

    def _maps(self, place, policy, revision, hub):
        if place is None:
            return None
        trainer, source = self.trainer, policy.config._name_or_path
        maps = AffineMaps.load(place, hub.get("cache_dir"), hub.get("token")).only(self.layers)
        target = trainer.on_first_rank(lambda: identity(source, revision, **hub) if source else None)
        maps.require_models(self.facts, target)
        return maps.to(trainer.args.device)

    def _check(self, model, name, policy):
        depth = len(decoder_layers(model))
        if max(self.layers) >= depth:
            raise UserError(
                f"--layers reads layer {max(self.layers)}, but the teacher '{name}' has layers 0 to {depth - 1}"
            )
        size, own_size = (found.config.get_text_config(decoder=True).hidden_size for found in (model, policy))
        if self.maps is None and size != own_size:
            raise UserError(
                f"the hidden states of the teacher '{name}' have size {size}, those of the model {own_size}; pass "
                "--affine_map FOLDER with maps between them, as utils/fit_affine_map.py writes them"
            )
        if self.maps is not None and self.maps.sizes != (size, own_size):
            raise UserError(
                f"the affine map '{self.maps.place}' leads from size {self.maps.sizes[0]} to {self.maps.sizes[1]}, but "
                f"the teacher's states have size {size} and the model's {own_size}"
            )
        if self.trainer.processing_class is not None:
            check_vocabulary(model, self.trainer.processing_class)


def require_same_tokenizer(theirs, ours, name):
    """Refuse a teacher whose token ids mean something else.

    Args:
        theirs: tokenizer of the teacher.
        ours: of the model that trains.
        name: of the teacher.
    Raises:
        UserError: naming a token that differs.
    """
    found, expected = theirs.get_vocab(), ours.get_vocab()
    if found != expected:
        token = min(token for token in {*found, *expected} if found.get(token) != expected.get(token))
        raise UserError(
            f"the teacher '{name}' has another tokenizer: {token!r} is {_numbered(found.get(token))} there and "
            f"{_numbered(expected.get(token))} in the model's; pass a checkpoint of the same family"
        )


def _numbered(number):
    return "no token" if number is None else f"token {number}"
