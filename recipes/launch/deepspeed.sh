#!/usr/bin/env bash
# Unlearn on all GPUs of this machine with DeepSpeed's launcher; type it in the root of the repository:
#
#   MODEL=my_model PROCESSES=8 recipes/launch/deepspeed.sh
#   MODEL=my_model PROCESSES=8 STAGE=zero2 recipes/launch/deepspeed.sh --learning_rate 2e-5
#
# It kills 30 seconds after a SIGTERM, whatever the checkpoint takes; torchrun can be told to wait.
set -euo pipefail

MODEL=${MODEL:-open-unlearning/tofu_Llama-3.2-1B-Instruct_full}
RECIPE=${RECIPE:-recipes/tofu/npo.yaml}
OUTPUT_DIR=${OUTPUT_DIR:-output/$(basename "$(dirname "$RECIPE")")-$(basename "$RECIPE" .yaml)}
PROCESSES=${PROCESSES:-8}
STAGE=${STAGE:-zero3} # a file of ds_configs

# The environment says the rank already; --no_local_rank keeps it out of the command line, and of unlearning.json.
exec deepspeed --no_local_rank --num_gpus "$PROCESSES" \
  run_unlearn.py --config "$RECIPE" --target_model_name_or_path "$MODEL" --output_dir "$OUTPUT_DIR" \
  --deepspeed "ds_configs/$STAGE.json" "$@"
