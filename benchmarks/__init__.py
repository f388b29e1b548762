"""Speed as ratios measured in one run; ``python -m benchmarks`` prints a Markdown table."""
