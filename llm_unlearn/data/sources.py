"""Where rows come from: a file, a split of the Hub, or a mixture of both in given shares."""

import logging
import os
import random
import re
from dataclasses import dataclass, field

from llm_unlearn.data.rows import check_rows, fingerprint, read_rows
from llm_unlearn.errors import UserError

logger = logging.getLogger(__name__)

STREAMED_ROWS = 10_000
_HUB = re.compile(r"^hub:(?P<path>[^/:#]+/[^/:#]+)(/(?P<config>[^:#]+))?:(?P<split>[^:#]+)(#(?P<column>[^:#]+))?$")
_SHARE = re.compile(r"^(?P<source>.+)=(?P<share>\d*\.?\d+(e-?\d+)?)$")


@dataclass
class Source:
    """Rows and where they came from.

    Attributes:
        rows: checked rows, see `rows.canonical_row`.
        origins: one dict a part: `source`, `revision` (None for a file), `share` of the rows, `rows`, `sha256`.
    """

    rows: list
    origins: list = field(default_factory=list)

    @classmethod
    def single(cls, name, rows, revision):
        """Return the Source of rows that all come from one place."""
        origin = {"source": name, "revision": revision, "share": 1.0, "rows": len(rows), "sha256": fingerprint(rows)}
        return cls(rows, [origin])

    @property
    def sha256(self):
        """Fingerprint of all rows in order."""
        return fingerprint(self.rows)


@dataclass(frozen=True)
class HubOptions:
    """How the Hub is reached.

    Attributes:
        revision: branch, tag or commit of the data sets; None is the newest.
        cache_dir: where downloads are kept.
        token: access token; None takes the one that you logged in with.
    """

    revision: str | None = None
    cache_dir: str | None = None
    token: str | None = None


def load_source(spec, max_rows=None, hub=None, seed=0, reshape=None):
    """Load what `--forget_data`, `--retain_data` or `--holdout_data` names.

    Args:
        spec: a file; `hub:owner/name[/config]:split[#column]`; or a mixture `A=0.75,B=0.25` of these, whose shares add
            up to 1 and hold exactly, without repeating a row: the source that runs out first sets the size.
        max_rows: at most that many rows in all (the first ones of each source); None: all rows of a file, the first
            10,000 of a Hub split, which is streamed.
        hub: HubOptions.
        seed: of the order in which the rows of a mixture are interleaved.
        reshape: see `rows.check_rows`; limits count the rows that it returns.
    Returns:
        Source.
    Raises:
        UserError: unreadable spec, file or split.
    """
    parts = mixture_parts(spec)
    if parts is None:
        return _load_one(spec, max_rows, hub, reshape)
    loaded = [(_load_one(name, max_rows, hub, reshape), share) for name, share in parts]
    size = min(int(len(source.rows) / share + 1e-9) for source, share in loaded)
    size = min(size, max_rows) if max_rows else size
    rows, origins = [], []
    for (source, share), count in zip(loaded, share_counts([share for _, share in loaded], size), strict=True):
        if count == 0:
            name = source.origins[0]["source"]
            raise UserError(f"the mixture '{spec}' has no rows of '{name}': a source is smaller than its share allows")
        taken = source.rows[:count]
        rows += taken
        origins.append({**source.origins[0], "share": share, "rows": len(taken), "sha256": fingerprint(taken)})
    random.Random(seed).shuffle(rows)
    return Source(rows, origins)


def share_counts(shares, size):
    """Split `size` rows by shares: whole parts first, then one more to each largest remainder.

    Args:
        shares: list of float that add up to 1.
        size: int.
    Returns:
        list of int that add up to size.
    """
    counts = [int(size * share + 1e-9) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda n: counts[n] - size * shares[n])
    for n in by_remainder[: size - sum(counts)]:
        counts[n] += 1
    return counts


