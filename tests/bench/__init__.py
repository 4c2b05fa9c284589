"""Speed and memory beside other tools, as ratios in one run: `make bench`, `make bench-gpu`."""
