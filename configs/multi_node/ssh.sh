#!/bin/bash
# ssh: start the launcher on every host, and end all of them with Ctrl+C.
#   bash configs/multi_node/ssh.sh "HOST0 HOST1" WORDS OF ACCELERATE LAUNCH
# HOST0 is machine 0: the others must reach it by this name or address. Every host has this
# repository in the same folder. With PREFLIGHT=1 the preflight runs instead of the script.
set -euo pipefail
read -r -a hosts <<<"$1"
shift

run=(.venv/bin/accelerate launch)
if [ "${PREFLIGHT:-0}" = 1 ]; then run=(.venv/bin/python -m tools.preflight); fi
trap 'trap - INT TERM; kill 0' INT TERM
pids=()
for rank in "${!hosts[@]}"; do
    words=(--num_machines "${#hosts[@]}" --machine_rank "$rank" --main_process_ip "${hosts[0]}")
    command=$(printf '%q ' cd "$PWD")
    command+="&& exec $(printf '%q ' "${run[@]}" "${words[@]}" "$@")"
    # -tt: the launcher is ended when this connection is
    ssh -tt "${hosts[$rank]}" "$command" </dev/null 2>&1 | sed -u "s/^/${hosts[$rank]}: /" &
    pids+=($!)
done
code=0
for pid in "${pids[@]}"; do wait "$pid" || code=1; done
exit "$code"
