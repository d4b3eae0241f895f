#!/usr/bin/env bash
# A Slurm of one node on this machine (Debian: apt-get install slurmctld slurmd slurm-client munge; as root), to try --slurm for real:
#   tests/one_node_slurm.sh start && ./run_all.sh --profile test --slurm partition=kn,cpus=1; tests/one_node_slurm.sh stop
# There is no accounting database, so submitit cannot ask sacct about lost jobs here; finished ones are seen by their files.
set -euo pipefail
state=${KN_SLURM:-/tmp/kn-slurm}
export SLURM_CONF=/etc/slurm/slurm.conf
case "${1:-}" in
start)
  mkdir -p "$state/ctld" "$state/d" /run/munge /etc/slurm
  [ -f /etc/munge/munge.key ] || dd if=/dev/urandom bs=1 count=1024 of=/etc/munge/munge.key 2>/dev/null
  chown -R munge: /etc/munge /run/munge /var/lib/munge /var/log/munge; chmod 400 /etc/munge/munge.key
  pgrep munged >/dev/null || runuser -u munge -- /usr/sbin/munged
  memory=$(awk '/MemTotal/ {print int($2 / 1024 * 0.9)}' /proc/meminfo)
  cat > "$SLURM_CONF" <<CONF
ClusterName=kn
SlurmctldHost=$(hostname -s)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
ReturnToService=2
StateSaveLocation=$state/ctld
SlurmdSpoolDir=$state/d
SlurmctldLogFile=$state/ctld.log
SlurmdLogFile=$state/d.log
SlurmctldPidFile=$state/ctld.pid
SlurmdPidFile=$state/d.pid
NodeName=$(hostname -s) CPUs=$(nproc) RealMemory=$memory State=UNKNOWN
PartitionName=kn Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
  pgrep slurmctld >/dev/null || slurmctld -c
  pgrep slurmd >/dev/null || slurmd
  for _ in $(seq 30); do [ "$(sinfo -h -o %t 2>/dev/null)" = idle ] && break; sleep 1; done
  sinfo
  ;;
stop) pkill slurmd || true; pkill slurmctld || true; pkill munged || true ;;
*) echo "usage: $0 start | stop" >&2; exit 2 ;;
esac
