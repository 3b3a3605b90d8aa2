#!/bin/bash
# SLURM: `sbatch configs/multi_node/slurm.sh`, in the folder of this repository. All nodes must see
# this folder. `srun` starts one launcher per node, and the launcher one process per GPU.
#SBATCH --job-name=chat_sft
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.txt
set -eu

export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK  # which srun does not take from sbatch by itself
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
words=(
    --config_file configs/multi_node/zero3_2x8.yaml
    --num_machines "$SLURM_JOB_NUM_NODES"
    --num_processes "$((SLURM_JOB_NUM_NODES * SLURM_GPUS_ON_NODE))"
    --main_process_ip "$first"
    --mixed_precision bf16
    examples/chat_sft.py
    --use_peft_lora --packing --output_dir outputs/chat
    --save_strategy steps --save_steps 100 --resume_from_checkpoint True
)
# The node's number is known on the node only, so the inner command stands in single quotes.
# shellcheck disable=SC2016
srun bash -c 'exec .venv/bin/python -m tools.preflight --machine_rank "$SLURM_NODEID" "$@"' \
    preflight "${words[@]}"
# 0: if a node is lost, the heartbeat ends the others, after they have written what they write.
# shellcheck disable=SC2016
srun --kill-on-bad-exit=0 \
    bash -c 'exec .venv/bin/accelerate launch --machine_rank "$SLURM_NODEID" "$@"' \
    train "${words[@]}"
