#!/bin/sh
# Say in one line why pip failed, from the log that make kept.
if grep -q -i -E 'connection|resolve|network|timed out|proxy|no matching distribution' .venv/pip.log; then
  echo "Packages could not be fetched: check the network connection, then run make again. (pip's words: .venv/pip.log)"
else
  echo "Installing failed: $(grep -i error .venv/pip.log | tail -n 1) (all of it: .venv/pip.log)"
fi
