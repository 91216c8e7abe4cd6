"""A method whose losses end below the model's last layer, for tests: forget states shrink, retain ones grow.

--unlearn_method layer_method:ShrinkTrainer, with this folder on the path.
"""

from dataclasses import dataclass

from llm_unlearn.arguments import flag
from llm_unlearn.trainer import UnlearnTrainer
from llm_unlearn.training_arguments import RetainArguments


@dataclass
class ShrinkArguments(RetainArguments):
    """Arguments of the test's method."""

    layer: int = flag(0, "The layer that the losses read.")


class ShrinkTrainer(UnlearnTrainer):
    """Shrink the forget states of one layer, and grow the retain states."""

    args_class = ShrinkArguments
    streams = ("forget", "retain")

    def last_layer_for(self, args):
        """Nothing is read above the layer."""
        return args.layer

    def trained_parameters_for(self, args):
        """One matrix of that layer."""
        return [f"*layers.{args.layer}.mlp.down_proj.weight"]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean square of the counted tokens' own states."""
        outputs = self.forward(model, inputs, layers=[self.args.layer])
        means = {name: output.hidden[self.args.layer].square().mean(-1) for name, output in outputs.items()}
        terms = {**means, "retain": -means["retain"]}
        return self.total_loss(terms, outputs, return_outputs, num_items_in_batch)
