"""The install log and its replay."""
