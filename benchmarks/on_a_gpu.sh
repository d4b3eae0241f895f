#!/usr/bin/env bash
# What only a GPU can tell, in one command: the Triton kernels' tests on the card, their speed and that of a whole distillation step, the
# speed of layers and models in bf16 with and without torch.compile, the cost of the paper profile, and the midi report (three seeds).
# Its parts ran on an NVIDIA H200 one by one (LOG.md), midi with one seed.
#   python -m kn export-corpus corpus.json        where the pins are installed
#   benchmarks/on_a_gpu.sh corpus.json     on the GPU's machine; KN_PYTHON names its Python (packages of other versions are warned of, not refused)
# Parts of at most nine minutes; what is finished stays in the store, so it may be stopped and started again.
set -euo pipefail
cd "$(dirname "$0")/.."
corpus=${1:?the corpus file is missing: make it with python -m kn export-corpus corpus.json}
mkdir -p reports/midi
python=${KN_PYTHON:-.venv/bin/python}
PYTHONPATH=. timeout 540 "$python" -m pytest tests/distill/test_attention_kl_triton.py || echo "the kernels' tests did not pass" >&2
PYTHONPATH=. timeout 540 "$python" benchmarks/attention_kl.py || echo "the attention benchmark did not finish" >&2
PYTHONPATH=. timeout 540 "$python" benchmarks/distill_step.py --device cuda || echo "the step benchmark did not finish" >&2
PYTHONPATH=. timeout 540 "$python" benchmarks/speed.py --device cuda --dtype bfloat16 --compile || echo "the speed benchmark did not finish" >&2
./run_all.sh --profile paper --dry-run | tee reports/midi/paper-costs.txt
for part in 1 2 3 4; do
  status=0
  timeout 540 ./run_all.sh --profile midi --seeds 3 --jobs 8 --set text.file="$corpus" || status=$?
  [ "$status" = 124 ] || exit "$status"
  echo "part $part is over, going on"
done
