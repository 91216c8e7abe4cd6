"""Unlearn with one command, on one process or under torchrun.

python run_unlearn.py --unlearn_method npo --target_model_name_or_path MODEL --domain tofu --output_dir OUT
"""

from llm_unlearn.cli.unlearn import main
from llm_unlearn.processes import end_process

if __name__ == "__main__":
    end_process(main())
