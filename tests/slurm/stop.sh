#!/usr/bin/env bash
# Stops what start.sh has started in a folder, and the jobs it still runs.
folder=${1:?usage: stop.sh FOLDER}
export SLURM_CONF=$folder/slurm.conf
scancel --user="$(id -un)" 2>/dev/null
for daemon in slurmd slurmctld munge; do
    kill "$(cat "$folder/$daemon.pid")" 2>/dev/null
done
true
