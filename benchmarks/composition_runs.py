"""Runs of benchmarks/composition.py: trained once, measured, and remembered."""

import json
import shlex
import sys

import torch
from unlearning_tiny import _run

from llm_unlearn.cli.unlearn import main as unlearn
from llm_unlearn.data.rows import read_rows
from llm_unlearn.data.streams import UnlearnCollator, UnlearnDataset, pad_id
from llm_unlearn.data.tokenize import TokenizeOptions, tokenize_rows
from llm_unlearn.head import StreamOutput, counted_labels, counted_states
from llm_unlearn.models import load_model, load_tokenizer
from llm_unlearn.objectives.likelihood import token_logps


class Study:
    """Trains, measures and remembers runs.

    Attributes:
        runs: dicts of the runs so far: world, name, what the tables group by, scores by place, command.
        before: {name of a world: scores of its target model}.
    """

    def __init__(self):
        self.runs, self.before, self._rows = [], {}, {}

    def place(self, world, name):
        """Return the folder of a run."""
        return world.folder / "study" / name

    def train(self, world, name, words, sets, places=("",), after=(), **fields):
        """Run run_unlearn.py once and measure what it leaves; returns the run as a dict.

        Args:
            world: World.
            name: of the run.
            words: of run_unlearn.py but for its output folder.
            sets: {name: file of rows} to measure on.
            places: folders of checkpoints in the output folder, "" the last one.
            after: words of the run that this one goes on from; where they change, it is repeated.
            **fields: what the tables group runs by.
        """
        output_dir = self.place(world, name)
        words, record = [*words, "--output_dir", str(output_dir)], output_dir.with_name(f"{name}.json")
        key = [*after, *words]
        kept = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
        if kept.get("key") != key or kept.get("sets") != sets:
            _run(
                unlearn,
                "run_unlearn.py",
                [*words, "--overwrite_output_dir", "--disable_tqdm", "True", "--use_cpu", "True"],
            )
            scores = {place: self.measure(output_dir / place, world, sets) for place in places}
            kept = {"key": key, "sets": sets, "scores": scores}
            record.write_text(json.dumps(kept) + "\n", encoding="utf-8")
        command = f"python run_unlearn.py {shlex.join(words)}"
        self.runs.append({"world": world.name, "name": name, **fields, "scores": kept["scores"], "command": command})
        sys.stderr.write(f"{world.name} {name}: {kept['scores'][places[-1]]}\n")
        return self.runs[-1]

    @torch.no_grad()
    def measure(self, folder, world, sets):
        """Return {"SET nll", "SET probability", "SET accuracy", "moved"} of a checkpoint, in evaluation mode.

        NLL is nats per answer token, accuracy the share of answer tokens that are the most likely one, probability the
        mean over rows of exp(-mean NLL of a row), and moved the share of weights that are not the target model's.

        Args:
            folder: of the checkpoint.
            world: World.
            sets: {name: file of rows}.
        """
        model, target, found = load_model(str(folder)).eval(), load_model(world.model), {}
        for name, path in sets.items():
            tokenizer, rows = self._tokenized(world, path, model.config.max_position_embeddings)
            nll, right, tokens, probability = 0.0, 0, 0, 0.0
            for first in range(0, len(rows), 16):
                batch = [rows["forget", row] for row in range(first, min(first + 16, len(rows)))]
                stream = UnlearnCollator(pad_id(tokenizer))(batch)["forget"]
                inputs = {key: stream[key] for key in ("input_ids", "attention_mask")}
                logits, labels = counted_states(model(**inputs).logits, stream), counted_labels(stream)
                logps = token_logps(logits, labels)
                nll, tokens = nll - float(logps.sum()), tokens + len(labels)
                right += int((logits.argmax(-1) == labels).sum())
                probability += float(StreamOutput.of(stream, logps).mean_logps().exp().sum())
            found |= {f"{name} nll": nll / tokens, f"{name} accuracy": right / tokens}
            found[f"{name} probability"] = probability / len(rows)
        pairs = list(zip(model.parameters(), target.parameters(), strict=True))
        moved = sum(int((one != other).sum()) for one, other in pairs)
        return {**found, "moved": moved / sum(one.numel() for one, _ in pairs)}

    def _tokenized(self, world, path, length):
        key = world.name, path
        if key not in self._rows:
            tokenizer = load_tokenizer(world.model)
            options = TokenizeOptions(model_length=length)
            # Longest last, so that rows of a batch are of like length.
            rows = sorted(
                tokenize_rows(read_rows(path), tokenizer, options, "forget"), key=lambda r: len(r["input_ids"])
            )
            self._rows[key] = tokenizer, UnlearnDataset({"forget": rows})
        return self._rows[key]
