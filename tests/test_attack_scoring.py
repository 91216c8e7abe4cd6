"""What an attack's evaluations are cut to, from questions whose tokens are counted by hand."""

import pytest

from llm_unlearn.attacks.scoring import DomainScorer
from llm_unlearn.evaluation.packing import Sequence
from llm_unlearn.evaluation.questions import Part, Question


@pytest.fixture
def scorer():
    """Five rows to forget of 10 tokens each, and three to keep, of which each has two answers of 5."""
    made = DomainScorer.__new__(DomainScorer)
    made.parts, made.questions = [], []
    for name, role, count, lengths in (("forget", "forget", 5, (10,)), ("retain", "retain", 3, (5, 5))):
        part = Part(
            name, [{"question": f"{name} {n}?", "answer": "a"} for n in range(count)], role, sha256=f"{name} all"
        )
        made.parts.append(part)
        sequences = {"answer": [Sequence(tuple(range(length)), (length - 1,)) for length in lengths]}
        made.questions += [Question(part, n, row, "qa", dict(sequences)) for n, row in enumerate(part.rows)]
    return made


def asked(scorer):
    """Return {set: numbers of the rows that are asked about}, by the part that a suite looks them up with."""
    return {part.name: [q.index for q in scorer.questions if q.part is part] for part in scorer.parts}


@pytest.mark.parametrize(
    ("num_tokens", "least", "cut", "left"),
    [
        (80, 1, {}, (5, 3)),
        (79, 1, {"forget": 4}, (4, 3)),  # four rows of ten and three of ten are 70
        (69, 1, {"forget": 3}, (3, 3)),
        (59, 1, {"forget": 2, "retain": 2}, (2, 2)),
        (0, 2, {"forget": 2, "retain": 2}, (2, 2)),
        (0, 4, {"forget": 4}, (4, 3)),
        (0, 9, {}, (5, 3)),
    ],
)
def test_the_first_rows_of_each_set_are_kept(scorer, num_tokens, least, cut, left):
    assert scorer.keep_within(num_tokens, least) == cut
    assert asked(scorer) == {"forget": list(range(left[0])), "retain": list(range(left[1]))}
    for part in scorer.parts:
        assert len(part.rows) == len(asked(scorer)[part.name])
        assert (part.sha256 == f"{part.name} all") == (part.name not in cut)
