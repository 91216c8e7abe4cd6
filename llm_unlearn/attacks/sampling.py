"""Many samples of many prompts in one batch; what a sample is depends on its prompt, its number and the seed alone."""
# Shapes: R live rows, V vocabulary.

import hashlib
from dataclasses import dataclass

import torch
from transformers import LogitsProcessorList

from llm_unlearn.evaluation.generation import Generator, Prompt

DRAWS = 1
"""Version of how samples are drawn, part of their names: stored samples of another are not used."""


@dataclass(frozen=True)
class SampledPrompt(Prompt):
    """One sample that is asked for.

    Attributes:
        sample: its number among the samples of the prompt.
        settings: what else it depends on: `DRAWS`, temperature, top_p and seed.
    """

    sample: int = 0
    settings: tuple = ()

    @property
    def key(self):
        """What this sample is called in a store; the samples of one prompt stand beside each other when sorted."""
        return f"{super().key}-{self.settings!r}-{self.sample:06d}"


def choose(logits, uniforms, temperature=1.0, top_p=1.0):
    """Draw one token a row by inverting the cumulative distribution.

        p = softmax(logits / temperature), restricted to the fewest tokens whose sum reaches top_p
        token = min {v : p_0 + ... + p_v > u * sum(p)}

    Args:
        logits: (R, V).
        uniforms: (R,) float64 in [0, 1).
        temperature: > 0.
        top_p: in (0, 1]; 1 keeps every token.
    Returns:
        (R,) token ids; one of probability 0 is never drawn.
    Source: top-p, Holtzman et al. 2020, arXiv:1904.09751.
    """
    probabilities = (logits.float() / temperature).softmax(-1)
    if top_p < 1:
        ordered, order = probabilities.sort(-1, descending=True)
        before = ordered.cumsum(-1) - ordered
        probabilities = probabilities.masked_fill(
            torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= top_p), 0.0
        )
    # Apple's devices have no float64.
    precision = torch.float32 if logits.device.type == "mps" else torch.float64
    sums = probabilities.cumsum(-1, dtype=precision)
    wanted = uniforms.to(logits.device, precision).unsqueeze(-1) * sums[:, -1:]
    # Rounding in float32 may lift u up to the sum, beyond which there is no token.
    last = probabilities.shape[-1] - 1 - (probabilities > 0).flip(-1).int().argmax(-1)
    return torch.searchsorted(sums, wanted, right=True).squeeze(-1).minimum(last)


class Sampler(Generator):
    """Draws samples under one model, each distinct one once, sharded over the processes.

    Each sample has a torch.Generator of its own, seeded by prompt, number and seed, from which it draws one uniform
    number a token: neither the batch nor the number of processes matters, up to the rounding of the logits. Prompts are
    read once for all their samples, samples that ended leave the batch, loops are decoded to their end.

    Args:
        model, tokenizer, pad_id, folder: as for Generator.
        temperature: > 0.
        top_p: in (0, 1].
        seed: of all samples.
        **bounds: as for Generator: max_tokens, max_sequences, lockstep, progress.
    """

    kind, activity = "samples", "sampling"

    def __init__(self, model, tokenizer, pad_id, folder=None, temperature=1.0, top_p=1.0, seed=0, **bounds):
        super().__init__(model, tokenizer, pad_id, folder, cap_loops=False, **bounds)
        self.temperature, self.top_p, self.seed = temperature, top_p, seed

    def sample(self, prompts, num_samples):
        """Draw samples; all processes call together and all get all results.

        Args:
            prompts: list of Prompt, repetitions allowed, which get the same samples.
            num_samples: of each prompt.
        Returns:
            list of lists of Generation, in the order of the prompts and of the samples.
        """
        settings = (DRAWS, float(self.temperature), float(self.top_p), int(self.seed))
        asked = [
            SampledPrompt(prompt.ids, prompt.max_new_tokens, prompt.stop, number, settings)
            for prompt in prompts
            for number in range(num_samples)
        ]
        found = self.generate(asked)
        return [found[start : start + num_samples] for start in range(0, len(found), num_samples)]

    def _row(self, prompt):
        row = super()._row(prompt)
        digest = hashlib.sha256(prompt.key.encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        row.uniforms = torch.rand(max(row.room, 1), generator=generator, dtype=torch.float64).tolist()
        return row

    def _choose(self, logits, rows):
        # A row that is done rides along for a moment, beyond its last number.
        uniforms = [row.uniforms[min(row.decoded, len(row.uniforms) - 1)] for row in rows]
        uniforms = torch.tensor(uniforms, dtype=torch.float64)
        return choose(logits, uniforms, self.temperature, self.top_p)

    def _processors(self, rows):
        steps = 0

        def only_chosen(_, scores):
            nonlocal steps
            uniforms = [row.uniforms[min(steps, len(row.uniforms) - 1)] for row in rows]
            steps += 1
            chosen = choose(scores, torch.tensor(uniforms, dtype=torch.float64), self.temperature, self.top_p)
            return torch.full_like(scores, -torch.inf).scatter(-1, chosen.unsqueeze(-1), 0.0)

        return LogitsProcessorList([only_chosen])
