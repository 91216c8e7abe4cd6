"""Linear probes by layer: do a model's hidden states still tell the forgotten answers from others?"""
# Shapes: n examples, D hidden size, L decoder layers, F folds.
# Depth 0 is what the embeddings hand on, depth l + 1 what decoder layer l does.

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from llm_unlearn.attacks.answer_states import answer_means, each_depth, row_means, segment_means
from llm_unlearn.errors import UserError
from llm_unlearn.evaluation.mia import load_groups, units_of
from llm_unlearn.evaluation.packing import Sequence
from llm_unlearn.evaluation.scores import LOWER, NONE, Metric
from llm_unlearn.evaluation.token_statistics import ScoringHead

NUM_FOLDS = 5
FEWEST_GROUPS = 4
SEED = 0
"""Of folds and shuffled labels: fixed, so that two models are probed on the same ones."""
_CHANCE = 0.5


@dataclass
class ProbeTask:
    """Examples that a probe has to tell apart.

    Attributes:
        examples: for each example the list of Sequence; its state is the mean over where their scored tokens are
            predicted.
        labels: (n,) 1 for true answers or members, 0 for wrong answers or non-members.
        groups: (n,) number of the row; the examples of a row are never in training and test at once.
        is_matched: whether each row has one true answer among wrong ones to the same question.
    """

    examples: list
    labels: np.ndarray
    groups: np.ndarray
    is_matched: bool

    @property
    def sequences(self):
        """Every Sequence of every example."""
        return [sequence for example in self.examples for sequence in example]


def truth_task(rows, eos_id=None):
    """Return the ProbeTask of true and wrong answers to the same questions, or None where too few rows have both.

    The state of an answer is that of its last token before the end of the sequence, which has read all of it. Where
    answers end alike, with a period say, the embeddings know nothing of them, so that what a probe finds in a layer was
    put there by the layers below.

    Args:
        rows: list of AuditedRow; of rows that ask the same, the first counts.
        eos_id: end-of-sequence token.
    """
    examples, labels, groups, asked = [], [], [], set()
    for row in (row for row in rows if row.true is not None and row.wrong):
        # No question is in training and test at once, under whatever number.
        if row.true.prefix in asked:
            continue
        offered = [row.true, *row.wrong]
        examples += [[ending(sequence, eos_id)] for sequence in offered]
        labels += [1] + [0] * len(row.wrong)
        groups += [len(asked)] * len(offered)
        asked.add(row.true.prefix)
    if len(asked) < FEWEST_GROUPS:
        return None
    return ProbeTask(examples, np.array(labels), np.array(groups), True)


def ending(sequence, eos_id=None):
    """Return the Sequence of which nothing is read but the state of a sequence's last token before its end.

    Args:
        sequence: packing.Sequence.
        eos_id: token that does not count as the last one.
    """
    ids = sequence.ids[:-1] if len(sequence.ids) > 1 and sequence.ids[-1] == eos_id else sequence.ids
    # A state is read where it predicts; the token that it would predict is never run.
    return Sequence((*ids, 0), (len(ids),))


def member_task(members, others):
    """Return the ProbeTask of forget rows and rows that the model never saw, or None where there are too few.

    The state of a row is the mean over its answer, or over its whole text. The two sets may differ in more than who saw
    them: what their words alone tell is read off the embeddings (layer -1), and off a gold model.

    Of rows that are equal, the first counts, so that none is in training and test at once.

    Args:
        members: for each forget row its list of Sequence.
        others: the same of the holdout.
    """
    members, others = _distinct(members), _distinct(others)
    if min(len(members), len(others)) < FEWEST_GROUPS:
        return None
    labels = np.array([1] * len(members) + [0] * len(others))
    return ProbeTask([*members, *others], labels, np.arange(len(labels)), False)


def _distinct(rows):
    first = {}
    for row in rows:
        first.setdefault(tuple(sequence.key for sequence in row), row)
    return list(first.values())


def members_and_others(data, tokenizer, options):
    """Return the sequences of each member and of each non-member, those that run_mia.py compares.

    Args:
        data: DataFlags.
        tokenizer: a transformers tokenizer.
        options: TokenizeOptions.
    Raises:
        UserError: the domain has no non-members.
    """
    found = {"members": {}, "non_members": {}}
    for unit in units_of(load_groups(data), tokenizer, options, False):
        found[unit.group].setdefault(unit.index, []).append(unit.sequence)
    return tuple(list(rows.values()) for rows in found.values())


def pooled_states(model, task, bounds):
    """Return (L + 1, n, D) float32: the state of each example at each depth.

    Args:
        model: a causal language model on its device, unwrapped, in eval mode.
        task: ProbeTask.
        bounds: Bounds.
    """
    head = ScoringHead(model)

    def read(batch, counts):
        found = {}

        def pool(depth, states):
            found[depth] = segment_means(states, counts)

        with each_depth(model, batch, pool):
            head(batch)
        return torch.stack([found[depth] for depth in sorted(found)], 1)

    means = answer_means(model, task.sequences, read, bounds, "probe")
    return row_means(means, task.examples).astype(np.float32).swapaxes(0, 1)


@dataclass
class ProbeFit:
    """How well linear probes do on rows that they did not train on.

    Attributes:
        accuracy: (L + 1, F) balanced accuracy of each fold; chance is 1/2.
        auc: (L + 1, F) area under the ROC curve.
        control: (L + 1, F) balanced accuracy where the labels were shuffled.
        num_rows: groups that it rests on.
    """

    accuracy: np.ndarray
    auc: np.ndarray
    control: np.ndarray
    num_rows: int


