"""What attacks leave in results.json beside their metrics, checked before anything is drawn from it."""

from llm_unlearn.report.json_files import is_finite, require


def read_payload(path, raw):
    """Check the payload of a results.json.

    Args:
        path: the file.
        raw: its contents.
    Returns:
        dict with "curves" [{"name", "settings", "rows"}], "levels" {metric: {"target": number or None}}, "strongest",
        "layers" [{"layer", ...}], "generations" [{"question", ...}], "roc" {attack: {"fpr", "tpr"}} and "intervals"
        {attack: (low, high)}; what the file does not have is empty.
    Raises:
        UserError: one of them has another shape.
    """
    strongest = raw.get("strongest")
    require(path, strongest is None or isinstance(strongest, str), f"'strongest' must be text, and is {strongest!r}")
    intervals = _mapping(path, raw, "intervals")
    for attack, ends in intervals.items():
        is_pair = isinstance(ends, list) and len(ends) == 2 and all(end is None or is_finite(end) for end in ends)
        require(path, is_pair, f"the interval of '{attack}' must be two numbers")
    return {
        "curves": [_curve(path, entry) for entry in _objects(path, raw, "curves")],
        "levels": {name: _level(path, name, entry) for name, entry in _mapping(path, raw, "levels").items()},
        "strongest": strongest or "",
        "layers": [_layer(path, entry) for entry in _objects(path, raw, "layers")],
        "generations": [_generation(path, entry) for entry in _objects(path, raw, "generations")],
        "roc": {attack: _roc(path, attack, curve) for attack, curve in _mapping(path, raw, "roc").items()},
        "intervals": intervals,
    }


def _objects(path, raw, name):
    entries = raw.get(name)
    entries = [] if entries is None else entries
    is_list = isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries)
    require(path, is_list, f"'{name}' must be a list of objects")
    return entries


def _mapping(path, raw, name):
    value = raw.get(name)
    require(path, value is None or isinstance(value, dict), f"'{name}' must be an object")
    return value or {}


def _curve(path, entry):
    name = entry.get("name")
    require(path, isinstance(name, str) and name, f"a curve's 'name' must be text, and is {name!r}")
    rows = _objects(path, entry, "rows")
    for row in rows:
        require(path, is_finite(row.get("step")), f"a row of the curve '{name}' has the step {row.get('step')!r}")
    return {"name": name, "settings": _mapping(path, entry, "settings"), "rows": rows}


def _level(path, name, entry):
    require(path, isinstance(entry, dict), f"the level of '{name}' must be an object")
    for key in ("target", "chance"):
        value = entry.get(key)
        require(path, value is None or is_finite(value), f"the {key} level of '{name}' is {value!r}, not a number")
    return entry


def _layer(path, entry):
    layer = entry.get("layer")
    is_layer = isinstance(layer, int) and not isinstance(layer, bool) and layer >= -1
    require(path, is_layer, f"a layer has the number {layer!r}; -1 is the embeddings, 0 the first layer")
    return entry


def _generation(path, entry):
    for name in ("split", "question", "answer", "greedy", "sample"):
        value = entry.get(name)
        require(path, value is None or isinstance(value, str), f"'{name}' of a generation must be text, not {value!r}")
    share = entry.get("leak_probability")
    require(path, share is None or is_finite(share), f"'leak_probability' of a generation is {share!r}, not a number")
    return entry


def _roc(path, attack, curve):
    require(path, isinstance(curve, dict), f"the ROC of '{attack}' must be an object")
    rates = [curve.get(name) for name in ("fpr", "tpr")]
    is_curve = all(isinstance(values, list) and all(map(is_finite, values)) for values in rates)
    require(
        path, is_curve and len(rates[0]) == len(rates[1]), f"the ROC of '{attack}' must be two lists alike in length"
    )
    return curve
