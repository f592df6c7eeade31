#!/usr/bin/env bash
# Stops the Slurm that start.sh started in a folder, including its jobs, and waits for it to end.
folder=$(cd "${1:?usage: stop.sh FOLDER}" && pwd) || exit
export SLURM_CONF=$folder/slurm.conf

ours() { # processes with this name that belong to the folder
    for pid in $(pgrep -x "$1"); do
        grep -qszFx "SLURM_CONF=$SLURM_CONF" "/proc/$pid/environ" && echo "$pid"
    done
}
are_gone() { [ -z "$(ours "$1")" ]; }
no_jobs() { [ -z "$(squeue -h 2>/dev/null)" ] && are_gone slurmstepd; }
await() { # wait until a command succeeds
    for _ in $(seq 150); do
        "$@" && return
        sleep 0.1
    done
    return 1
}

are_gone slurmctld || { scancel --user="$(id -un)" && await no_jobs; }
# In this order: each daemon needs those that follow it to shut down cleanly.
for daemon in slurmd slurmstepd slurmctld munged; do
    for signal in TERM KILL; do
        are_gone $daemon && continue 2
        kill -$signal $(ours $daemon) 2>/dev/null
        await are_gone $daemon && continue 2
    done
    echo "still running: $daemon $(ours $daemon)" >&2
    exit 1
done
