"""Reports of evaluated runs: tables, charts and pictures."""
