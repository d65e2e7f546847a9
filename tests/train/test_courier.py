"""The courier's thread: links that hang, fail or come back, and the training thread kept out."""
