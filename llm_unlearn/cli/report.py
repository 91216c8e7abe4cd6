"""The report: compares runs on one HTML page that needs no network, from what they left in their folders.

python -m llm_unlearn.cli.report DIR... [--output report.html] [--title T]

Each DIR is searched, at any depth, for results.json of run_eval.py, run_mia.py and the attacks, for audit.json of
llm_unlearn.cli.audit, and for unlearning.json and trainer_state.json of run_unlearn.py. Several audits compare.
"""

import argparse
import sys
from pathlib import Path

from llm_unlearn.errors import UserError, run_script


def main(argv=None):
    """Write the report; returns the exit code."""
    return run_script(_main, argv)


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(
            f"{message.removeprefix('argument ')}; python -m llm_unlearn.cli.report --help lists what it takes"
        )


def _main(argv):
    parser = _Parser(
        prog="python -m llm_unlearn.cli.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("folders", metavar="DIR", nargs="+", type=Path, help="Folders to search for runs.")
    parser.add_argument("--output", type=Path, default=Path("report.html"), help="The page; default: report.html.")
    parser.add_argument("--title", help="Heading of the page; by default it names the domains.")
    args = parser.parse_args(argv)
    if args.output.is_dir():
        raise UserError(f"--output '{args.output}' is a folder; name a file in it, as {args.output / 'report.html'}")

    from llm_unlearn.report.page import make_page

    page, num_runs = make_page(args.folders, args.title)
    try:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(page, encoding="utf-8", errors="replace", newline="\n")
    except OSError as error:
        raise UserError(f"--output '{args.output}' cannot be written: {error.strerror}") from error
    _say(f"{num_runs} run{'s' if num_runs != 1 else ''} compared; the page is {args.output}")


def _say(text):
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    raise SystemExit(main())
