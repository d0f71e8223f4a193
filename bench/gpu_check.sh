#!/usr/bin/env bash
# Builds, tests and times the CUDA kernels on a machine with a GPU, with what is installed there. Leaves JSON and a picture in $OUT
# (build/gpu-check by default); keep them as bench/results/DATE-DEVICE-*.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-build/gpu-check}
mkdir -p "$out"
cmake -S . -B build/gpu -DCMAKE_BUILD_TYPE=Release -DROUNDEL_TESTS=ON -DROUNDEL_PYTHON=OFF -DROUNDEL_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES=native
cmake --build build/gpu --parallel
build/gpu/roundel_tests
build/gpu/roundel_gpu_check "$out/cuda_scale_cast.json" "$out/cuda_adamw.json"
python3 - "$out/cuda_scale_cast.json" <<'PLOT'
import json, sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

record = json.load(open(sys.argv[1]))
plt.semilogx([r["bytes_moved"] for r in record["rows"]], [r["percent_of_copy"] for r in record["rows"]], "o-", base=2)
plt.xlabel("bytes read and written")
plt.ylabel("% of a device copy of as many bytes")
plt.title(f"scale and cast float32 to float16, {record['device']}")
plt.grid(True)
plt.savefig(sys.argv[1].replace(".json", ".png"), dpi=120)
PLOT
cat "$out/cuda_scale_cast.json" "$out/cuda_adamw.json"
