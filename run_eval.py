"""Score a checkpoint on a benchmark.

python run_eval.py --model_name_or_path output/tofu-npo --domain tofu --forget_split forget10
"""

from llm_unlearn.cli.evaluate import main
from llm_unlearn.processes import end_process

if __name__ == "__main__":
    end_process(main())
