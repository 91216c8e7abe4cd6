#!/usr/bin/env bash
# Unlearn on several machines; type the same command on each of them, in the root of the repository:
#
#   HEAD=node0 NODES=2 MODEL=my_model recipes/launch/torchrun_nodes.sh --fsdp "full_shard auto_wrap"
#
# OUTPUT_DIR lies on a file system that all of them share. Where a process dies, all start over, MAX_RESTARTS times at
# most, and continue from the newest complete checkpoint.
set -euo pipefail

HEAD=${HEAD:?name or address of one of the machines, as the others reach it}
NODES=${NODES:-2}
MODEL=${MODEL:-open-unlearning/tofu_Llama-3.2-1B-Instruct_full}
RECIPE=${RECIPE:-recipes/tofu/npo.yaml}
OUTPUT_DIR=${OUTPUT_DIR:-output/$(basename "$(dirname "$RECIPE")")-$(basename "$RECIPE" .yaml)}
PROCESSES=${PROCESSES:-gpu} # on each machine; one for each GPU
PORT=${PORT:-29400}
RUN_ID=${RUN_ID:-unlearn} # the same on all machines, another for each run
MAX_RESTARTS=${MAX_RESTARTS:-3}
SAVE_STEPS=${SAVE_STEPS:-50} # what a crash costs at most, in optimizer steps
# Seconds between a SIGTERM and torchrun's SIGKILL, for one step and one checkpoint.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-110}
# A store for each start: in a shared one, restarted processes read addresses of dead ones (torch 2.13, pytorch#135712).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

exec torchrun --nnodes="$NODES" --nproc_per_node="$PROCESSES" --max-restarts="$MAX_RESTARTS" \
  --rdzv_backend=c10d --rdzv_endpoint="$HEAD:$PORT" --rdzv_id="$RUN_ID" \
  run_unlearn.py --config "$RECIPE" --target_model_name_or_path "$MODEL" --output_dir "$OUTPUT_DIR" \
  --save_strategy steps --save_steps "$SAVE_STEPS" --save_total_limit 2 --resume_from_checkpoint auto "$@"
