#!/usr/bin/env bash
# Unlearn on all GPUs of this machine with `accelerate launch`; type it in the root of the repository:
#
#   MODEL=my_model PROCESSES=8 recipes/launch/accelerate.sh --fsdp "full_shard auto_wrap"
#   MODEL=my_model PROCESSES=8 recipes/launch/accelerate.sh --deepspeed ds_configs/zero3.json
set -euo pipefail

MODEL=${MODEL:-open-unlearning/tofu_Llama-3.2-1B-Instruct_full}
RECIPE=${RECIPE:-recipes/tofu/npo.yaml}
OUTPUT_DIR=${OUTPUT_DIR:-output/$(basename "$(dirname "$RECIPE")")-$(basename "$RECIPE" .yaml)}
PROCESSES=${PROCESSES:-8} # at least 2
# Seconds between a SIGTERM and the launcher's SIGKILL, for one step and one checkpoint.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-110}

exec accelerate launch --config_file recipes/launch/accelerate.yaml --num_processes "$PROCESSES" \
  run_unlearn.py --config "$RECIPE" --target_model_name_or_path "$MODEL" --output_dir "$OUTPUT_DIR" "$@"
