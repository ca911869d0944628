#!/usr/bin/env bash
# One host, several engine processes: PROCESSES of DEVICES virtual CPU devices each, cut as MESH says.
#   MODEL=checkpoints/nova-small PROCESSES=2 DEVICES=2 MESH=tensor=2,data=2 launch/local.sh [more flags]
# On a GPU host leave DEVICES empty; one process takes all GPUs.
set -euo pipefail
exec "${PYTHON:-python}" -m novajax.launch \
  --model="${MODEL:-checkpoints/nova-small}" \
  --processes="${PROCESSES:-2}" \
  ${DEVICES:+--devices_per_process="$DEVICES"} \
  --mesh="${MESH:-tensor=2}" \
  "$@"
