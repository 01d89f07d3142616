#!/usr/bin/env bash
# Trains on GPU nodes under Slurm: installs var_jax into .venv and submits one job, with one process for each GPU: so
# jax counts, it gives process i of a node the node's GPU i. Run it on a login node, from a clone on storage that all
# nodes see. Before the time limit the processes are told to stop, save the same step, and the job queues itself again
# and goes on from there, until the training is done; likewise when it is preempted or a node fails. scancel ends it.
#
#   bash launch/slurm.sh --nodes=N --gpus=N [FLAGS] -- --config=FILE.py:STAGE --workdir=DIR [...]
#
#   --nodes=N            how many nodes
#   --gpus=N             GPUs of each node
#   --cpus=N             CPU cores for each GPU, which read images (default 8)
#   --time=LIMIT         of one run of the job, as sbatch takes it (default 24:00:00)
#   --grace=SECONDS      to save before the time limit (default 120)
#   --partition=P --account=A --qos=Q --name=N    as sbatch takes them (the name is var_jax by default)
#   --dry_run            prints the commands, the batch script within, and runs none
#
# What stands after `--` goes to `python -m var_jax train`, which runs in the repository: relative paths begin there. The
# workdir has to be on storage that all nodes see; the log is WORKDIR/slurm-JOB.log. PYTHON=/path/to/python3.11 where
# python3 is older.
# Exit status: 0 when submitted, 2 for bad input, else sbatch's.
#
# example:
#   bash launch/slurm.sh --nodes=4 --gpus=8 --partition=gpu -- --config=experiments/imagenet256.py:generator,depth=16 \
#     --workdir=runs/d16 --config.data.path=/data/imagenet2012/5.1.0 --config.tokenizer=runs/tokenizer
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh

# seconds LIMIT: of a time limit as sbatch takes it (minutes, H:M:S, days-H and so on); 0 for one without end.
seconds() {
  local days=0 hours=0 minutes=0 rest=0 clock=${1#*-}
  IFS=: read -r hours minutes rest <<< "$clock"
  if [ "$1" != "$clock" ]; then
    days=${1%%-*}
  elif [ -z "$rest" ]; then  # minutes, or minutes:seconds
    rest=$minutes minutes=$hours hours=0
  fi
  echo $((86400 * 10#$days + 3600 * 10#$hours + 60 * 10#${minutes:-0} + 10#${rest:-0}))
}

nodes='' gpus='' cpus=8 time=24:00:00 grace=120 name=var_jax dry_run='' options=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  case $1 in
    --help|-h) show_help launch/slurm.sh ;;
    --nodes=*) nodes=$(positive "$1") ;;
    --gpus=*) gpus=$(positive "$1") ;;
    --cpus=*) cpus=$(positive "$1") ;;
    --grace=*) grace=$(positive "$1") ;;
    --time=*) time=${1#*=}
      [[ $time =~ ^([0-9]{1,5}-)?[0-9]{1,5}(:[0-9]{1,5}){0,2}$ ]] ||
        error "$1 is no time limit: write it as --time=24:00:00" ;;
    --name=?*) name=$(one_word "$1") ;;
    --partition=?*|--account=?*|--qos=?*) options+=("${1%%=*}=$(one_word "$1")") ;;
    --dry_run) dry_run=1 ;;
    *) error "there is no flag $1, or its value is missing: see \`bash launch/slurm.sh --help\`; the arguments of" \
         'training stand after --' ;;
  esac
  shift
done
[ -n "$nodes" ] && [ -n "$gpus" ] || error '--nodes or --gpus is missing: give both'
limit=$(seconds "$time")
[ "$limit" -gt "$grace" ] || [ "$limit" = 0 ] ||
  error "--time=$time leaves no more than the $grace s that saving has: write a longer one, or a smaller --grace"
[ $# -gt 1 ] || error 'the arguments of training are missing: write -- --config=FILE.py:STAGE --workdir=DIR'
shift
read_training "$@"
workdir=$(local_path "$workdir")
config=$(local_path "$config")
[ -n "$workdir" ] || error 'the workdir is missing: write --workdir=DIR after --, on storage that all nodes see'
[ -f "$config" ] || error "there is no experiment $config in $PWD: see experiments/, or check the path"

# Quoted for sh, which runs the batch script.
training=
for argument; do
  [[ $argument =~ ^[a-zA-Z0-9_./:=,@%+-]+$ ]] || argument="'${argument//\'/\'\\\'\'}'"
  training+=" $argument"
done

# SIGTERM reaches the training by --signal, which without B: means the job's steps and not this script, or by scancel
# and preemption, which mean both: the trap lets the script wait for srun. All processes save before they end, so the
# first to end must not make Slurm kill the others. A job that was cancelled is no longer RUNNING and stays cancelled.
# 128 + a signal: training was told to stop, and saved (129 SIGHUP, 138 SIGUSR1, 140 SIGUSR2, 143 SIGTERM). 75: a process
# was lost, and the others with it; 134: jax aborted for it.
batch=". launch/environment.sh
trap : TERM
srun --kill-on-bad-exit=0 --gpu-bind=none --cpus-per-task=$cpus \
  .venv/bin/python -m var_jax train --distributed=auto$training
status=\$?
echo \"training ended with exit status \$status\"
case \$status in
  129|138|140|143|75|134) ! scontrol show job \$SLURM_JOB_ID | grep -q JobState=RUNNING || scontrol requeue \$SLURM_JOB_ID ;;
esac
exit \$status"

[ -n "$dry_run" ] || command -v sbatch > /dev/null ||
  error 'there is no sbatch here: run this on a login node of Slurm, or with --dry_run to see what it would do'
run install_var_jax '.[cuda,tfds]'
run mkdir -p "$workdir"
run sbatch --job-name="$name" --nodes="$nodes" --ntasks-per-node="$gpus" --gpus-per-node="$gpus" \
  --cpus-per-task="$cpus" --time="$time" --signal="TERM@$grace" --requeue --open-mode=append \
  --output="$workdir/slurm-%j.log" "${options[@]}" --wrap="$batch"
