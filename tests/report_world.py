"""Records of invented runs for tests of the report, and its page, parsed strictly."""

import json
from html.parser import HTMLParser

from llm_unlearn.cli.report import main

VOID = {"meta", "link", "br", "wbr"}
NASTY = "<script>alert('x')</script> & \"q\" $x^2$"


class Element:
    """A node of the parsed page: tag, attributes, and children that are Elements or text."""

    def __init__(self, tag, attributes=(), parent=None):
        self.tag, self.attributes, self.parent, self.children = tag, dict(attributes), parent, []

    def __getitem__(self, name):
        return self.attributes[name]

    def get(self, name, default=""):
        return self.attributes.get(name) or default

    def all(self, tag=None, **attributes):
        """Return the descendants with a tag and attributes; class_ is one of the classes."""
        class_ = attributes.pop("class_", None)
        found = []
        for child in self.children:
            if isinstance(child, Element):
                is_wanted = tag in (None, child.tag) and all(
                    child.get(key) == value for key, value in attributes.items()
                )
                if is_wanted and (class_ is None or class_ in child.get("class").split()):
                    found.append(child)
                found += child.all(tag, **attributes, **({"class_": class_} if class_ else {}))
        return found

    def one(self, tag=None, **attributes):
        (found,) = self.all(tag, **attributes)
        return found

    @property
    def raw(self):
        return "".join(child if isinstance(child, str) else child.raw for child in self.children)

    @property
    def text(self):
        return " ".join(self.raw.split())


class Page(HTMLParser):
    """Parses HTML strictly: a tag that is closed out of order fails the test."""

    def __init__(self, html):
        super().__init__()
        self.html = html
        self.root = self.at = Element("")
        self.feed(html)
        assert self.at is self.root, f"<{self.at.tag}> is not closed"

    def handle_starttag(self, tag, attrs):
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"<{tag}> repeats an attribute"
        element = Element(tag, attrs, self.at)
        self.at.children.append(element)
        if tag not in VOID:
            self.at = element

    def handle_endtag(self, tag):
        assert self.at.tag == tag, f"</{tag}> closes <{self.at.tag}>"
        self.at = self.at.parent

    def handle_data(self, data):
        self.at.children.append(data)

    def columns(self, table="domain-0-glance"):
        """Return the names of the runs at the head of a table."""
        return [head.one("span", class_="run-name").text for head in self.root.one(id=table).all("th", class_="run")]

    def row(self, metric, table="domain-0-glance"):
        """Return {run: cell} of a metric."""
        row = self.root.one(id=table).one("tr", **{"data-metric": metric})
        cells = [cell for cell in row.all("td") if "way" not in cell.get("class").split()]
        return dict(zip(self.columns(table), cells, strict=True))

    def values(self, metric, table="domain-0-glance"):
        """Return {run: number as shown} of a metric."""
        return {run: cell.one("span", class_="value").text for run, cell in self.row(metric, table).items()}

    def marks(self, metric, table="domain-0-glance"):
        """Return {run: "best" or "tied"} of the marked cells of a metric."""
        return {run: cell["data-mark"] for run, cell in self.row(metric, table).items() if cell.get("data-mark")}

    def points(self, plot):
        return [
            group["id"] for group in self.root.one(id=plot).all("g") if group.get("id").startswith(f"{plot}-point-")
        ]

    def lines(self, panel):
        return [
            group["id"] for group in self.root.one(id=panel).all("g") if group.get("id").startswith(f"{panel}-line-")
        ]


def metric(value, stderr=0.01, direction="lower", **others):
    return {"value": value, "stderr": stderr, "n": 400, "direction": direction, **others}


def forget_and_retain(forget, retain, stderr=0.01):
    return {
        "forget/probability": metric(forget, stderr),
        "retain/probability": metric(retain, stderr, "higher"),
        "holdout/probability": metric(0.03, stderr, "none"),
    }


def split(rows, letters):
    return {"rows": rows, "sha256": letters * 32, "origins": [{"source": "hub:tofu", "rows": rows}]}


SPLITS = {"forget": split(400, "ab"), "retain": split(400, "cd")}


def write_result(folder, model, metrics, **others):
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "schema_version": 1,
        "kind": "eval",
        "domain": "tofu",
        "model": str(model),
        "command": f"python run_eval.py --model_name_or_path {model}",
        "versions": {"torch": "2.13.0"},
        "fingerprints": {"weights": f"weights of {model}", "tokenizer": "t", "questions": "q"},
        "definitions": {"version": 1, "legacy": False},
        "splits": SPLITS,
        "metrics": metrics,
        "counters": {"model_calls": 21, "token_forwards": 3300, "distinct_tokens": 3000, "wall_seconds": 12.5},
    }
    (folder / "results.json").write_text(json.dumps({**record, **others}), encoding="utf-8")


def write_training(folder, method="npo", start="somewhere/target", history=None, **flags):
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "schema_version": 1,
        "kind": "unlearning",
        "method": method,
        "start_model": str(start),
        "command": f"python run_unlearn.py --unlearn_method {method}",
        "flags": {"learning_rate": 1e-5, "output_dir": str(folder), "hub_token": "secret", **flags},
        "streams": {"forget": {"rows": 40, "tokens": 384, "sha256": "cd" * 32}},
        "wall_seconds": 75.0,
        "peak_memory_bytes": 3 * 2**30,
        "optimizer_steps": 50,
    }
    (folder / "unlearning.json").write_text(json.dumps(record), encoding="utf-8")
    if history is None:
        history = [{"step": s, "loss": 2 / s, "loss/forget": 1 / s, "loss/retain": 1 / s} for s in range(1, 6)]
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}), encoding="utf-8")


def report(tmp_path, *folders, title=None):
    """Write the report of some folders; returns the parsed Page."""
    output = tmp_path / "page" / "report.html"
    words = [str(folder) for folder in folders or [tmp_path / "runs"]]
    assert main([*words, "--output", str(output), *(["--title", title] if title else [])]) == 0
    return Page(output.read_text(encoding="utf-8"))
