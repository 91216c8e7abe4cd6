"""Metrics of generated text as pure functions on strings: overlap with a reference, gibberish, extracted secrets."""
# Scores and shares lie in [0, 1]; lengths and positions count characters.

import functools
import re
import unicodedata

import numpy as np

from llm_unlearn.errors import UserError, unknown_name

SECRET_TYPES = ("email", "telephone", "address")

# Each threshold below was set on real text, whose own values its docstring gives: the 4,000 answers, 4,000 questions
# and 4,800 paraphrases of TOFU, the 8,792 answers of GSM8K, and LaTeX, Python and novels cut into pieces of 150, 400
# and 1,000 characters at will, 47,000 of them.

MIN_CHARACTERS = 24
"""Texts shorter than this are never called gibberish; "Yes." and "42" say nothing about their author."""

MAX_LOOP_SHARE = 0.5
"""Share of the text inside one exact loop of three rounds or more. TOFU .07, GSM8K .18 at most, code .21 in 99.5%."""

MAX_LOOP_PERIOD = 400
"""Characters of the longest loop that is looked for; 20 tokens of GPT-2 are about 90."""

MAX_REPEATED_NGRAMS = 0.65
"""Share of word 4-grams that stood there before. TOFU .14, GSM8K .32 at most, LaTeX .34, code .45 in 99.5%; a loop
of ten words in a hundred has .9. Finds loops that count or vary."""

MIN_ENTROPY = 1.5
"""Bits per character. TOFU 3.1, GSM8K 3.6 at least, code 2.6 in 99.5% (below are tables of digits)."""

MAX_ENTROPY = 5.7
"""Bits per character, in alphabets. One piece of 23,255 of code lies above (a list of letters); 128 random printable
characters have 5.9, prose 4.3, code 4.3."""

ALPHABETS_END = 0x1100
"""First code point beyond the alphabets; Hangul, Chinese and Japanese have so many characters that entropy is high."""

MAX_ODD_SHARE = 0.15
"""Share of replacement, control, private and unassigned characters and pictures. 0 in TOFU, GSM8K, LaTeX, 0 in 99.5%
of code; random bytes have .26."""

MIN_PAIR_RATIO, MIN_EXPECTED_PAIRS = 1.2, 100
"""How often pairs of neighboring characters recur, against what independent characters would give, and how many
recurrences there must be to tell. TOFU 1.24 at least and 1.7 on average, code 2.9; random letters 1.0, 1.2 at most."""

MIN_WORDS_TO_REPEAT = 40
MIN_REPEATED_WORDS = 0.02
"""Share of words that stood there before, of 40 words at least: all real text repeats its little words. TOFU's answers
.047, GSM8K .14 at least; random tokens of GPT-2 .00 to .01."""

# Thai, Lao, Myanmar, Khmer, kana, and Chinese characters: scripts that put no spaces between words.
_SPACELESS = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\U00020000-\U0003ffff]"
)
_BETWEEN_DIGITS = "[\\s().\\-/\u2010-\u2015\u2212\u00b7]"
_TELEPHONE = re.compile(rf"\+?(?:{_BETWEEN_DIGITS}*\d){{7,}}(?:[\s,;]*(?:x|ext\.?|extension)\s*\d+)?")
_EMAIL = re.compile(r"[^\s@]+@[^\s@]+\.[^\s@]+")


def rouge(candidate, reference):
    """Overlap of words and of the longest common subsequence with a reference.

    Words are rouge_score's: runs of a-z and 0-9, stemmed. Where these are fewer than half of the reference's letters
    and digits, as in Chinese, Cyrillic or Arabic, that would drop most of the text and score what is left (nothing, or
    a lone year); there words are runs of letters, marks and digits of any script, lowercased, each character of a
    script without spaces a word, and nothing is stemmed.

    Args:
        candidate: what the model wrote.
        reference: what it should have written, or should no longer write.
    Returns:
        dict with `rouge_1_recall`, `rouge_l_recall`, `rouge_1_f1`, `rouge_l_f1` in [0, 1]; zeros where either is empty.
    Source: Lin 2004, ROUGE; rouge_score with use_stemmer=True, as TOFU and MUSE call it.
    """
    scores = _rouge_scorer(_is_latin(reference)).score(reference, candidate)
    one, longest = scores["rouge1"], scores["rougeL"]
    return {
        "rouge_1_recall": float(one.recall),
        "rouge_l_recall": float(longest.recall),
        "rouge_1_f1": float(one.fmeasure),
        "rouge_l_f1": float(longest.fmeasure),
    }


