#!/usr/bin/env bash
# Runs a sweep of four runs on the Slurm started by start.sh: two runs are preempted, one is killed,
# and one loses its job. The same command is then run again to complete the sweep, and all runs are
# checked to be bitwise identical to uninterrupted ones. Takes a few minutes.
#
#   tests/slurm/check.sh             (PYTHON=python3 selects another interpreter)
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python}
folder=$(mktemp -d)
cd "$folder"
export OMP_NUM_THREADS=1
trap '"$here/stop.sh" slurm; echo "all files: $folder"' EXIT
mkdir -p logs

cat >sweep.yaml <<'YAML'
common:
  {total_steps: 1500, eval_interval: 750, eval_episodes: 1, log_interval: 100,
   checkpoint_interval: 100, batch_size: 16, hidden_sizes: [16], compile: false, device: cpu,
   data: {size: 2000, cache_dir: cache}, seeds: [0, 1, 2, 3]}
environments: {hopper: {medium: {w2_weights: [0.1, 0.5]}}}
YAML
sweep() { "$python" "$here/../../examples/pogo_sweep.py" sweep=sweep.yaml "$@"; }
on_slurm() { sweep launcher=slurm slurm.partition=low slurm.timeout_min=10 slurm.cpus_per_task=1; }
say() { printf '\n# %s\n' "$*"; }
await() { # wait until a shell condition holds
    for _ in $(seq 180); do
        eval "$1" && return
        sleep 0.5
    done
    echo "timed out waiting for: $1" >&2
    exit 1
}

say "Uninterrupted runs, for comparison"
sweep log_dir=uninterrupted results_dir=uninterrupted_results jobs=2 | grep done

say "The sweep as an array, two jobs in parallel"
. "$here/start.sh" slurm
on_slurm >out.txt 2>&1 &
waiting=$!
await '[ $(find logs -path "*/step-*/sha256.json" | wc -l) -ge 2 ]'
squeue

say "A job of higher priority takes both cores"
sbatch --partition=high --ntasks=2 --output=/dev/null --wrap="sleep 4"
await '[ "$(squeue -h -p high -t R)" ]'
squeue --array
await '[ -z "$(squeue -h -p high)" ] && [ "$(squeue -h -p low -t R)" ]'

say "kill -9 of one run, and of the job of another"
run_of() { pgrep -f "pogo_torchrl.experiments.worker .* seed=$1 resume=true"; }
has_saved() { compgen -G "logs/*/*/seed_$1/checkpoints/step-*/sha256.json" >/dev/null; }
await 'has_saved 2 && has_saved 3'
kill -9 "$(run_of 2)"
kill -9 "$(ps -o ppid= "$(run_of 3)")"
wait $waiting || true
cat out.txt

say "The same command again"
on_slurm

say "And again: nothing left to do"
on_slurm

say "Comparison with the uninterrupted runs"
PYTHONPATH=$here/.. "$python" - <<'PY'
from pathlib import Path

from runs import assert_same, state

for uninterrupted in sorted(Path("uninterrupted").glob("*/*/seed_*")):
    run = "logs" / uninterrupted.relative_to("uninterrupted")
    assert_same(state(run), state(uninterrupted))
    resumed = (run / "training" / "train.log").read_text().count("Resumed at")
    print(f"{run}: resumed {resumed} times, bitwise identical")
PY
