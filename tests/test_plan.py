"""The plan of batches: no row twice in an epoch, and the same rows in a step however it is cut."""

import json
import math
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_unlearn.data.plan import FILLER, WINDOW_STEPS, BatchPlan, drawn_rows, permutation

QUICK = settings(deadline=None, derandomize=True, database=None, max_examples=100)
ROWS = st.integers(1, 23)
SEEDS = st.integers(0, 2**32 - 1)
EPOCHS = st.integers(0, 3)
CUT = st.integers(1, 4)


def rows_of(batches, stream):
    """Return the row numbers of one stream in order, fillers left out."""
    return [row for batch in batches for name, row in batch if name == stream and row != FILLER]


def epoch_batches(plan, epoch):
    """Return the batches of all ranks, in the order of the slots that they take."""
    return [plan.batch(epoch, number, rank) for number in range(len(plan)) for rank in range(plan.world_size)]


@QUICK
@given(ROWS, ROWS, SEEDS, EPOCHS, CUT, CUT)
def test_every_forget_row_once_an_epoch_and_fillers_for_the_rest(forget, retain, seed, epoch, batch_size, world_size):
    plan = BatchPlan({"forget": forget, "retain": retain}, seed, batch_size, world_size)
    batches = epoch_batches(plan, epoch)
    assert len(plan) == math.ceil(forget / (batch_size * world_size))
    assert sorted(rows_of(batches, "forget")) == list(range(forget))
    for batch in batches:
        assert [stream for stream, _ in batch] == ["forget"] * batch_size + ["retain"] * batch_size
        # A retain row comes with a forget row, a filler with a filler.
        kinds = [row == FILLER for _, row in batch]
        assert kinds[:batch_size] == kinds[batch_size:]
    # Fillers stand last: every rank has as many batches as any other.
    slots = [row for batch in batches for stream, row in batch if stream == "forget"]
    assert slots[forget:] == [FILLER] * (len(batches) * batch_size - forget)


@QUICK
@given(ROWS, ROWS, SEEDS, EPOCHS, CUT, CUT)
def test_the_ranks_together_have_the_rows_of_one_process(forget, retain, seed, epoch, batch_size, world_size):
    sizes = {"forget": forget, "retain": retain}
    alone = epoch_batches(BatchPlan(sizes, seed, batch_size), epoch)
    together = epoch_batches(BatchPlan(sizes, seed, batch_size, world_size), epoch)
    for stream in sizes:
        assert rows_of(together, stream) == rows_of(alone, stream)


@QUICK
@given(ROWS, ROWS, SEEDS, EPOCHS, st.integers(1, 2))
def test_an_optimizer_step_has_the_same_rows_however_it_is_cut(forget, retain, seed, epoch, ratio):
    """Four forget rows a step: (batch size, accumulation, processes)."""
    sizes = {"forget": forget, "retain": retain}
    steps = {}
    for batch_size, accumulation, world_size in [(4, 1, 1), (2, 2, 1), (1, 4, 1), (2, 1, 2), (1, 2, 2), (1, 1, 4)]:
        plan = BatchPlan(sizes, seed, batch_size, world_size, ratio={"retain": ratio})
        batches = epoch_batches(plan, epoch)
        size = accumulation * world_size
        steps[batch_size, accumulation, world_size] = [
            {stream: rows_of(batches[start : start + size], stream) for stream in sizes}
            for start in range(0, len(batches), size)
        ]
    expected = steps[4, 1, 1]
    assert len(expected) == math.ceil(forget / 4)
    assert all(step == expected for step in steps.values())


@QUICK
@given(ROWS, ROWS, SEEDS, CUT, CUT, st.data())
def test_a_batch_is_a_pure_function_of_seed_epoch_and_number(forget, retain, seed, batch_size, world_size, data):
    """Asked alone in a fresh plan, a batch is the one met on the way: so a resumed run goes on with the same rows."""
    sizes = {"forget": forget, "retain": retain}
    rank, epoch = data.draw(st.integers(0, world_size - 1)), data.draw(EPOCHS)
    walked = BatchPlan(sizes, seed, batch_size, world_size, rank)
    for earlier in range(epoch):
        walked.set_epoch(earlier)
        list(walked)
    walked.set_epoch(epoch)
    batches = list(walked)
    permutation.cache_clear()
    number = data.draw(st.integers(0, len(walked) - 1))
    assert BatchPlan(sizes, seed, batch_size, world_size).batch(epoch, number, rank) == batches[number]
    assert list(walked) == batches


