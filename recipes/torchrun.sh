#!/usr/bin/env bash
# Train on all GPUs of one or more machines that you log in to yourself.
#   GPUS=1 NAME=first recipes/torchrun.sh experiment=one_gpu         one GPU
#   NAME=paper recipes/torchrun.sh experiment=paper assignment=hetero        the 8 GPUs of this machine
#   NODES=2 NODE=0 HEAD=10.0.0.1 recipes/torchrun.sh ...             two machines with 8 GPUs: this line on the first,
#   NODES=2 NODE=1 HEAD=10.0.0.1 recipes/torchrun.sh ...             and this one on the second, which sees the same disk
# NAME is the run, in outputs/NAME (`run` without it); the same command continues it. Where torch sees no GPU it stops; device=cpu as an option trains there.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${GPUS:=8}"         # of each machine
: "${NODES:=1}"        # machines
: "${NODE:=0}"         # which of them this is
: "${HEAD:=localhost}" # the address of the first
: "${PORT:=29500}"     # a free port there
: "${NAME:=run}"
: "${TORCHRUN:=$([ -x .venv/bin/torchrun ] && echo .venv/bin/torchrun || echo torchrun)}"
for word in "GPUS=$GPUS" "NODES=$NODES"; do
  [[ ${word#*=} =~ ^[1-9][0-9]*$ ]] && continue
  echo "$word is not a whole number above 0; give one, such as ${word%%=*}=1" >&2
  exit 2
done
exec "$TORCHRUN" --nnodes="$NODES" --node_rank="$NODE" --nproc_per_node="$GPUS" --master_addr="$HEAD" --master_port="$PORT" \
  train.py output_dir="outputs/$NAME" resume=auto device=cuda "$@"
