"""The study: does CPI-FT pay? Its configs, its record and docs/results.md."""
