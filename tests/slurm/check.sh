#!/usr/bin/env bash
# A real sweep on the real Slurm of start.sh: an array of four runs, of which two are pre-empted,
# one is killed, and one loses its job. The same command again makes what is missing, and all runs
# equal unbroken ones to the last bit. Takes some minutes.
#
#   tests/slurm/check.sh             (PYTHON=python3 chooses another)
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
await() { # what is waited for, as a command
    for _ in $(seq 180); do
        eval "$1" && return
        sleep 0.5
    done
    echo "waited in vain for: $1" >&2
    exit 1
}

say "Unbroken, for comparison"
sweep log_dir=whole results_dir=whole_results jobs=2 | grep done

say "The sweep as an array, two jobs at once"
. "$here/start.sh" slurm
on_slurm >out.txt 2>&1 &
waiting=$!
await '[ $(find logs -name "step-*" | wc -l) -ge 2 ]'
squeue

say "A job of higher priority takes both cores"
sbatch --partition=high --ntasks=2 --output=/dev/null --wrap="sleep 4"
await '[ "$(squeue -h -p high -t R)" ]'
squeue --array
await '[ -z "$(squeue -h -p high)" ] && [ "$(squeue -h -p low -t R)" ]'

say "kill -9 of a run, and of the job of another"
run_of() { pgrep -f "pogo_torchrl.experiments.worker .* seed=$1 resume=true"; }
has_saved() { compgen -G "logs/*/*/seed_$1/checkpoints/step-*" >/dev/null; }
await 'has_saved 2 && has_saved 3'
kill -9 "$(run_of 2)"
kill -9 "$(ps -o ppid= "$(run_of 3)")"
wait $waiting || true
cat out.txt

say "The same command again"
on_slurm

say "And again: nothing is left to do"
on_slurm

say "Against the unbroken runs"
PYTHONPATH=$here/.. "$python" - <<'PY'
from pathlib import Path

from runs import assert_same, state

for whole in sorted(Path("whole").glob("*/*/seed_*")):
    run = "logs" / whole.relative_to("whole")
    assert_same(state(run), state(whole))
    resumed = (run / "training" / "train.log").read_text().count("Resumed at")
    print(f"{run}: resumed {resumed} times, equal to the last bit")
PY
