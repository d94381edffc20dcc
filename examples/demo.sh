#!/usr/bin/env bash
# Two real teachers, one student trained with and without their keys and values, one report.
# `make demo` runs it; every command also works on its own.
set -euo pipefail
cd "$(dirname "$0")/.."
models=${MODELS:-models}
teachers=(--set "teachers.smollm2.model=$models/smollm2" --set "teachers.minilm.model=$models/minilm")

set -x
[ -d demo-output/tokenizer ] ||
  kvdistill data tokenizer examples/data/gsm8k_train.jsonl demo-output/tokenizer --vocab-size 2048

# Stage 1 and stage 2: extract both teachers once, then train the student from the store.
kvdistill run examples/demo.yaml "${teachers[@]}"

# The same student, seed, data order and steps without the key/value losses.
kvdistill train examples/demo.yaml "${teachers[@]}" \
  --set name=cross-entropy-only --set losses.key=0 --set losses.value=0

kvdistill inspect demo-output/store
kvdistill report demo-output/runs/two-teachers demo-output/runs/cross-entropy-only \
  --output demo-output/report.html
set +x
echo "open demo-output/report.html in a browser"
