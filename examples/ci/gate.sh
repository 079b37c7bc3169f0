#!/bin/sh
# Fail a build on each line that puts work on another rank's GPU, unless baseline.json knows it. Where there are no GPUs:
#
#     devguard sim --gpus 4 -- sh examples/ci/gate.sh
#
# A new line is corrected, or added to the known ones: devguard log strays --write-baseline baseline.json
set -e
cd "$(dirname "$0")"
rm -rf strays
python -m devguard run --log strays -- python -m torch.distributed.run --standalone --nproc-per-node 4 train.py
python -m devguard log strays --format sarif >strays.sarif # for code scanning
python -m devguard log strays --format md --baseline baseline.json >strays.md || true # for a comment on the pull request
python -m devguard log strays --baseline baseline.json # exit status 3 ends the build
