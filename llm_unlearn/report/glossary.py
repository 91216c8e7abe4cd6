"""What the metrics of a report mean, in a sentence each, and what they are called."""

LABELS = {
    "probability_normalized": "probability among the offered",
    "paraphrase_probability": "probability of a paraphrase",
    "rouge_1_recall": "ROUGE-1 recall",
    "rouge_l_recall": "ROUGE-L recall",
    "rouge_l_f1": "ROUGE-L F1",
    "nll": "negative log-likelihood",
    "forget_quality_statistic": "forget quality, KS statistic",
    "privleak": "PrivLeak",
    "verbmem": "VerbMem",
    "knowmem": "KnowMem",
    "mcq": "multiple choice",
    "auc": "AUC",
    "tpr_at_1pct_fpr": "TPR at 1% FPR",
    "tpr_at_5pct_fpr": "TPR at 5% FPR",
    "recovered": "recovered share",
    "recovery_area": "mean recovered share",
    "best": "most reached",
    "area": "mean over the attack",
    "greedy_leak": "leak of the likeliest answer",
    "steps_to_half": "steps to recover half",
    "change": "change",
    "forget_area": "area over the layers",
    "uds": "UDS",
    "lens": "logit lens",
    "probe": "linear probe",
    "int8": "8 bit, int8",
    "int4": "4 bit, int4",
    "nf4": "4 bit, nf4",
    "fp4": "4 bit, fp4",
    "cosine": "cosine of task vectors",
}
# What an attack is called, and what it does, by the kind of its results.
ATTACKS = {
    "relearn": ("Relearning", "The model is fine-tuned on rows it was to forget."),
    "tamper": ("Tampering", "The model is fine-tuned on the attacker's data."),
    "downstream": ("Downstream fine-tuning", "The model is fine-tuned on a task that has nothing to do with it."),
    "quantize": ("Quantization", "The model is rounded to fewer bits and scored again."),
    "sampling": ("Sampling", "The model is asked many times, and in other words."),
    "white_box": ("A look inside", "Each layer is read for what the output does not say."),
    "ablate": ("Retain-term ablation", "The method is tuned and run once more without its retain term."),
}
MEANINGS = {
    "model_utility": "Harmonic mean of probability, ROUGE-L recall and truth ratio over the sets that are to be kept.",
    "forget_quality": "p-value of the test that the truth ratios on the forget set are those of the retrained model; "
    "near 1, the two cannot be told apart.",
    "forget_quality_statistic": "Largest distance between the two distributions of truth ratios; 0 where they are one.",
    "privleak": "How far a membership attack's AUC lies from that on the retrained model, in percent; 0 is ideal.",
    "overall": "Harmonic mean of memorization (1: nothing is left), privacy (1: as the retrained model) and utility.",
    "probability": "Mean over the answers of exp(mean log-probability of the answer's tokens); 1 is certainty.",
    "probability_normalized": "Probability of the true answer over that of all answers offered, true and false.",
    "paraphrase_probability": "The same as probability, of another wording of the true answer.",
    "rouge_1_recall": "Share of the true answer's words that the model's own answer has.",
    "rouge_l_recall": "Share of the true answer's words that the model's own answer has, in order.",
    "rouge_l_f1": "Words in order that the model's own answer and the true one share, of both.",
    "verbmem": "ROUGE-L F1 of the model's continuation of a text with the true one (MUSE).",
    "knowmem": "ROUGE-L F1 of the model's answers to questions about a text with the true ones (MUSE).",
    "truth_ratio": "How the model weighs false answers against a paraphrase of the true one, as TOFU defines it.",
    "extraction_strength": "Share of the text that the model completes by itself, from the shortest prefix that does.",
    "exact_memorization": "Share of tokens that the model predicts exactly from the true ones before them.",
    "secret_extraction": "Share of the secrets that the model gives away.",
    "perplexity": "exp of the mean negative log-likelihood of a token; 1 is certainty.",
    "nll": "Mean negative log-likelihood of a token, in nats.",
    "token_accuracy": "Share of tokens whose most likely prediction is the true one.",
    "choice_accuracy": "Share of multiple-choice questions answered rightly, by letter.",
    "choice_probability": "Probability of the right letter among the letters offered.",
    "cloze_accuracy": "Share of multiple-choice questions whose right answer is the likeliest as text.",
    "semantic_accuracy": "Share of the model's own answers that mean what the true ones mean.",
    "entropy": "Mean entropy of the model's predictions, in nats; 0 is certainty, right or wrong.",
    "gibberish_share": "Share of the model's own answers that are loops or noise.",
    "empty_share": "Share of the model's own answers that are empty.",
    "auc": "How well a membership attack tells forget rows from rows never seen; 0.5 is chance.",
    "tpr_at_1pct_fpr": "Members that the attack finds when 1% of the non-members are accused wrongly.",
    "tpr_at_5pct_fpr": "Members that the attack finds when 5% of the non-members are accused wrongly.",
    "balanced_accuracy": "Mean of the attack's hit rates on members and on non-members.",
    "recovered": "Share of what unlearning took away that is back after the attack: 0 as before, 1 as in the target.",
    "recovery_area": "The recovered share on average over the attack, so that early recovery counts more.",
    "steps_to_half": "Optimizer steps until half of what unlearning took away is back.",
    "best": "The highest value that the attack reached on its way.",
    "area": "Mean value over the attack, which needs no target model to be measured against.",
    "change": "Quantized minus full precision; what returns with fewer bits was hidden, not gone.",
    "leak@k": "Probability that at least one of k sampled answers holds the forgotten one.",
    "uds": "Unlearning depth: how much of what the target's activations know is gone inside; 1 is erased, 0 untouched.",
    "lens": "What the output head reads from the middle of the network, layer by layer.",
    "probe": "How well a linear classifier reads the forgotten answers from a layer.",
}
ORDER = list(MEANINGS)
# What a membership attack is measured by; their names are <attack>/<measure>, unlike <split>/<metric>.
ATTACK_MEASURES = ("auc", "tpr_at_1pct_fpr", "tpr_at_5pct_fpr", "balanced_accuracy")