@QUICK
@given(ROWS, ROWS, SEEDS, CUT, CUT, st.integers(1, 3))
def test_retain_runs_through_its_own_permutations(forget, retain, seed, batch_size, world_size, ratio):
    """Cut into cycles of its own size, the retain rows of many epochs are one permutation after the other."""
    plan = BatchPlan({"forget": forget, "retain": retain}, seed, batch_size, world_size, ratio={"retain": ratio})
    rows = [row for epoch in range(4) for row in rows_of(epoch_batches(plan, epoch), "retain")]
    assert len(rows) == 4 * forget * ratio
    for start in range(0, len(rows), retain):
        cycle = rows[start : start + retain]
        assert len(set(cycle)) == len(cycle)
        assert set(cycle) <= set(range(retain))
        if len(cycle) == retain:
            assert sorted(cycle) == list(range(retain))


def test_ratio_by_hand():
    """5 forget rows, 3 retain rows for each, 2 a batch: 3 batches, the last with one filler and its three."""
    plan = BatchPlan({"forget": 5, "retain": 7, "holdout": 2}, 0, 2, ratio={"retain": 3})
    batches = list(plan)
    assert [len(batch) for batch in batches] == [2 + 6 + 2] * 3
    last = [row for _, row in batches[2]]
    assert [row == FILLER for row in last] == [False, True] + [False] * 3 + [True] * 3 + [False, True]
    assert len(rows_of(batches, "retain")) == 15
    assert len(rows_of(batches, "holdout")) == 5


def test_a_finished_plan_yields_nothing_more():
    plan = BatchPlan({"forget": 5}, 0, 2)
    plan.is_finished = True
    assert list(plan) == []
    assert len(plan) == 3


def test_a_rank_iterates_over_its_own_batches():
    ranks = [BatchPlan({"forget": 10}, 0, 2, 2, rank) for rank in range(2)]
    assert [len(plan) for plan in ranks] == [len(list(plan)) for plan in ranks] == [3, 3]
    for rank, plan in enumerate(ranks):
        assert list(plan) == [plan.batch(0, number, rank) for number in range(3)]
    order = permutation(0, "forget", 0, 10)
    assert rows_of([list(ranks[0])[1], list(ranks[1])[1]], "forget") == order[4:8]


def test_epochs_and_their_pairs_differ():
    plan = BatchPlan({"forget": 20, "retain": 20}, 0, 4)
    epochs = [epoch_batches(plan, epoch) for epoch in range(4)]
    for stream in plan.sizes:
        assert len({tuple(rows_of(batches, stream)) for batches in epochs}) == 4
    pairs = [set(zip(rows_of(batches, "forget"), rows_of(batches, "retain"), strict=True)) for batches in epochs]
    assert len(set.union(*pairs)) > 60


@pytest.mark.parametrize("size", [20, 1000])
def test_seeds_streams_and_cycles_have_orders_of_their_own(size):
    orders = {
        tuple(permutation(seed, stream, cycle, size))
        for seed in [*range(40), 2**31, 2**32 - 1]
        for stream in ("forget", "retain")
        for cycle in range(12)
    }
    assert len(orders) == 42 * 2 * 12


def test_every_place_is_as_likely_for_a_row():
    """Over 600 seeds, row 0 stands in each of 6 places about 100 times; 50 is 5.5 standard deviations of 9.1."""
    places = [permutation(seed, "forget", 0, 6).index(0) for seed in range(600)]
    assert all(50 < places.count(place) < 150 for place in range(6))


def test_the_order_is_pinned():
    """Published runs name their seed: another order under the same seed would make them irreproducible."""
    assert permutation(42, "forget", 0, 8) == [7, 1, 4, 6, 5, 0, 2, 3]


# ---- Rows ordered by length ----

# Few different lengths, so that many are equal.
LENGTHS = st.lists(st.integers(1, 6), min_size=1, max_size=23)
# (batch size, accumulation, processes) of a step of four rows.
CUTS = [(4, 1, 1), (2, 2, 1), (1, 4, 1), (2, 1, 2), (1, 2, 2), (1, 1, 4)]