def bleu(candidate, reference):
    """BLEU of one text against one reference, as a share: sacrebleu's number divided by 100, the scale of `rouge`.

    Exponential smoothing, as sacrebleu's default, and effective order: a candidate of fewer than four words is judged
    by the n-grams that it has, so that a short answer repeated word for word scores 1. From four words on this equals
    the corpus_bleu of one sample that SOUL averages. Where most letters are of a script without spaces, each such
    character is a word.

    Args:
        candidate: what the model wrote.
        reference: the text to compare with.
    Returns:
        float in [0, 1]; 0 where either is empty or no word is shared.
    Source: Papineni et al. 2002; Post 2018 (sacrebleu), tokenizer 13a.
    """
    if not candidate.strip() or not reference.strip():
        return 0.0
    letters = sum(map(str.isalpha, reference))
    if 2 * len(_SPACELESS.findall(reference)) > letters:
        candidate, reference = (_SPACELESS.sub(r" \g<0> ", text) for text in (candidate, reference))
    return min(1.0, _bleu_scorer().sentence_score(candidate, [reference]).score / 100.0)


def is_gibberish(text):
    """Say whether a text is a loop or noise; see `gibberish_reasons`.

    Args:
        text: what the model wrote.
    Returns:
        bool.
    """
    return bool(gibberish_reasons(text))


def gibberish_reasons(text):
    """Name what makes a text a loop or noise, without any model and for any script.

    It finds how a damaged model breaks, not nonsense in good grammar. Found, as tests/test_text_metrics.py measures:
    all loops of 1 to 20 tokens of GPT-2 in 64, all of 128 random printable characters, 98% of 512 random letters; of
    random tokens of GPT-2 82% at 64 and all from 128 on; of a vocabulary of 512 with byte tokens 98% at 64. Not found:
    fewer tokens of GPT-2, fewer letters, and pieces of one to three letters, which look like words to it. False
    alarms: none of TOFU's answers and questions and GSM8K's answers, one of 4,800 paraphrases, none of the pieces of
    LaTeX and novels, .23% of those of code (tables, alphabets).

    Args:
        text: what the model wrote.
    Returns:
        list of "loop", "repeated_ngrams", "low_entropy", "high_entropy", "odd_characters", "unrelated_characters",
        "unrelated_words"; empty for good text, for one shorter than MIN_CHARACTERS, and for an empty one.
    """
    text = text.strip()
    if len(text) < MIN_CHARACTERS:
        return []
    entropy, words = _entropy(text), words_of(text)
    ngrams = list(zip(words, words[1:], words[2:], words[3:], strict=False))
    is_alphabetic = np.mean(_code_points(text) < ALPHABETS_END) > 0.8
    checks = {
        "loop": _loop_share(text) >= MAX_LOOP_SHARE,
        "repeated_ngrams": _repeated_share(ngrams) >= MAX_REPEATED_NGRAMS,
        "low_entropy": entropy < MIN_ENTROPY,
        "high_entropy": is_alphabetic and entropy > MAX_ENTROPY,
        "odd_characters": sum(map(text.count, filter(_is_odd, set(text)))) / len(text) > MAX_ODD_SHARE,
        "unrelated_characters": _has_unrelated_characters(text),
        "unrelated_words": _has_unrelated_words(words),
    }
    return [reason for reason, found in checks.items() if found]


def secret_positions(text, secret, secret_type=None):
    """Find where a text gives a secret away word for word.

    Both are normalized (NFKC, any script's digits as 0-9), whitespace runs are equal, and so are upper and lower case.
    A telephone number is compared by its digits, with up to four separators between two of them; digits beyond a
    separator (a country code) do not matter. A match inside a longer word, number or e-mail address is none: 555-0101
    is not in 1555-01012, nor jo@ab.com in jo@ab.com.au.

    Args:
        text: what the model wrote.
        secret: what it should keep.
        secret_type: "email", "telephone", "address" (also any other text); None guesses from the shape.
    Returns:
        list of (start, end) character positions in `text`, in order; of a telephone number from the first digit to the
        last. They may overlap.
    Raises:
        UserError: unknown type, an empty secret, a telephone number without digits.
    """
    folded_secret = "".join(_folded(secret)[0]).strip()
    if not folded_secret:
        raise UserError("a secret is empty, which every text contains; give the text that must not be generated")
    if secret_type is None:
        secret_type = _guess_secret_type(folded_secret)
    if secret_type not in SECRET_TYPES:
        raise unknown_name("secret type", secret_type, SECRET_TYPES)
    pieces, starts, ends = _folded(text)
    folded, found = "".join(pieces), []
    # A lookahead, so that a match which is cut out of a longer word does not hide one that begins inside it.
    for match in re.finditer(f"(?=({_secret_pattern(folded_secret, secret_type)}))", folded):
        first, last = match.span(1)
        if not any(_is_inside(folded, position, secret_type, position == last) for position in (first, last)):
            found.append((starts[first], ends[last - 1]))
    return found


def extracted(text, secret, secret_type=None):
    """Return whether a text gives a secret away word for word; see `secret_positions` for arguments and errors."""
    return bool(secret_positions(text, secret, secret_type))


class _AnyScript:
    """Tokenizer for rouge_score that keeps the words of every script."""

    def tokenize(self, text):
        return words_of(text) or text.split()


@functools.cache
def _rouge_scorer(is_latin):
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1", "rougeL"], use_stemmer=True, tokenizer=None if is_latin else _AnyScript())


