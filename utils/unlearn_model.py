"""The command line of SOUL, WAGLE and ILU: type it in the root of the repository.

python utils/unlearn_model.py --config_file configs/unlearn/Tofu/GradDiff+WAGLE.json \
    --unlearn.mask_path mask/tofu_0.95.pt --unlearn.lr 1e-5 --dry_run

It prints the run_unlearn.py command that configuration and keys become, and runs it; --dry_run prints only, --help says
where it differs from theirs.
"""

from llm_unlearn.cli.published_soul import main
from llm_unlearn.errors import run_cli

if __name__ == "__main__":
    raise SystemExit(run_cli(main))