def ordered(lengths, seed=0, cut=(4, 1, 1), rank=0, ratio=1, window_steps=3):
    batch_size, accumulation, world_size = cut
    sizes = {name: len(part) for name, part in lengths.items()}
    return BatchPlan(
        sizes, seed, batch_size, world_size, rank, {"retain": ratio}, accumulation, lengths, window_steps
    )  # fmt: skip


def steps_of(plan, epoch, cut):
    """Return [{stream: rows}] of the optimizer steps of an epoch, fillers left out."""
    batches, size = epoch_batches(plan, epoch), cut[1] * cut[2]
    parts = [batches[first : first + size] for first in range(0, len(batches), size)]
    return [{stream: rows_of(part, stream) for stream in plan.sizes} for part in parts]


@QUICK
@given(LENGTHS, LENGTHS, SEEDS, EPOCHS, st.integers(1, 2), st.integers(1, 4))
def test_with_lengths_a_step_has_the_same_rows_however_it_is_cut(forget, retain, seed, epoch, ratio, window_steps):
    lengths, found = {"forget": forget, "retain": retain}, []
    for cut in CUTS:
        plan = ordered(lengths, seed, cut, ratio=ratio, window_steps=window_steps)
        found.append(steps_of(plan, epoch, cut))
        slots = [row for batch in epoch_batches(plan, epoch) for stream, row in batch if stream == "forget"]
        assert sorted(slots[: len(forget)]) == list(range(len(forget)))
        assert slots[len(forget) :] == [FILLER] * (len(slots) - len(forget))
    assert all(steps == found[0] for steps in found)
    assert [len(step["forget"]) for step in found[0][:-1]] == [4] * (len(found[0]) - 1)
    for step in found[0]:
        for stream, rows in step.items():
            sizes = [lengths[stream][row] for row in rows]
            assert sizes == sorted(sizes, reverse=True) and len(rows) == (ratio if stream == "retain" else 1) * len(
                step["forget"]
            )


@QUICK
@given(LENGTHS, LENGTHS, SEEDS, EPOCHS, st.integers(1, 3), st.integers(1, 4))
def test_with_lengths_each_window_has_the_rows_that_come_without(forget, retain, seed, epoch, ratio, window_steps):
    """So every retain row has come as often as any other, but for what is in the window that is open."""
    plan = ordered({"forget": forget, "retain": retain}, seed, ratio=ratio, window_steps=window_steps)
    plain = BatchPlan(plan.sizes, seed, 4, ratio={"retain": ratio})
    one, other = steps_of(plan, epoch, CUTS[0]), steps_of(plain, epoch, CUTS[0])
    starts = [start // 4 for start in plan._starts_of_windows(epoch)]
    bounds = [*starts, len(one)]
    for first, last in pairwise(bounds):
        assert 0 < last - first <= window_steps
        for stream in plan.sizes:
            rows, expected = ([row for step in steps[first:last] for row in step[stream]] for steps in (one, other))
            assert Counter(rows) == Counter(expected)
        if last - first > 1:
            # No copies meet because they are alike: the retain rows of a window are those of one cycle.
            rows = [row for step in one[first:last] for row in step["retain"]]
            assert len(set(rows)) == len(rows)
    # Inside a window no step holds longer rows than a step which is not beside it in the order by length.
    for first, last in pairwise(bounds):
        sizes = [[forget[row] for row in step["forget"]] for step in one[first:last]]
        sizes.sort(key=lambda step: (step[0], step[-1]))
        assert all(shorter[0] <= longer[-1] for shorter, longer in pairwise(sizes))


@QUICK
@given(LENGTHS, LENGTHS, SEEDS, st.sampled_from(CUTS), st.integers(1, 2), st.data())
def test_with_lengths_a_batch_is_a_pure_function_of_seed_epoch_and_number(forget, retain, seed, cut, ratio, data):
    lengths = {"forget": forget, "retain": retain}
    rank, epoch = data.draw(st.integers(0, cut[2] - 1)), data.draw(EPOCHS)
    walked = ordered(lengths, seed, cut, rank, ratio)
    for earlier in range(epoch + 1):
        walked.set_epoch(earlier)
        batches = list(walked)
    permutation.cache_clear()
    number = data.draw(st.integers(0, len(walked) - 1))
    assert ordered(lengths, seed, cut, 0, ratio).batch(epoch, number, rank) == batches[number]


@QUICK
@given(LENGTHS, LENGTHS, SEEDS, st.sampled_from(CUTS), st.integers(1, 2), st.integers(0, 60), st.booleans())
def test_visited_rows_are_those_of_all_ranks_together(forget, retain, seed, cut, ratio, count, has_lengths):
    plan = ordered({"forget": forget, "retain": retain}, seed, cut, ratio=ratio)
    plan.lengths = plan.lengths if has_lengths else None
    found = {"forget": set(), "retain": set()}
    for number in range(count):
        for rank in range(cut[2]):
            for stream, row in plan.batch(*divmod(number, len(plan)), rank):
                found[stream] |= {row} - {FILLER}
    assert plan.visited(count) == {stream: sorted(rows) for stream, rows in found.items()}


def test_the_steps_of_a_window_come_in_an_order_that_is_drawn():
    """Not always the longest first, which would be a schedule; and not the same in every window and epoch."""
    lengths = {"forget": list(range(1, 8 * 4 * 3 + 3)), "retain": list(range(1, 700))}
    orders = []
    for epoch in range(6):
        steps = steps_of(ordered(lengths, window_steps=8), epoch, CUTS[0])
        assert len(steps) == 25 and len(steps[24]["forget"]) == 2
        for first in (0, 8, 16):
            longest = [max(step["forget"]) for step in steps[first : first + 8]]
            orders.append(tuple(sorted(range(8), key=lambda place, longest=longest: -longest[place])))
            # Long forget rows meet long retain rows.
            retained = [max(step["retain"]) for step in steps[first : first + 8]]
            assert retained.index(max(retained)) == longest.index(max(longest))
    assert len(set(orders)) == 18
    # Where the longest step comes: 18 draws of 8 places leave fewer than 4 places with a chance below 1e-4.
    assert len({order[0] for order in orders}) >= 4
    assert {tuple(step["forget"]) for step in steps} != {
        tuple(step["forget"]) for step in steps_of(ordered(lengths, window_steps=8), 0, CUTS[0])
    }


def read_tofu(folder, name):
    text = (folder / "tofu" / f"{name}.json").read_text(encoding="utf-8")
    rows = json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.splitlines() if line]
    return [f"Question: {row['question']}\nAnswer: {row['answer']}" for row in rows]


