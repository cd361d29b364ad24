#!/usr/bin/env bash
# benchmarks/gpu.py on a machine with an NVIDIA GPU that has Python 3.12, PyTorch, Triton, transformers, accelerate and
# safetensors, and no network. What else it takes are wheels in wheels/, beside the repository's files:
#
#   pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
#     --platform manylinux_2_28_x86_64 --platform manylinux_2_24_x86_64 --platform manylinux2014_x86_64 \
#     --dest wheels peft==0.21.2 bitsandbytes==0.50.2 torchao==0.18.0 termcolor==3.3.0
#   pip wheel --no-deps --wheel-dir wheels hqq==0.2.8        # pure Python; there is no wheel of it to download
#
# peft (0.8 MiB) has to be there. The others are for the quantized bases alone, which are left out without them:
# bitsandbytes 41 MiB, torchao 3.2 MiB, hqq and termcolor 0.1 MiB. With the repository's 2.3 MiB that is 48 MiB. Of what
# curlora depends on, no more is imported here than these machines have; rich among it.
#
#   bash benchmarks/gpu.sh [options of gpu.py]
#
# Lines and log go to $OUT, or to the present folder. The script is ended after SECONDS_LIMIT seconds (420).
set -u -o pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
out=${OUT:-$PWD}
site=$(mktemp -d)
python=${PYTHON:-python3}
if compgen -G "$root/wheels/*.whl" >/dev/null; then
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --target "$site" \
    --find-links "$root/wheels" "$root"/wheels/*.whl || exit
fi
# curlora asks importlib.metadata for its version, and is not installed but read from src/.
version=$(sed -n 's/^version = "\(.*\)"/\1/p' "$root/pyproject.toml")
mkdir -p "$site/curlora-$version.dist-info"
printf 'Metadata-Version: 2.1\nName: curlora\nVersion: %s\n' "$version" >"$site/curlora-$version.dist-info/METADATA"
export PYTHONPATH="$root/src:$site" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
timeout --signal=TERM --kill-after=20 "${SECONDS_LIMIT:-420}" \
  "$python" "$root/benchmarks/gpu.py" --out "$out/gpu.jsonl" "$@" 2>"$out/gpu.log" | tee "$out/gpu.txt"
code=${PIPESTATUS[0]}
tail -n 20 "$out/gpu.log"
exit "$code"
