#!/usr/bin/env bash
# Run benchmarks/gpu.py on a machine without a network that has an NVIDIA GPU, Python 3.12, PyTorch, Triton, transformers,
# accelerate and safetensors. Put these wheels into wheels/ at the top of the repository:
#
#   pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
#     --platform manylinux_2_28_x86_64 --platform manylinux_2_24_x86_64 --platform manylinux2014_x86_64 \
#     --dest wheels peft==0.21.2 bitsandbytes==0.50.2 torchao==0.18.0 termcolor==3.3.0
#   pip wheel --no-deps --wheel-dir wheels hqq==0.2.8        # PyPI has only a source archive, in pure Python
#
# peft (0.8 MiB) is required. The others are for quantized base models, which are left out without them: bitsandbytes
# 41 MiB, torchao 3.2 MiB, hqq and termcolor 0.1 MiB. With the repository's 2.3 MiB the total is 48 MiB. Of curlora's
# other dependencies only rich is needed; pydantic, datasets, gguf and platformdirs are not imported.
#
#   bash benchmarks/gpu.sh                                   # all stages, in SECONDS_LIMIT seconds (420)
#   bash benchmarks/gpu.sh --only check bandwidth            # options of gpu.py
#
# Results, tables and log are written to $OUT, or to the current folder.
set -u -o pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
out=${OUT:-$PWD}
python=${PYTHON:-python3}
limit=${SECONDS_LIMIT:-420}
for_quantized=70
site=$(mktemp -d)

install() { # install the named wheels of wheels/ into a folder
  local folder=$1 name wheel
  shift
  for name in "$@"; do
    for wheel in "$root"/wheels/"$name"-*.whl; do
      [ -e "$wheel" ] || continue
      "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --find-links "$root/wheels" \
        --upgrade --target "$folder" "$wheel" || echo "$wheel was not installed" >&2
    done
  done
}

run() { # run gpu.py with a time limit in seconds and the other arguments
  local seconds=$1
  shift
  timeout --signal=TERM --kill-after=15 "$seconds" "$python" "$root/benchmarks/gpu.py" \
    --out "$out/gpu.jsonl" --seconds $((seconds > 60 ? seconds - 30 : seconds / 2)) "$@" 2>>"$out/gpu.log" | tee -a "$out/gpu.txt"
}

install "$site" peft
# curlora is imported from src/ without being installed, but asks importlib.metadata for its version. The real one is
# computed from git tags when a wheel is built.
version=0.0.0
mkdir -p "$site/curlora-$version.dist-info"
printf 'Metadata-Version: 2.1\nName: curlora\nVersion: %s\n' "$version" >"$site/curlora-$version.dist-info/METADATA"
export PYTHONPATH="$root/src:$site" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
if [ $# -gt 0 ] && [ "$*" != --tiny ]; then
  run "$limit" "$@"
  code=$?
else
  run $((limit - for_quantized)) --without quantized "$@"
  code=$?
  install "$site/quantized" bitsandbytes torchao hqq termcolor
  PYTHONPATH="$PYTHONPATH:$site/quantized" run "$for_quantized" --only quantized "$@"
fi
tail -n 20 "$out/gpu.log"
exit "$code"
