"""Time and memory benchmarks, compared with other libraries."""
