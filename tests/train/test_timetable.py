"""The timetable: every mode closes, posts, polls and installs in an order that works."""
