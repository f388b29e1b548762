"""From cubes and records to numbers, figures and a page."""
