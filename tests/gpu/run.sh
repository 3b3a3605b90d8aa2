#!/usr/bin/env bash
# Proves the collection on a machine with one GPU, without a network.
#
#   bash tests/gpu/run.sh OUT [correct]                  all steps, at most 5 minutes
#   bash tests/gpu/run.sh OUT rerun [PREVIOUS_SUMMARY]   the steps that did not pass last time
#   bash tests/gpu/run.sh OUT speed                      chat_sft and TRL, at most 4 minutes
#
# OUT gets summary.txt, logs/NAME.log of each step, and both in logs.tar.gz; speed also writes
# speed.txt and speed.json. PREVIOUS_SUMMARY is a summary.txt; without it OUT/summary.txt is read.
# --dry-run, anywhere, prints every command and imports and collects every Python file they use.
# --jobs N runs so many steps side by side, --limit S ends all of them after S seconds.
# PYTHON names the interpreter, python3 without it. Wheels in .whl/ are installed into .site/ first.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=${PYTHON:-python3}
if [[ " $* " != *" --dry-run "* ]] && compgen -G "$root/.whl/*.whl" >/dev/null; then
  if [[ ! $root/.site -nt $root/.whl ]]; then
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade \
      --target "$root/.site" "$root"/.whl/*.whl
    touch "$root/.site"
  fi
fi
path=$root
if [[ -d $root/.site ]]; then path=$root/.site:$path; fi
export PYTHONPATH=$path${PYTHONPATH:+:$PYTHONPATH}
exec "$python" "$root/tests/gpu/run.py" "$@"
