"""One session, told by a scripted worker: opening, seeds, refusals, lies and silence."""
