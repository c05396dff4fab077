#!/bin/bash
# One task on its node, before Python starts:   srun ... env --block-signal=TERM,USR2,INT bash slurm/node_env.sh TABLE
# TABLE (launchers/slurm/script.py wrote it) says who the task is, by node and number on the node, and brings the site's
# variables, its prelude and its container. The stop signals are blocked until the rank has its handlers.
table=$1
here=${SLURMD_NODENAME:-$(hostname)}

fail() { # CODE WORDS...
  echo "node_env.sh on $here: ${*:2}" >&2
  exit "$1"
}
misplaced() {
  fail 69 "the plan of this job has no task ${SLURM_LOCALID:-?} on this node; the job's output has the plan"
}

[ -r "$table" ] || fail 78 "$table is not here: run.root must be one folder that all nodes share"
# shellcheck disable=SC1090
. "$table"
# Like under the other launchers: the log has all of a rank but the progress of rank 0, which is the job's output.
echo "--- attempt $MOE_DIST_ATTEMPT_ID, $(date '+%F %T %z'), $here" >>"$log" || fail 78 "$log cannot be written"
prelude >>"$log" 2>&1 || fail 78 "this line of the cluster file's prelude failed: $failed; $log has its words"
if [ "$RANK" = 0 ]; then
  exec "${container[@]}" "${command[@]}" 2>>"$log"
fi
exec "${container[@]}" "${command[@]}" >>"$log" 2>&1
