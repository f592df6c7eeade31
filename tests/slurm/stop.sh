#!/usr/bin/env bash
# Stops what start.sh has started in a folder, and the jobs it still runs; returns when all is gone.
folder=$(cd "${1:?usage: stop.sh FOLDER}" && pwd) || exit
export SLURM_CONF=$folder/slurm.conf

ours() { # the processes of a name that belong to this folder
    for pid in $(pgrep -x "$1"); do
        grep -qszFx "SLURM_CONF=$SLURM_CONF" "/proc/$pid/environ" && echo "$pid"
    done
}
are_gone() { [ -z "$(ours "$1")" ]; }
no_jobs() { [ -z "$(squeue -h 2>/dev/null)" ] && are_gone slurmstepd; }
await() { # what is waited for, as a command
    for _ in $(seq 150); do
        "$@" && return
        sleep 0.1
    done
    return 1
}

are_gone slurmctld || { scancel --user="$(id -un)" && await no_jobs; }
# One after the other: each needs those that follow to end in peace.
for daemon in slurmd slurmstepd slurmctld munged; do
    for signal in TERM KILL; do
        are_gone $daemon && continue 2
        kill -$signal $(ours $daemon) 2>/dev/null
        await are_gone $daemon && continue 2
    done
    echo "still there: $daemon $(ours $daemon)" >&2
    exit 1
done
