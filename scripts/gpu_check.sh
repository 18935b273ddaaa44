#!/usr/bin/env bash
# Everything that a GPU has to show, in stages of under ten minutes:   scripts/gpu_check.sh [a] [b] [c] [d] [key=value ...]
# What the stages are, and the options: python scripts/gpu_check.py --help
# However a stage ends, what it wrote is packed into a few small files under out= ($OUT, or outputs/gpu_check).
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

stages=() options=() seconds=560
for word in "$@"; do
  case $word in
    [abcd]) stages+=("$word") ;;
    seconds=*) seconds=${word#*=}; options+=("$word") ;;
    *=*) options+=("$word") ;;
    -h | --help) exec "$python" scripts/gpu_check.py --help ;;
    *) echo "'$word' is no stage and no option; stages are a, b, c, d, options key=value" >&2; exit 2 ;;
  esac
done
[[ $seconds =~ ^[1-9][0-9]*$ ]] || { echo "seconds=$seconds is no whole number above 0; give the seconds of a stage" >&2; exit 2; }
[ ${#stages[@]} -gt 0 ] || stages=(a b c d)
[[ ${stages[*]} == *[cd]* ]] && stages=(data "${stages[@]}") # a mistake in the data of c and d is found before a and b

child=0
pack() { "$python" scripts/gpu_check.py pack ${options[@]+"${options[@]}"}; }
stop() { # a signal: end the stage, which ends what it started, and keep what there is
  trap '' TERM INT HUP
  [ "$child" -gt 0 ] && kill -TERM "$child" 2>/dev/null && wait "$child"
  pack
  exit 143
}
trap stop TERM INT HUP

worst=0
for stage in "${stages[@]}"; do
  timeout --kill-after=30 "$seconds" "$python" scripts/gpu_check.py "$stage" ${options[@]+"${options[@]}"} &
  child=$!
  wait "$child"
  code=$?
  child=0
  [ "$code" -gt "$worst" ] && worst=$code
  pack || worst=$?
  [ "$code" -eq 2 ] && break
done
exit "$worst"
