#!/bin/bash
# Starts one task on its node:   srun ... env --block-signal=TERM,USR2,INT bash slurm/node_env.sh TABLE
# TABLE (from launchers/slurm/script.py) maps node and local id to the task's rank, and contains the site's variables,
# prelude and container. The stop signals stay blocked until the rank has installed its handlers.
table=$1
here=${SLURMD_NODENAME:-$(hostname)}

fail() { # EXIT_CODE MESSAGE...
  echo "node_env.sh on $here: ${*:2}" >&2
  exit "$1"
}
misplaced() {
  fail 69 "the plan of this job has no task ${SLURM_LOCALID:-?} on this node; see the plan in the job's output"
}

[ -r "$table" ] || fail 78 "$table is missing on this node: run.root must be a folder that all nodes share"
# shellcheck disable=SC1090
. "$table"
# The log gets all output except the progress of rank 0, which goes into the job's output. The other launchers do the same.
echo "--- attempt $MOE_DIST_ATTEMPT_ID, $(date '+%F %T %z'), $here" >>"$log" || fail 78 "$log is not writable"
prelude >>"$log" 2>&1 || fail 78 "this line of the cluster file's prelude failed: $failed; $log has its output"
if [ "$RANK" = 0 ]; then
  exec "${container[@]}" "${command[@]}" 2>>"$log"
fi
exec "${container[@]}" "${command[@]}" >>"$log" 2>&1
