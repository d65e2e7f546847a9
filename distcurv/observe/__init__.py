"""Events and what is made of them: files, merges, timelines."""
