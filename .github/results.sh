#!/usr/bin/env bash
# results.sh BASE: run a small workflow on BASE and on HEAD, and print what differs, as Markdown.
set -euo pipefail
base=$(git merge-base "$1" HEAD) head=$(git rev-parse HEAD)
small=(-S 'seeds=[0,1]' -S train.epochs=3 -S visualize.steps=10 -S sweep.workers=2 -S runtime.threads=1)

try() { # commit, name of the experiment
  git checkout --quiet --force "$1"
  make --silent .venv/.ready
  .venv/bin/dvc exp run --force --quiet -n "$2" "${small[@]}"
}
export PATH="$PWD/.venv/bin:$PATH"
{
  git config user.name >/dev/null || git config user.name results
  git config user.email >/dev/null || git config user.email results@localhost
  try "$base" results-base
  try "$head" results-head
} >&2

echo "## Results of ${head:0:9}, against ${base:0:9}"
echo "Two seeds of digits and 3 epochs: this shows that something has changed, not what is better."
echo
dvc metrics diff results-base results-head --md
echo
sed 's/^#/##/' reports/tables.md
sed 's/^#/##/' reports/claims.md
