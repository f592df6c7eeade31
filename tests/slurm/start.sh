#!/usr/bin/env bash
# A Slurm installation on a single machine for tests: munge, controller and node in one folder,
# without systemd, cgroups, accounting or root. Requires slurm-wlm and munge from Debian or Ubuntu.
#
#   . tests/slurm/start.sh FOLDER     starts Slurm and configures the commands of this shell for it
#   tests/slurm/stop.sh FOLDER        stops it
#
# Jobs in partition "low" are preempted by "high": they get SIGTERM, 30 s to save, and are requeued.

_pogo_slurm() {
    local folder
    mkdir -p "$1" && folder=$(cd "$1" && pwd) || return
    mkdir -p "$folder"/{state,spool}
    chmod 755 "$folder"
    export SLURM_CONF=$folder/slurm.conf

    # munge's secret key, random for this folder.
    [ -e "$folder/munge.key" ] || (umask 077 && head -c 128 /dev/urandom >"$folder/munge.key")
    munged --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" \
        --pid-file="$folder/munge.pid" --log-file="$folder/munge.log" \
        --seed-file="$folder/munge.seed" || return

    cat >"$SLURM_CONF" <<CONF
ClusterName=pogo
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
SlurmctldPort=36817
SlurmdPort=36818
# A requeued job waits until its old credential expires: 5 s instead of two minutes.
AuthInfo=socket=$folder/munge.socket,cred_expire=5
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=10
SchedulerParameters=sched_interval=5,bf_interval=5
ReturnToService=2
SlurmdParameters=config_overrides
NodeName=$(hostname -s) NodeAddr=127.0.0.1 CPUs=2 RealMemory=$(free -m | awk "/^Mem/ {print \$2}") State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=30
PartitionName=high Nodes=ALL PriorityTier=2 PreemptMode=OFF
CONF
    slurmctld -c && slurmd -c || return

    local i
    for i in $(seq 30); do
        [ "$(sinfo -h -p low -o %T 2>/dev/null)" = idle ] && return
        sleep 1
    done
    echo "Slurm did not start; see $folder/slurmctld.log and $folder/slurmd.log" >&2
    return 1
}

_pogo_slurm "${1:?usage: . start.sh FOLDER}"
