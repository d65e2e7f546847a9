"""The depot: which versions are believed, what counts as dropped, waits with a deadline."""
