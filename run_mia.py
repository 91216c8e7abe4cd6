"""Find out whether a checkpoint still gives away what it was trained on.

python run_mia.py --model_name_or_path output/tofu-npo --domain tofu --forget_split forget10
"""

from llm_unlearn.cli.mia import main
from llm_unlearn.processes import end_process

if __name__ == "__main__":
    end_process(main())