def fit_probes(states, task):
    """Cross-validate a linear probe at each depth; the depths are shared out over the processes.

    The probe is a logistic regression with classes weighted alike, on states standardized over the training rows and
    divided by sqrt(D):

        min_w,b  sum_i c_i * log(1 + exp(-y_i * (w^T x_i + b))) + ||w||^2 / 2

    Where a row offers true and wrong answers, the mean over its answers is first taken off each: what belongs to the
    question goes, what tells its answers apart stays, and no label is used. The control trains and tests on labels
    shuffled inside each row, or over all rows where they are members and non-members.

    Args:
        states: (L + 1, n, D) of `pooled_states`.
        task: ProbeTask.
    Returns:
        ProbeFit.
    Source: Alain and Bengio 2016, arXiv:1610.01644; the control task as in Hewitt and Liang 2019, arXiv:1909.03368;
        the mean of a question's answers taken off as in Burns et al. 2022, arXiv:2212.03827.
    """
    state, found = PartialState(), {}
    for depth in range(state.process_index, len(states), state.num_processes):
        values = _centered(states[depth], task.groups) if task.is_matched else states[depth]
        own = _cross_validate(values, task.labels, task.groups)
        shuffled = _shuffled(task, np.random.default_rng([SEED, depth]))
        found[depth] = (*own, _cross_validate(values, shuffled, task.groups)[0])
    found = {depth: row for part in gather_object([found]) for depth, row in part.items()}
    accuracy, auc, control = (np.array([found[depth][number] for depth in sorted(found)]) for number in range(3))
    return ProbeFit(accuracy, auc, control, len(np.unique(task.groups)))


def _centered(states, groups):
    _, numbers, counts = np.unique(groups, return_inverse=True, return_counts=True)
    sums = np.zeros((len(counts), states.shape[1]))
    np.add.at(sums, numbers, states)
    return (states - (sums / counts[:, None])[numbers]).astype(np.float32)


def _shuffled(task, generator):
    if not task.is_matched:
        return generator.permutation(task.labels)
    labels = task.labels.copy()
    for group in np.unique(task.groups):
        inside = task.groups == group
        labels[inside] = generator.permutation(labels[inside])
    return labels


def _cross_validate(states, labels, groups):
    """Return (balanced accuracies, AUCs) of the folds."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import balanced_accuracy_score, roc_auc_score
    from sklearn.model_selection import StratifiedGroupKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import FunctionTransformer, StandardScaler

    num_folds = min(NUM_FOLDS, *(len(np.unique(groups[labels == label])) for label in (0, 1)))
    folds = StratifiedGroupKFold(num_folds, shuffle=True, random_state=SEED)
    accuracies, aucs, scale = [], [], states.shape[1] ** -0.5
    for train, test in folds.split(states, labels, groups):
        shrink = FunctionTransformer(lambda values: values * scale)
        probe = make_pipeline(StandardScaler(), shrink, LogisticRegression(class_weight="balanced", max_iter=1000))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # A fold of one class, or a fit that stops early, scores as it does.
            probe.fit(states[train], labels[train])
            accuracies.append(balanced_accuracy_score(labels[test], probe.predict(states[test])))
            aucs.append(_auc(roc_auc_score, labels[test], probe.decision_function(states[test])))
    return accuracies, aucs


def _auc(score, labels, values):
    return score(labels, values) if 0 < labels.sum() < len(labels) else _CHANCE


def fold_error(values):
    """Return the standard error of a mean over folds (..., F), None for one fold.

    The folds share training rows, so that it is a guide and no bound.
    """
    folds = values.shape[-1]
    return None if folds < 2 else values.std(-1, ddof=1) / folds**0.5


def probe_metrics(fit):
    """Return the metrics of a ProbeFit.

    `probe/forget_best_accuracy` is the accuracy at the layer where it is largest, `probe/forget_mean_accuracy` the mean
    over decoder layers, `probe/input_accuracy` that of the embeddings, which is what the words alone tell, and
    `probe/control_accuracy` the mean where the labels were shuffled: 1/2 but for chance.

    Args:
        fit: ProbeFit.
    """
    layers = fit.accuracy[1:]
    best = int(layers.mean(1).argmax())

    def metric(values, direction):
        stderr = fold_error(values)
        return Metric(float(values.mean()), None if stderr is None else float(stderr), fit.num_rows, direction)

    return {
        "probe/forget_best_accuracy": metric(layers[best], LOWER),
        "probe/forget_mean_accuracy": metric(layers.mean(0), LOWER),
        "probe/input_accuracy": metric(fit.accuracy[0], NONE),
        "probe/control_accuracy": metric(fit.control.mean(0), NONE),
    }


def task_of(rows, data, tokenizer, options):
    """Return (ProbeTask, None), or (None, why there is none): true against wrong answers, else members against others.

    Args:
        rows: list of AuditedRow.
        data, tokenizer, options: see `members_and_others`.
    """
    task = truth_task(rows, tokenizer.eos_token_id)
    if task is not None:
        return task, None
    why = f"fewer than {FEWEST_GROUPS} forget rows have wrong answers"
    try:
        groups = members_and_others(data, tokenizer, options)
    except UserError as error:
        return None, f"{why}, and they cannot be compared with rows that the model never saw: {error}"
    task = member_task(*groups)
    return task, None if task else f"{why}, and fewer than {FEWEST_GROUPS} are there to compare with holdout rows"