def test_padding_of_tofu(shared_data):
    """Processed tokens for each real one in an epoch, all of one step padded to its longest row: random order 1.4."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(shared_data / "tokenizers/gpt2.json"))
    lengths = {}
    for stream, name in (("forget", "forget10"), ("retain", "retain90")):
        lengths[stream] = [len(part.ids) + 1 for part in tokenizer.encode_batch(read_tofu(shared_data, name))]
    assert {name: len(part) for name, part in lengths.items()} == {"forget": 400, "retain": 3600}

    def padding(seed, **ordering):
        plan = BatchPlan({name: len(part) for name, part in lengths.items()}, seed, 8, **ordering)
        processed = real = 0
        for batch in plan:
            sizes = [lengths[stream][row] for stream, row in batch]
            processed, real = processed + max(sizes) * len(sizes), real + sum(sizes)
        return processed / real

    assert WINDOW_STEPS == 20
    for seed in (0, 42):
        assert padding(seed) > 1.38
        assert padding(seed, lengths=lengths) <= 1.10


@QUICK
@given(st.integers(1, 60), st.integers(1, 80), SEEDS)
def test_drawn_rows_are_a_sample_in_order(size, count, seed):
    """Rows that are not equal to each other, so that a repeated one would be seen."""
    rows = [{"number": number} for number in range(size)]
    drawn = drawn_rows(rows, count, seed)
    numbers = [row["number"] for row in drawn]
    assert len(numbers) == min(count, size) and numbers == sorted(set(numbers))
    assert drawn_rows(rows, count, seed) == drawn


def test_drawn_rows_depend_on_the_seed_and_favor_none():
    """Half of 20 rows over 400 seeds: each about 200 times; 50 is 5 standard deviations of 10."""
    draws = [drawn_rows(range(20), 10, seed) for seed in range(400)]
    counts = Counter(row for draw in draws for row in draw)
    assert all(abs(counts[row] - 200) < 50 for row in range(20)) and len({tuple(draw) for draw in draws}) > 390
