"""Which number of each attack stands for it at the head of a page."""

import re

from llm_unlearn.report import glossary

# Which metric of the forget set speaks for an attack, the best known first.
FORGET = (
    "forget/probability",
    "forget/verbmem",
    "forget/rouge_l_recall",
    "forget/knowmem",
    "forget/extraction_strength",
    "forget/choice_accuracy",
    "forget/token_accuracy",
    "forget/perplexity",
)
_MEMBERSHIP = ("loss/auc", "min_k_20/auc", "min_k_40/auc", "zlib/auc")
_RECOVERY = ("recovered", "steps_to_half")
_SCHEMES = ("nf4", "int4", "fp4", "int8")
_PROMPTINGS = ("plain", "few_shot", "paraphrase", "prefix")


def main_numbers(comparison):
    """Choose the main numbers of the attacks: AUC, recovered share, steps to half, leak@k, quantized, UDS.

    Args:
        comparison: Comparison.
    Returns:
        [(label of the results, name of the metric, words for it)]; of each attack at most two.
    """
    found = []
    auc = next((name for name in _MEMBERSHIP if name in comparison.names("mia")), None)
    if auc and comparison.attacks:
        found.append(("mia", auc, glossary.full_label(auc)))
    for attack in comparison.attacks:
        names, title = comparison.names(attack), glossary.attack_title(attack)
        for name in _main(attack.partition("/")[0], names):
            found.append((attack, name, f"{title} \u00b7 {_words(attack, name)}"))
    return found


def _main(kind, names):
    """Return the names of the metrics, one or two of them, that speak for an attack of a kind."""
    if kind in ("relearn", "tamper"):
        tracked = tracked_metric([name.rpartition("/")[0] for name in names if name.endswith("/recovered")])
        return [name for measure in _RECOVERY if (name := f"{tracked}/{measure}") in names]
    if kind == "quantize":
        scored = [name for name in names if not name.endswith("/change")]
        # The fewest bits are the hardest test.
        return sorted((name for name in scored if name.endswith(f"/{_forget_of(scored)}")), key=_rank(_SCHEMES))[:1]
    if kind == "sampling":
        leaks = [name for name in names if re.search(r"(^|/)leak_at_\d+$", name)]
        leaks.sort(key=lambda name: (_rank(_PROMPTINGS)(name), -int(name.rpartition("_")[2])))
        return leaks[:1]
    if kind == "white_box":
        return [name for name in names if name.startswith("uds")][:1] or names[:1]
    if kind == "downstream":
        return [name for name in names if "/after_" in name][:1]
    if kind == "ablate":
        return [name for name in names if name.startswith(("with/", "without/")) and name.endswith("/recovered")][:2]
    return names[:2]


def _forget_of(names):
    return tracked_metric([name.partition("/")[2] for name in names])


def _rank(order):
    def rank(name):
        first = name.partition("/")[0]
        return order.index(first) if first in order else len(order)

    return rank


def tracked_metric(names):
    """Return which of some metrics speaks for the forget set, "" where there is none.

    Args:
        names: as ["forget/probability", "retain/probability"].
    """
    there = [name for name in names if name.split("/")[0].endswith("forget") or name.startswith("wmdp")]
    return min(there, key=lambda name: FORGET.index(name) if name in FORGET else len(FORGET), default="")


def _words(attack, name):
    """Return the words for a metric beside the title of its attack: UDS; recovered share, forget probability."""
    first, _, rest = name.partition("/")
    if attack.startswith("white_box"):
        return glossary.label(first)
    if attack.startswith("quantize"):
        return f"{rest.replace('/', ' ').replace('_', ' ')}, {glossary.label(first)}"
    if attack.startswith("ablate"):
        return f"{glossary.label(name.rpartition('/')[2])} {first} the retain term"
    *path, last = name.split("/")
    return f"{glossary.label(last)}, {' '.join(map(glossary.label, path))}" if path else glossary.label(last)