def mixture_parts(spec):
    """Return [(source, share)] of a mixture `A=0.75,B=0.25`, or None for anything else.

    Raises:
        UserError: shares that are none, or a source twice.
    """
    if os.path.exists(spec) or "," not in spec:
        return None
    parts = [_SHARE.match(part.strip()) for part in spec.split(",")]
    if not all(parts):
        raise UserError(f"'{spec}' is no file, and not a mixture of the form A=0.75,B=0.25")
    shares = [(part["source"], float(part["share"])) for part in parts]
    if abs(sum(share for _, share in shares) - 1) > 1e-6 or any(share <= 0 for _, share in shares):
        raise UserError(f"the shares of '{spec}' must be above 0 and add up to 1")
    if len({name for name, _ in shares}) < len(shares):
        raise UserError(f"'{spec}' names a source twice, which would repeat its rows")
    return shares


def _load_one(spec, max_rows, hub, reshape=None):
    if not spec.startswith("hub:"):
        rows, revision = read_rows(spec, reshape)[:max_rows], None
    else:
        match = _HUB.match(spec)
        if match is None:
            raise UserError(f"'{spec}' is not of the form hub:owner/name[/config]:split[#column]")
        limit = max_rows or STREAMED_ROWS
        place = (match["path"], match["config"], match["split"], match["column"])
        rows, revision = hub_rows(*place, limit, hub, reshape)
    return Source.single(spec, rows, revision)


def hub_rows(path, config, split, column=None, max_rows=None, hub=None, reshape=None):
    """Read a split from the Hub, streamed where only its first rows are asked for.

    Args:
        path: data set, owner/name.
        config: its configuration, or None.
        split: its split.
        column: the column that holds the text; None reads the columns by their names.
        max_rows: at most that many rows, streamed; None downloads the split.
        hub: HubOptions.
        reshape: see `rows.check_rows`; `max_rows` counts the rows that it returns.
    Returns:
        (rows, commit hash that was read).
    Raises:
        UserError: no network, unknown or gated data set, missing column.
    """
    from datasets import load_dataset
    from huggingface_hub import HfApi

    hub = hub or HubOptions()
    name = hub_name(path, config, split)
    try:
        commit = HfApi(token=hub.token).dataset_info(path, revision=hub.revision).sha
        data = load_dataset(
            path,
            config,
            split=split,
            revision=commit,
            streaming=max_rows is not None,
            cache_dir=hub.cache_dir,
            token=hub.token,
        )
        rows = list(data) if max_rows is None else _first(data, max_rows, None if column else reshape)
    except Exception as error:  # the Hub client raises a dozen types; each means that the rows cannot be had
        reason = type(error).__name__ + ": " + str(error).split("\n")[0][:200]
        advice = (
            f"it is gated: request access at huggingface.co/datasets/{path} and log in"
            if "gated" in str(error).lower()
            else "without network, pass --data_dir DIR or a file"
        )
        raise UserError(f"{name} cannot be read ({reason}); {advice}") from error
    logger.info("read %d rows of %s at %s", len(rows), name, commit)
    if column is not None:
        if rows and column not in rows[0]:
            raise UserError(f"{name} has no column '{column}'; it has {sorted(rows[0])}")
        rows = [{"text": row[column]} for row in rows if not isinstance(row[column], str) or row[column].strip()]
    return check_rows(rows, name, reshape)[:max_rows], commit


def hub_name(path, config, split):
    """Return a split of the Hub as a source is written: hub:owner/name[/config]:split."""
    return f"hub:{path}{'/' + config if config else ''}:{split}"


def _first(stream, max_rows, reshape):
    """Read a stream until it has given `max_rows` rows, counted after reshaping."""
    if reshape is None:
        return list(stream.take(max_rows))
    rows, count = [], 0
    for row in stream:
        rows.append(row)
        try:
            count += len(reshape(row))
        except ValueError:
            break  # a malformed row, which the check of all rows names with its number
        if count >= max_rows:
            break
    return rows
