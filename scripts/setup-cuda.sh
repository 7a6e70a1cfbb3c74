#!/usr/bin/env bash
# Installs CUDA's compiler, nvcc 13.0, into .cuda/ of the checkout, from Python wheels: .cuda/bin/nvcc.
# `cargo build --features cuda` finds it there. Needs python3 with pip and about 400 MB; no GPU.
# Does nothing if it is there already.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

packages=(
  'nvidia-cuda-nvcc==13.0.*'
  'nvidia-cuda-crt==13.0.*'
  'nvidia-cuda-runtime==13.0.*'
  'nvidia-cuda-cccl==13.0.*'
  'nvidia-nvvm==13.0.*'
)
nvcc=.cuda/bin/nvcc

works() {
  [[ -x $nvcc ]] && "$nvcc" --version 2>/dev/null | grep -q 'release 13\.0'
}
fail() {
  echo "setup-cuda: $*" >&2
  exit 1
}

if works; then
  echo "$nvcc is there: $("$nvcc" --version | grep release)" >&2
  exit 0
fi

[[ $(uname -s) == Linux ]] || fail "the wheels are for Linux, this is $(uname -s); install CUDA 13.0 and set CUDA_HOME"
command -v python3 >/dev/null || fail "python3: not found; install Python 3.9 or newer, or CUDA 13.0 and set CUDA_HOME"
command -v g++ >/dev/null || fail "g++: not found; nvcc needs it: install a C++ compiler"

# A pip of our own where the system has none for its python3.
python=(python3)
if ! python3 -m pip --version >/dev/null 2>&1; then
  python3 -m venv .cuda/venv >/dev/null 2>&1 ||
    fail "python3 has neither pip nor venv; install python3-pip or python3-venv"
  python=(.cuda/venv/bin/python)
fi

# Elsewhere first, so that an interrupted run leaves nothing that looks whole.
rm -rf .cuda/unfinished .cuda/wheels .cuda/bin
mkdir -p .cuda/bin
echo "installing ${packages[*]} into .cuda/" >&2
PIP_ROOT_USER_ACTION=ignore "${python[@]}" -m pip install --quiet --disable-pip-version-check --no-warn-script-location \
  --only-binary :all: --target .cuda/unfinished "${packages[@]}" ||
  fail "pip could not install the wheels; its message is above"
mv .cuda/unfinished .cuda/wheels
root=$PWD/.cuda/wheels/nvidia/cu13
[[ -x $root/bin/nvcc ]] || fail "the wheels hold no nvidia/cu13/bin/nvcc; their layout has changed"

# nvcc finds the rest of the toolkit beside itself, so a script calls it where it lies.
cat >"$nvcc" <<'SCRIPT'
#!/bin/sh
exec "$(dirname "$(readlink -f "$0")")/../wheels/nvidia/cu13/bin/nvcc" "$@"
SCRIPT
chmod +x "$nvcc"
works || fail "$nvcc does not run: $("$nvcc" --version 2>&1 | head -n 3)"

# One kernel through the whole of it: the compiler proper, ptxas and the C++ compiler beneath.
test_dir=$(mktemp -d)
trap 'rm -rf "$test_dir"' EXIT
echo '__global__ void f(float *x) { x[threadIdx.x] *= 2; }' >"$test_dir/test.cu"
"$nvcc" -fatbin -arch=sm_90 -o "$test_dir/test.fatbin" "$test_dir/test.cu" ||
  { rm -f "$nvcc"; fail "$nvcc cannot compile a kernel; its message is above"; }
echo "$nvcc: $("$nvcc" --version | grep release)" >&2
