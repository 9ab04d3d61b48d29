# What .ci/run and .ci/weekly share: fresh environments, and pytest's closing line of each suite.
# shellcheck shell=bash
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_QUIET=1

# The lowest Python that pyproject.toml promises, where this machine has it.
lowest_python=$(sed -n 's/^requires-python = ">=\(.*\)"/\1/p' pyproject.toml)
python=$(command -v "python$lowest_python" || command -v python3)
# The newest transformers that was tested.
newest=5.24.0

say() { printf '\n== %s\n' "$*"; }

# The first line of each ```bash block under "## Install" in the README.
readme_command() { awk '/^## /{on=($0=="## Install")} on&&/^```bash/{getline; print}' README.md | sed -n "$1p"; }

# suite NAME COMMAND…: run tests, and keep their closing line for the end.
suite() {
  local name=$1
  shift
  "$@" 2>&1 | tee "$work/log"
  printf '%-44s %s\n' "$name" "$(tail -n 1 "$work/log")" >> "$work/closing"
}

# developer: a fresh environment by the README's second command, less its tests, made current.
developer() {
  "$python" -m venv "$work/dev"
  # shellcheck source=/dev/null
  source "$work/dev/bin/activate"
}

# browser: Debian's Chromium and its driver, where there are none; without apt the tests are skipped.
browser() {
  if command -v chromium chromedriver > /dev/null; then
    chromium --version
  elif command -v apt-get > /dev/null && [ "$(id -u)" = 0 ]; then
    { apt-get update && apt-get install -y --no-install-recommends chromium chromium-driver fonts-dejavu-core; } > "$work/apt" \
      && chromium --version || tail -n 3 "$work/apt"
  else
    printf 'no apt: the tests in a browser are skipped\n'
  fi
}

# engines: what sweeps run on, into the developer's environment, and its tests. Without them they skip.
engines() {
  pip install -c constraints.txt -e ".[ray,datasets]"
  suite "engines" pytest -n 0 -m "slow or not slow" tests/engines
}

# versions NAME PIP-ARGUMENTS…: a fresh environment of other versions, with what the tests need.
versions() {
  local name=$1
  shift
  "$python" -m venv "$work/$name"
  "$work/$name/bin/pip" install "$@" pytest pytest-xdist hypothesis setuptools
  "$work/$name/bin/pip" install --no-deps -e .
}

lowest() {
  versions lowest -c .ci/lowest.txt torch transformers einops safetensors accelerate peft rich tqdm typer
}

# The pinned versions of everything but transformers and what it pins itself.
newest_transformers() {
  sed '/^\(transformers\|tokenizers\|huggingface_hub\)==/d' constraints.txt > "$work/newest.txt"
  versions newest -c "$work/newest.txt" "transformers==$1" torch einops safetensors accelerate peft rich tqdm typer
}

# transformer_lens VERSION
transformer_lens() {
  "$python" -m venv "$work/tl-$1"
  "$work/tl-$1/bin/pip" install torch==2.13.0
  "$work/tl-$1/bin/pip" install "transformer-lens==$1" nnsight==0.8.1 pytest pytest-xdist hypothesis setuptools
  "$work/tl-$1/bin/pip" install --no-deps -e .
}

finish() {
  say "all is well, in $((SECONDS / 60)) minutes"
  cat "$work/closing"
}
