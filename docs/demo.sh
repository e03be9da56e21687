#!/bin/sh
# The whole job on a machine without a GPU: what each request of a chat workload costs at two GPU clocks.
# Everything goes to demo/, which git ignores. Run it with `make demo`.
set -eu

rm -rf demo
mkdir demo
tracegen synth --mix chat --rate 2 --duration 60s --seed 1 -o demo/chat.parquet

for mhz in 1830 1200; do
    echo
    replay run demo/chat.parquet --engine sim --tp 8 --freq $mhz -o demo/run-$mhz
    analysis energy demo/run-$mhz
done

echo
analysis buckets demo/run-1830 demo/run-1200
analysis compare demo/run-1830 demo/run-1200
analysis report demo/run-1830 demo/run-1200 -o demo/report.html --title "Chat at 1830 and 1200 MHz"

echo
echo "trace        demo/chat.parquet"
echo "runs         demo/run-1830  demo/run-1200   (Parquet tables; energy/ in each)"
echo "report       demo/report.html   (open it in a browser)"
echo
analysis compare demo/run-1830 demo/run-1200 --brief
