#!/usr/bin/env bash
# The launcher of EleutherAI/unlearn with its own options; type it in the root of the repository:
#
#   MODEL=my_model recipes/launch/run_unlearn.sh -a cb --rm 23 --ret 2 --orth 5 --dry-run
#   MODEL=my_model NPROC=4 recipes/launch/run_unlearn.sh -a lens --rm 5 --ret 5 -n 8192 --lr 1e-3,5e-4
#   MODEL=my_model NPROC=4 recipes/launch/run_unlearn.sh -a seq --rm 5 --ret 20 --sft --extra "--gradient_checkpointing True"
#
# It prints the run_unlearn.py command that the options become, one for each learning rate, and runs it; --dry-run
# prints only, --help lists the options. Where it differs from theirs stands in llm_unlearn/cli/published_launcher.py.
set -euo pipefail

exec "${PYTHON:-python}" -m llm_unlearn.cli.published_launcher "$@"
