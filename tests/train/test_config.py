"""Every bad setting names its field, its value and the remedy."""
