"""The table of contents of the project: every unlearning method, by id."""

import ast
import importlib
import importlib.util
from pathlib import Path

from llm_unlearn.errors import UserError, unknown_name

METHODS = {
    "gradient_ascent": "llm_unlearn.methods.gradient_ascent:GradientAscentTrainer",
    "random_label": "llm_unlearn.methods.random_label:RandomLabelTrainer",
    "ascent_plus_descent": "llm_unlearn.methods.ascent_plus:AscentPlusDescentTrainer",
    "ascent_plus_kl_divergence": "llm_unlearn.methods.ascent_plus:AscentPlusKLDivergenceTrainer",
    "grad_diff": "llm_unlearn.methods.grad_diff:GradDiffTrainer",
    "npo": "llm_unlearn.methods.npo:NPOTrainer",
    "simnpo": "llm_unlearn.methods.simnpo:SimNPOTrainer",
    "rmu": "llm_unlearn.methods.rmu:RMUTrainer",
    "circuit_breakers": "llm_unlearn.methods.circuit_breakers:CircuitBreakersTrainer",
    "tuned_lens": "llm_unlearn.methods.tuned_lens:TunedLensTrainer",
    "sequential": "llm_unlearn.methods.sequential:SequentialTrainer",
    "checkpoint_transfer": "llm_unlearn.methods.checkpoint_transfer:CheckpointTransferTrainer",
    "rewritten_transfer": "llm_unlearn.methods.rewritten_transfer:RewrittenTransferTrainer",
    "max_entropy": "llm_unlearn.methods.max_entropy:MaxEntropyTrainer",
    "max_update": "llm_unlearn.methods.max_update:MaxUpdateTrainer",
    "probe_unlearn": "llm_unlearn.methods.probe_unlearn:ProbeUnlearnTrainer",
    "po": "llm_unlearn.methods.po:POTrainer",
    "dpo": "llm_unlearn.methods.dpo:DPOTrainer",
    "idk_dpo": "llm_unlearn.methods.dpo:IdkDPOTrainer",
    "alt_po": "llm_unlearn.methods.dpo:AltPOTrainer",
    "undial": "llm_unlearn.methods.undial:UndialTrainer",
    "wga": "llm_unlearn.methods.weighted:WGATrainer",
    "satimp": "llm_unlearn.methods.weighted:SatImpTrainer",
    "ceu": "llm_unlearn.methods.weighted:CEUTrainer",
    "pdu": "llm_unlearn.methods.pdu:PDUTrainer",
    "kl": "llm_unlearn.methods.kl:KLTrainer",
    "l1_sparse": "llm_unlearn.methods.l1_sparse:L1SparseTrainer",
    "retrain": "llm_unlearn.methods.finetune:RetrainTrainer",
    "finetune": "llm_unlearn.methods.finetune:FinetuneTrainer",
}


def trainer_class(method):
    """Return the Trainer subclass of a method.

    Args:
        method: an id of METHODS, or "package.module:MyTrainer" for a method that lives elsewhere.
    Returns:
        the class, a descendant of UnlearnTrainer.
    Raises:
        UserError: if the name is unknown, or the class cannot be imported or is not an UnlearnTrainer.
    """
    target = METHODS.get(method, method if ":" in method else None)
    if target is None:
        raise unknown_name("--unlearn_method", method, METHODS)
    module, _, class_name = target.partition(":")
    if method in METHODS:
        return getattr(importlib.import_module(module), class_name)
    from llm_unlearn.trainer import UnlearnTrainer

    try:
        found = getattr(importlib.import_module(module), class_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"--unlearn_method '{method}' cannot be imported: {error}") from error
    if not (isinstance(found, type) and issubclass(found, UnlearnTrainer)):
        raise UserError(f"--unlearn_method '{method}' is not a subclass of llm_unlearn.UnlearnTrainer")
    return found


def describe(method):
    """Read a method's summary and own flags from its source file, so that `--help` imports no torch.

    Args:
        method: an id of METHODS.
    Returns:
        (first line of the class docstring, {flag: help} of the fields that its arguments class adds).
    """
    module, _, class_name = METHODS[method].partition(":")
    tree = ast.parse(Path(importlib.util.find_spec(module).origin).read_text(encoding="utf-8"))
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    summary = ast.get_docstring(classes[class_name]).splitlines()[0]
    arguments = classes.get(class_name.removesuffix("Trainer") + "Arguments")
    return summary, {} if arguments is None else _fields(arguments, classes)


def _fields(arguments, classes):
    found = {}
    for base in arguments.bases:
        if isinstance(base, ast.Name) and base.id in classes:
            found.update(_fields(classes[base.id], classes))
    for node in arguments.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Call) and len(node.value.args) > 1:
            found[node.target.id] = ast.literal_eval(node.value.args[1])
    return found
