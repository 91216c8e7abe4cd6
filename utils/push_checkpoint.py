"""Push a finished checkpoint to the Hub.

python utils/push_checkpoint.py --output_dir OUT --hub_model_id owner/name
"""

import argparse
import logging

from llm_unlearn.errors import run_cli
from llm_unlearn.hub import push_checkpoint


def main(argv=None):
    """Parse the command line and push; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", required=True, help="Folder with the finished checkpoint.")
    parser.add_argument("--hub_model_id", help="Repository, owner/name; default: the folder's name.")
    parser.add_argument("--hub_token", help="Access token; default: the one that you logged in with.")
    parser.add_argument("--hub_private_repo", action="store_true", help="Make the repository private where it is new.")
    parser.add_argument("--hub_revision", help="Branch to push to; default: main.")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    push_checkpoint(args.output_dir, args.hub_model_id, args.hub_token, args.hub_private_repo, args.hub_revision)


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
