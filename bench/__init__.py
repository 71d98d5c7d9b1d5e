"""Benchmarks: run from a checkout, never imported by the package."""
