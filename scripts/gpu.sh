#!/usr/bin/env bash
# Everything that only a GPU can show, in one command: the tests marked `gpu`, and the benches of kernels,
# autoregressive models and denoisers. Each part has its own time limit, runs even if another fails, and keeps its
# output in a file; what it printed last is repeated at the end.
#
#   scripts/gpu.sh [OUT]                          # default: gpu-report
#   PARTS="model" MODEL_SECONDS=150 scripts/gpu.sh
#   PARTS="distill" scripts/gpu.sh                # not among the default parts: four steps without guidance
#   PARTS="upcycle" UPCYCLE_SECONDS=540 scripts/gpu.sh  # the side-car for few tokens; only when named
#   PARTS="peers" scripts/gpu.sh                  # distances per computed step at 256 px in float32; only when named
#   TINY=1 scripts/gpu.sh                         # tries everything out on a CPU
#
# From a bare checkout, too: accel is copied onto the path as pyproject.toml maps it, and wheels in .whl/ are unpacked
# beside it; nothing is installed over what the machine has.
set -uo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "${1:-gpu-report}"
out=$(cd "${1:-gpu-report}" && pwd)
python=${PYTHON:-python3}
tiny=${TINY:+--tiny}
parts=${PARTS:-tests kernels ar model}
arch=${ARCH:-flux1} sizes=${SIZES:-512,1024} rows=${ROWS:-}
export CACHE_DIT_LOG_LEVEL=${CACHE_DIT_LOG_LEVEL:-error} PYTHONUNBUFFERED=1 COLUMNS=${COLUMNS:-200}

# Never the checkout itself: its folder `kernels` would be taken for Hugging Face's package of that name.
cd "$out" || exit 1
if ! "$python" -c "import accel.kernels, diffusers" 2>/dev/null; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  cp -r "$root/accel" "$site/accel"
  for folder in pipelines kernels evaluation configs; do cp -r "$root/$folder" "$site/accel/$folder"; done
  if compgen -G "$root/.whl/*.whl" >/dev/null; then
    "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" "$root"/.whl/*.whl
  fi
  export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi

failed=0

# minutes SECONDS: what a bench may take, its start and its end left out.
minutes() { "$python" -c "print(($1 - 15) / 60)"; }

# part NAME SECONDS COMMAND...: stdout into NAME.txt, stderr into NAME.log, and both to the terminal.
part() {
  local name=$1 seconds=$2 began=$SECONDS code
  shift 2
  [[ " $parts " == *" $name "* ]] || return 0
  echo "== $name, at most $seconds s: $*"
  timeout --kill-after=10 "$seconds" "$@" > >(tee "$name.txt") 2> >(tee "$name.log" >&2)
  code=$?
  wait # for what they still have to write
  ((code == 0)) || failed=1
  echo "$name: exit $code after $((SECONDS - began)) s" | tee "$name.end"
}

"$python" -m accel info >info.txt 2>info.log || { cat info.log; exit 1; }
rm -f ./*.end
part tests "${TESTS_SECONDS:-240}" "$python" -m pytest -c "$root/pyproject.toml" --rootdir "$root" -q -m gpu \
  -p no:cacheprovider ${TINY:+--collect-only} "$root/tests"
part kernels "${KERNELS_SECONDS:-110}" "$python" -m accel bench kernels kernels \
  --budget "$((${KERNELS_SECONDS:-110} - 45))" ${TINY:+--compile-only}
part ar "${AR_SECONDS:-210}" "$python" "$root/scripts/autoregressive_on_gpu.py" ar \
  --minutes "$(minutes "${AR_SECONDS:-210}")" $tiny
part model "${MODEL_SECONDS:-170}" "$python" -m accel bench model --arch "$arch" --size "$sizes" \
  --rounds "${ROUNDS:-1}" --steps "${STEPS:-24}" --minutes "$(minutes "${MODEL_SECONDS:-170}")" --out model \
  ${rows:+--rows "$rows"} $tiny
if [[ -n $tiny ]]; then stages=(--sizes 64 --shares 1 --seconds 1 --report 0); else stages=(--seconds "$((${DISTILL_SECONDS:-600} - 180))"); fi
part distill "${DISTILL_SECONDS:-600}" "$python" "$root/examples/distill_few_steps.py" --out distill "${stages[@]}"

part upcycle "${UPCYCLE_SECONDS:-300}" "$python" "$root/examples/upcycle_chunking.py" --out upcycle \
  --seconds "$((${UPCYCLE_SECONDS:-300} - 120))" ${TINY:+--seconds 1 --size 64 --log 1 --report 0}

if [[ -n $tiny ]]; then call=(--limit 2 --batch 2 --size 64 --steps 10 --only '^fast$'); else call=(--limit 24 --batch 24 --size 256 --steps 24,50,28); fi
part peers "${PEERS_SECONDS:-300}" "$python" -m accel bench peers peers --seed 37 --fine 0 --dtype float32 \
  --minutes "$(minutes "$((${PEERS_SECONDS:-300} - 45))")" "${call[@]}"

echo "== what each part printed last"
for name in tests kernels ar model distill upcycle peers; do
  [[ -f $name.end ]] || continue
  said=$name.txt
  [[ -f $name/$name.md ]] && said=$name/$name.md # whole, even if the part was stopped
  tail -n "${LAST_LINES:-30}" "$said"
  cat "$name.end"
done
exit $failed
