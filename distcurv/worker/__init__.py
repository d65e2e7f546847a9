"""The worker side: sessions, schedule, refreshes."""