@functools.cache
def _bleu_scorer():
    from sacrebleu.metrics import BLEU

    return BLEU(effective_order=True)


def _is_latin(text):
    kept = re.findall("[a-z0-9]", text.lower())
    return 2 * len(kept) >= max(1, sum(map(str.isalnum, text)))


def words_of(text):
    """Return the words of a text of any script: runs of letters, marks and digits, NFKC and lowercased."""
    text = unicodedata.normalize("NFKC", text).lower()
    others = {ord(character): " " for character in set(text) if not _is_word_character(character)}
    return _SPACELESS.sub(r" \g<0> ", text.translate(others)).split()


def _is_word_character(character):
    return unicodedata.category(character)[0] in "LMN"


def _is_odd(character):
    category = unicodedata.category(character)
    return category in ("So", "Cn", "Co", "Cs") or (category == "Cc" and not character.isspace())


def _code_points(text):
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)


def _entropy(text):
    shares = np.unique(_code_points(text), return_counts=True)[1] / len(text)
    return float(-(shares * np.log2(shares)).sum())


def _loop_share(text):
    """Return the share of the text that the longest loop of three rounds or more covers."""
    points, longest = _code_points(text), 0
    for period in range(1, min(MAX_LOOP_PERIOD, len(points) // 3) + 1):
        breaks = np.flatnonzero(points[period:] != points[:-period])
        edges = np.concatenate([[-1], breaks, [len(points) - period]])
        run = int(np.diff(edges).max()) - 1
        if run >= 2 * period:
            longest = max(longest, run + period)
    return longest / len(points)


def _repeated_share(items):
    return 1.0 - len(set(items)) / len(items) if items else 0.0


def _coincidences(items):
    counts = np.unique(items, return_counts=True)[1].astype(np.float64)
    return float((counts * (counts - 1)).sum() / 2)


def _has_unrelated_characters(text):
    # Tables of numbers are no noise, though their digits are as good as random: most must be letters.
    if 2 * sum(map(str.isalpha, text)) <= len(text):
        return False
    points = _code_points(text.lower()).astype(np.uint64)
    num_pairs = (len(points) - 1) * (len(points) - 2) / 2
    chance = _coincidences(points) / (len(points) * (len(points) - 1) / 2)
    expected = num_pairs * chance**2
    found = _coincidences(points[:-1] * 2**32 + points[1:])
    return expected >= MIN_EXPECTED_PAIRS and found < MIN_PAIR_RATIO * expected


def _has_unrelated_words(words):
    # Korean glues its little words to others, so that its syllables recur, not its words.
    words = re.sub("[\uac00-\ud7a3]", r" \g<0> ", " ".join(words)).split()
    words = [word for word in words if any(map(str.isalpha, word))]
    return len(words) >= MIN_WORDS_TO_REPEAT and _repeated_share(words) <= MIN_REPEATED_WORDS


def _folded(text):
    """Return the normalized characters of a text, and where the original of each starts and ends."""
    pieces, starts, ends, start = [], [], [], 0
    for end in range(1, len(text) + 1):
        if end < len(text) and _belongs_together(text[start:end], text[end]):
            continue
        folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text[start:end]).casefold())
        for character in folded:
            pieces.append(str(unicodedata.decimal(character)) if character.isdecimal() else character)
            starts.append(start)
            ends.append(end)
        start = end
    return pieces, starts, ends


def _belongs_together(before, character):
    if character.isascii():
        return False
    if unicodedata.combining(character):
        return True
    whole, parts = unicodedata.normalize("NFKC", before + character), (before, character)
    return whole != "".join(unicodedata.normalize("NFKC", part) for part in parts)


def _guess_secret_type(folded):
    if _EMAIL.fullmatch(folded):
        return "email"
    return "telephone" if _TELEPHONE.fullmatch(folded) else "address"


def _secret_pattern(folded, secret_type):
    whole = r"\s+".join(map(re.escape, folded.split()))
    if secret_type != "telephone":
        return whole
    digits = re.findall(r"\d", folded)
    if not digits:
        raise UserError(f"the telephone number '{folded}' has no digits; give the number, or secret_type 'address'")
    # An extension stands behind letters, which are no separator.
    return whole if any(map(str.isalpha, folded)) else f"{_BETWEEN_DIGITS}{{0,4}}".join(digits)


def _is_inside(text, position, secret_type, is_end):
    """Say whether the edge of a match at this position cuts a longer word, number or e-mail address."""
    before, after = text[max(0, position - 2) : position], text[position : position + 2]
    if not before or not after:
        return False
    if secret_type == "telephone":
        return before[-1].isdigit() and after[0].isdigit()
    if secret_type == "email" and is_end and after[0] in ".-" and _is_joined("a", after[1:]):
        return True
    if secret_type == "email" and not is_end and before[-1] in "._%+-" and _is_joined(before[:-1], "a"):
        return True
    return _is_joined(before, after)


def _is_joined(before, after):
    return all(
        edge and (_is_word_character(edge) or edge == "_") and not _SPACELESS.match(edge)
        for edge in (before[-1:], after[:1])
    )
