# shellcheck shell=bash
# Sourced: links that lay out the packages of $root like the wheel, in the folder $site.
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
mkdir -p "$site/sid_fast/kernels"
ln -s "$root"/sid_fast/* "$site/sid_fast/" 2>/dev/null || true # fails for a link to kernels
ln -s "$root"/kernels/* "$site/sid_fast/kernels/"
ln -s "$root/benchmarks" "$root/tests" "$root/pyproject.toml" "$site/"
