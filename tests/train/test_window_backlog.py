"""Windows and backlog: sums, counts, buckets, and two bases at most."""
