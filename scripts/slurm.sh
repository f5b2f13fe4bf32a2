#!/bin/bash
# A training under SLURM, on one node or many, that is stopped before its time is up, put back into the queue, and goes on.
#
#   sbatch scripts/slurm.sh --config configs/sd35-medium-full.yaml data.folder=my_pictures output.folder=runs/mine
#   sbatch --nodes 4 --gpus-per-node 8 scripts/slurm.sh --config configs/scratch-256.yaml
#   ACCELERATE_CONFIG=configs/accelerate/fsdp2-hybrid-2x8.yaml sbatch --nodes 2 scripts/slurm.sh --config ...
#
# What follows the script is what follows `latentfm train`; --resume is added where the output folder has a checkpoint. Start it in
# the folder that paths are relative to, on a disk that all nodes see; options of sbatch go before the script and win over those below.
#
#SBATCH --job-name=latentfm
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#
# Five minutes before the end SLURM sends SIGUSR1 to this script (a checkpoint of billions of weights takes its time: USR1@600). The
# script hands it to the trainings, which save after the step under way and leave; then the job goes back into the queue. Where jobs are
# preempted, PreemptParameters=send_user_signal sends the same signal; a bare SIGTERM saves too, if the grace time is long enough.

set -euo pipefail

gpus=${SLURM_GPUS_ON_NODE:-8}
nodes=${SLURM_NNODES:-1}
config=${ACCELERATE_CONFIG:-configs/accelerate/multi-node.yaml}
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000))

answer=$(python - "$@" <<'PYTHON'
import argparse
import json
from latentfm.config import load_config
from latentfm.files import expanded

parser = argparse.ArgumentParser()
parser.add_argument("--config", "-c")
parser.add_argument("--resume", action="store_true")
parser.add_argument("overrides", nargs="*")
given = parser.parse_intermixed_args()
config = load_config(given.config, given.overrides)
out = expanded(config.output.folder)
try:
    done = json.loads((out / "model" / "latentfm.json").read_text("utf-8"))["trained"]["steps"]
except Exception:
    done = config.train.steps
saved = any((out / "checkpoints").glob("step-*/state.json"))
finished = (out / "model").exists() and done >= config.train.steps
print("finished" if finished else "saved" if saved else "new", out, end="")
PYTHON
)
state=${answer%% *} out=${answer#* }

if [ "$state" = finished ]; then
    echo "finished already: $out/model"
    exit 0
fi
if [ "$state" = saved ] && [[ " $* " != *" --resume "* ]]; then
    set -- "$@" --resume
fi
began=$(mktemp)
trap 'rm -f "$began"' EXIT

# On each node one launcher, deaf to the signal that would end it, and a shell that hands the signal to the launcher's children, the
# trainings: they inherit the deafness until they listen themselves.
# shellcheck disable=SC2016  # expanded on the nodes
node='
(trap "" USR1; exec accelerate launch --config_file "$CONFIG" --num_machines "$NODES" --num_processes "$PROCESSES" \
    --machine_rank "${SLURM_NODEID:-0}" --main_process_ip "$FIRST" --main_process_port "$PORT" -m latentfm train "$@") &
launcher=$!
trap "pkill -USR1 -P $launcher" USR1
wait "$launcher" && status=0 || status=$?
while kill -0 "$launcher" 2> /dev/null; do wait "$launcher" && status=0 || status=$?; done  # a signal ends a wait
wait "$launcher" && status=0 || status=$?  # what it ended with, if a signal came last
exit "$status"
'
export CONFIG="$config" NODES="$nodes" PROCESSES=$((nodes * gpus)) FIRST="$first" PORT="$port"

srun --nodes="$nodes" --ntasks-per-node=1 --kill-on-bad-exit=1 bash -c "$node" node "$@" &
step=$!
stopped=""
# shellcheck disable=SC2329  # the trap does
stop() {
    stopped=1
    (   # again and again: they are deaf while they start; and if they fill the cache all the while, without them
        end=$((SECONDS + ${GRACE:-240}))
        while [ "$SECONDS" -lt "$end" ]; do
            kill -USR1 "$step" 2> /dev/null || exit 0
            sleep 2
        done
        echo "still busy; back into the queue from the newest checkpoint"
        scontrol requeue "$SLURM_JOB_ID"
    ) &
}
trap stop USR1
wait "$step" && status=0 || status=$?
while kill -0 "$step" 2> /dev/null; do wait "$step" && status=0 || status=$?; done
wait "$step" && status=0 || status=$?

if [ -n "$stopped" ] && [ ! "$out/model" -nt "$began" ] && { [ "$status" -eq 0 ] || [ "$status" -gt 128 ]; }; then
    echo "saved; back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