def label(name):
    """Return how a metric, attack or split is called in text.

    Args:
        name: one component of a metric's name, as rouge_l_recall.
    """
    if name in LABELS:
        return LABELS[name]
    if name.startswith("leak_at_"):
        return f"leak@{name.removeprefix('leak_at_')}"
    if name.startswith("leak_lower_bound_at_"):
        return f"leak@{name.removeprefix('leak_lower_bound_at_')}, lower bound"
    if name.startswith("after_"):
        return f"after {name.removeprefix('after_')}"
    if name.startswith(("min_k_pp_", "min_k_")):
        return f"{'Min-K%++' if name.startswith('min_k_pp_') else 'Min-K%'}, K = {name.rpartition('_')[2]}"
    return name.replace("_", " ").replace("/", ", ")


def is_attack(name):
    """Return whether a metric's name is that of an attack with its measure."""
    attack, _, measure = name.rpartition("/")
    return bool(attack) and measure in ATTACK_MEASURES


def full_label(name):
    """Return the label of a metric that stands by itself: split and metric, or attack and measure."""
    first, _, last = name.rpartition("/")
    if not first:
        return label(last)
    return f"{label(first)}{' attack' if is_attack(name) else ''} \u00b7 {label(last)}"


def attack_title(attack):
    """Return what an attack is called by the label of its results: Tampering; Tampering, benign."""
    kind, _, variant = attack.partition("/")
    title = ATTACKS[kind][0] if kind in ATTACKS else kind
    return f"{title}, {variant.replace('_', ' ')}" if variant else title


def path_label(name):
    """Return the label of a metric of an attack, each part of its name in words: forget, probability, recovered share.

    Args:
        name: as forget/probability/recovered.
    """
    return " \u00b7 ".join(label(part) for part in name.split("/") if part)


def purpose(kind):
    """Return in lower case what results of a label are of: evaluation, membership inference, tampering."""
    return {"eval": "evaluation", "mia": "membership inference"}.get(kind) or attack_title(kind).lower()
