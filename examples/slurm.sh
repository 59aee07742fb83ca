#!/bin/bash
# Two machines of eight GPUs. A requeued job goes on from its last checkpoint; the signal comes two minutes before the end, to leave time for saving.
#SBATCH --job-name=ows
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gres=gpu:8
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --signal=SIGUSR1@120
srun python main.py fit --config configs/models/llama2_70b.yaml --config configs/strategies/fsdp2.yaml --trainer.num_nodes 2 --ckpt_path last "$@"
