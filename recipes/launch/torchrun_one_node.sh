#!/usr/bin/env bash
# Unlearn on all GPUs of this machine; type it in the root of the repository:
#
#   MODEL=my_model recipes/launch/torchrun_one_node.sh
#
# What follows the script goes to run_unlearn.py and wins over the recipe. Without a flag for it, DDP runs:
#
#   MODEL=my_model recipes/launch/torchrun_one_node.sh --fsdp "full_shard auto_wrap"
#   MODEL=my_model recipes/launch/torchrun_one_node.sh --deepspeed ds_configs/zero3.json
#   MODEL=my_model PROCESSES=2 recipes/launch/torchrun_one_node.sh --use_cpu True
set -euo pipefail

MODEL=${MODEL:-open-unlearning/tofu_Llama-3.2-1B-Instruct_full}
RECIPE=${RECIPE:-recipes/tofu/npo.yaml}
OUTPUT_DIR=${OUTPUT_DIR:-output/$(basename "$(dirname "$RECIPE")")-$(basename "$RECIPE" .yaml)}
PROCESSES=${PROCESSES:-gpu} # one for each GPU; a machine without any needs a number
# Seconds between a SIGTERM and torchrun's SIGKILL, for one step and one checkpoint.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-110}

exec torchrun --standalone --nproc_per_node="$PROCESSES" \
  run_unlearn.py --config "$RECIPE" --target_model_name_or_path "$MODEL" --output_dir "$OUTPUT_DIR" "$@"
